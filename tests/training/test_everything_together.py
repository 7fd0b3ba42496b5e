"""Buckets, masks, captions, prior and output preservation in one run, also on two processes and after a kill."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_delora as script
from delora_diffusers.names import BEST_FOLDER, WEIGHTS_NAME
from delora_diffusers.training.batches import SubjectBatches
from delora_diffusers.training.encoding import PromptTable
from delora_diffusers.training.objective import PRESERVED, Losses
from tests.helpers import run_in_child, run_in_two_processes, train, training_flags

DOG = [(96, 64), (64, 96), (80, 80)]
CAT = [(64, 64), (72, 45)]
"""Sizes of the photos of two concepts: three buckets."""


def write_concept(folder: Path, sizes: list[tuple[int, int]], masks: bool) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(sizes))
    for number, (width, height) in enumerate(sizes):
        image = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
        if masks and number != 2:
            mask = np.zeros((height, width), np.uint8)
            mask[height // 4 : -height // 4, width // 4 : -width // 4] = 255
            Image.fromarray(mask).save(folder / f"{number}.mask.png")
        (folder / f"{number}.txt").write_text(f"{{instance}}, {number}, red, table, night")
    return folder


@pytest.fixture(scope="module")
def flags(tiny_sd, tmp_path_factory) -> Any:
    """The flags of the run with an output folder and further flags."""
    folder = tmp_path_factory.mktemp("together")
    dog, cat = write_concept(folder / "dog", DOG, True), write_concept(folder / "cat", CAT, False)
    records = [
        {"instance_data_dir": str(dog), "instance_name": "sks dog", "class_prompt": "a dog", "repeats": 2},
        {"instance_data_dir": str(cat), "instance_name": "qwe cat", "class_prompt": "a cat", "weight": 0.5},
    ]
    (folder / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(folder / "masks" / "0.png")
    records[1]["mask_data_dir"] = str(folder / "masks")
    file = folder / "concepts.yaml"
    file.write_text(yaml.safe_dump(records))

    def with_output(out: Path, *more: object) -> list[str]:
        common = ["--use_masks", "--mask_background_weight", 0.25, "--caption_dropout", 0.25, "--shuffle_tags"]
        common += [
            "--keep_tags",
            1,
            "--random_flip",
            "--bucket_step",
            8,
            "--train_batch_size",
            2,
            "--noise_offset",
            0.1,
        ]
        common += ["--with_prior_preservation", "--prior_loss_weight", 0.5, "--num_class_images", 3]
        common += ["--with_output_preservation", "--output_preservation_weight", 0.3, "--max_train_steps", 5]
        common += ["--validation_inference_steps", 1, "--learning_rate", 0.01, "--noise_offset", 0.1, *more]
        words = training_flags(tiny_sd, dog, out, *common)
        start = words.index("--instance_data_dir")
        words[start : start + 2] = ["--concepts_list", str(file)]
        return words

    return with_output


STEPS = ("--gradient_accumulation_steps", 2)
HELD_OUT = ("--validation_split", 0.3, "--validation_steps", 2, "--keep_best", "loss", "--checkpointing_steps", 2)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run_in_child(train, flags(out, *STEPS, *HELD_OUT))
    return out


@pytest.mark.integration
def test_the_parts_of_each_batch(flags, tmp_path, monkeypatch):
    """In a round of all buckets, whose micro-batches have photos, class images and the photos again."""
    rows: list[tuple[Any, list[str]]] = []
    lookups: list[list[str]] = []
    lookup, call, losses = PromptTable.lookup, SubjectBatches.__call__, Losses.__call__
    monkeypatch.setattr(PromptTable, "lookup", lambda self, texts: lookups.append(texts) or lookup(self, texts))

    def recording(self: SubjectBatches, microbatch: int) -> Any:
        batch = call(self, microbatch)
        rows.append((batch, lookups[-1]))
        return batch

    parts: list[torch.Tensor] = []

    def recording_losses(self: Losses, **batch: torch.Tensor) -> torch.Tensor:
        loss = losses(self, **batch)
        parts.append(loss.detach())
        return loss

    monkeypatch.setattr(SubjectBatches, "__call__", recording)
    monkeypatch.setattr(Losses, "__call__", recording_losses)
    script.main(flags(tmp_path / "out", "--max_train_steps", 8))
    seen, dropped = Counter(), 0
    shapes = Counter()
    for batch, prompts in rows:
        assert len(prompts) == 6 and batch[PRESERVED].tolist() == [4, 5] and len(batch["noisy"]) == 6
        assert torch.equal(batch["noisy"][:2], batch["noisy"][4:])
        assert torch.equal(batch["timesteps"][:2], batch["timesteps"][4:])
        shapes[tuple(8 * side for side in batch["noisy"].shape[:1:-1])] += 1
        pixels, weights = batch["pixel_weights"], batch["weights"].tolist()
        assert torch.allclose(pixels.mean((1, 2, 3)), torch.ones(6))
        assert torch.equal(pixels[2:], torch.ones_like(pixels[2:]))
        for row in range(2):
            prompt, of_class = prompts[row], prompts[2 + row]
            assert of_class == prompts[4 + row]
            is_dog = of_class == "a dog"
            assert weights[row] == 3 * (1.0 if is_dog else 0.5)
            assert weights[2 + row] == 1.5 and weights[4 + row] == pytest.approx(0.9)
            name, *tags = prompt.split(", ")
            dropped += prompt == ""
            if prompt:
                assert name == ("sks dog" if is_dog else "qwe cat")
                assert sorted(tags)[1:] == ["night", "red", "table"]
                masked = is_dog and sorted(tags)[0] != "2"
                assert (pixels[row].std() > 0.01) == masked
            seen[of_class] += 1
    assert seen == {"a dog": 2 * 2 * 3, "a cat": 2 * 2}
    assert shapes == {(40, 24): 3, (24, 40): 2, (32, 32): 3} and 0 < dropped < 10
    assert len(parts) == 8 and all(torch.isfinite(loss).all() for loss in parts)
    images = tmp_path / "out" / "class_images"
    assert len(list(images.glob("00/*.png"))) == len(list(images.glob("01/*.png"))) == 3


def train_and_die(flags: list[str], when: int) -> None:
    """Train, and stop like ``kill -9`` after a backward."""
    from accelerate import Accelerator

    original, calls = Accelerator.backward, []

    def dying(self: Accelerator, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)

    Accelerator.backward = dying
    train(flags)


@pytest.mark.integration
def test_a_killed_run_ends_with_the_same_bytes(flags, finished, tmp_path):
    """Killed within the accumulation of step 4."""
    out = tmp_path / "out"
    assert run_in_child(train_and_die, flags(out, *STEPS, *HELD_OUT), 7) == -signal.SIGKILL
    assert (out / "checkpoint-2").is_dir() and not (out / WEIGHTS_NAME).exists()
    run_in_child(train, flags(out, *STEPS, *HELD_OUT, "--resume_from_checkpoint", "latest"))
    for name in (WEIGHTS_NAME, f"{BEST_FOLDER}/{WEIGHTS_NAME}", *(f"validation/step-00000{n}.json" for n in (2, 4, 5))):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.integration
def test_two_processes_equal_one_with_accumulation_and_resume(flags, finished, tmp_path):
    """Two processes with one micro-batch each, in one go and in two parts, which end with the same bytes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_in_two_processes(train, flags(whole, *HELD_OUT))
    run_in_two_processes(train, flags(parts, *HELD_OUT, "--max_train_steps", 2))
    (parts / WEIGHTS_NAME).unlink()
    run_in_two_processes(train, flags(parts, *HELD_OUT, "--resume_from_checkpoint", "latest"))
    for name in (WEIGHTS_NAME, f"{BEST_FOLDER}/{WEIGHTS_NAME}"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    expected, two = load_file(finished / WEIGHTS_NAME), load_file(whole / WEIGHTS_NAME)
    assert expected.keys() == two.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    for name in ("00/class-0-00000.png", "01/class-0-00002.png"):
        assert (whole / "class_images" / name).read_bytes() == (finished / "class_images" / name).read_bytes()


@pytest.mark.integration
def test_changed_masks_are_another_run(flags, finished, tmp_path):
    """A mask is data as a photo is; nothing is written before this is known."""
    out = shutil.copytree(finished, tmp_path / "out")
    words = flags(out, *STEPS, *HELD_OUT, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    with open(words[words.index("--concepts_list") + 1]) as file:
        (dog, _) = yaml.safe_load(file)
    mask = Path(dog["instance_data_dir"]) / "0.mask.png"
    before = mask.read_bytes()
    try:
        Image.new("L", DOG[0], 255).save(mask)
        with pytest.raises(AssertionError, match=r"0\.png as concept 1 has changed since .* was trained"):
            run_in_child(train, words)
    finally:
        mask.write_bytes(before)
    assert not (out / "checkpoint-6").exists()
