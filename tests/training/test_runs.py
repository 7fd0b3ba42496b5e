"""A run and its continuation: what must not change, damaged checkpoints, two runs at once, and the last validation."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from delora_diffusers import InputError, launching
from delora_diffusers.crops import View
from delora_diffusers.families.table import family_of
from delora_diffusers.launching import UNSUPPORTED, launched_accelerator
from delora_diffusers.memory import explain_out_of_memory
from delora_diffusers.names import CHECKPOINT_SIZES, WEIGHTS_NAME
from delora_diffusers.training import run_folder
from delora_diffusers.training.checkpoints import check_same_run
from delora_diffusers.training.encoding import encode_images
from tests.helpers import (
    map_flags,
    run_in_child,
    start_in_child,
    train,
    training_flags,
    write_map_folders,
    write_photos,
)


@pytest.fixture(scope="module")
def finished(tiny_sd, tmp_path_factory):
    """A finished run with two checkpoints, its photos, and its flags for another output folder."""
    folder = tmp_path_factory.mktemp("finished")
    photos = write_photos(folder / "photos", 3)
    (photos / "00.txt").write_text("a sks toy in the snow")

    def flags(out, *more):
        validation = (
            "--validation_prompt",
            "a sks toy",
            "--validation_inference_steps",
            1,
            "--num_validation_images",
            1,
        )
        return training_flags(
            tiny_sd, photos, out, "--max_train_steps", 2, "--checkpointing_steps", 1, *validation, *more
        )

    run_in_child(train, flags(folder / "out"))
    return folder / "out", photos, flags


def resumed(flags, out, *more) -> None:
    run_in_child(train, flags(out, "--resume_from_checkpoint", "latest", *more))


def remove(photos):
    (photos / "02.png").unlink()


def replace(photos):
    Image.new("RGB", (64, 64), "red").save(photos / "02.png")


def add(photos):
    Image.new("RGB", (64, 64), "red").save(photos / "03.png")


def recaption(photos):
    (photos / "00.txt").write_text("a sks toy on the beach")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"02\.png is gone since"),
        (replace, r"02\.png has changed since"),
        (add, r"03\.png is new since"),
        (recaption, r"00\.png has changed since"),
    ],
)
def test_other_photos_are_another_run(finished, tmp_path, change, message):
    out, photos, flags = finished
    copy, kept = shutil.copytree(out, tmp_path / "out"), shutil.copytree(photos, tmp_path / "photos")
    try:
        change(photos)
        with pytest.raises(AssertionError, match=message):
            resumed(flags, copy, "--max_train_steps", 3)
        elsewhere = ["--resume_from_checkpoint", copy / "checkpoint-2", "--max_train_steps", 3]
        with pytest.raises(AssertionError, match=message):
            run_in_child(train, flags(tmp_path / "new", *elsewhere))
    finally:
        shutil.rmtree(photos)
        shutil.copytree(kept, photos)
    assert not (tmp_path / "new").exists()
    resumed(flags, copy, "--max_train_steps", 3)


@pytest.mark.integration
def test_other_pairs_are_another_run(tiny_sd, tmp_path):
    import train_controlnet_map2img as script

    pairs = write_map_folders(tmp_path / "pairs")
    flags = map_flags(tiny_sd, pairs, tmp_path / "out", "--max_train_steps", 1)
    run_in_child(script.main, flags)
    (pairs / "images" / "a.txt").write_text("another scene")
    with pytest.raises(AssertionError, match=r"a\.png has changed since"):
        run_in_child(script.main, [*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"])


@pytest.mark.integration
def test_fewer_steps_than_are_done_are_refused(finished, tmp_path):
    out, _, flags = finished
    copy = shutil.copytree(out, tmp_path / "out")
    before = (copy / WEIGHTS_NAME).read_bytes()
    with pytest.raises(AssertionError, match=r"checkpoint-2 has finished 2 steps, more than --max_train_steps 1"):
        resumed(flags, copy, "--max_train_steps", 1)
    assert (copy / WEIGHTS_NAME).read_bytes() == before
    run_in_child(train, flags(copy, "--max_train_steps", 1, "--resume_from_checkpoint", "checkpoint-1"))


def cut(name):
    def harm(checkpoint):
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[:100])

    return harm


def overwrite(name):
    """Damage of the same size, as a failing disk leaves it."""

    def harm(checkpoint):
        file = checkpoint / name
        file.write_bytes(b"\xff" * file.stat().st_size)

    return harm


@pytest.mark.integration
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut("optimizer.bin"), r"optimizer\.bin has 100 of \d+ bytes"),
        (cut("model.safetensors"), r"model\.safetensors has 100 of"),
        (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda checkpoint: (checkpoint / "custom_checkpoint_0.pkl").unlink(), r"custom_checkpoint_0\.pkl is missing"),
        (overwrite("optimizer.bin"), "is damaged"),
        (overwrite("model.safetensors"), "is damaged"),
        (overwrite("custom_checkpoint_0.pkl"), "is damaged"),
        (overwrite(CHECKPOINT_SIZES), rf"{CHECKPOINT_SIZES} is not UTF-8"),
    ],
)
@pytest.mark.parametrize("manifest", [True, False], ids=["", "of an earlier version"])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(finished, tmp_path, harm, message, manifest):
    out, _, flags = finished
    copy = shutil.copytree(out, tmp_path / "out")
    harm(copy / "checkpoint-2")
    if not manifest:
        (copy / "checkpoint-2" / CHECKPOINT_SIZES).unlink()
        if CHECKPOINT_SIZES in message:
            return
        message = "is damaged"
    with pytest.raises(AssertionError, match=message) as raised:
        resumed(flags, copy, "--max_train_steps", 3)
    if CHECKPOINT_SIZES not in message:
        assert "checkpoint-2 is damaged" in str(raised.value)
        assert "use --resume_from_checkpoint checkpoint-1." in str(raised.value)
    run_in_child(train, flags(copy, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-1"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"arguments": 3}', b"\xff\xff", b"[" * 50_000])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json (is damaged|is not JSON|is not UTF-8)"):
        check_same_run(tmp_path, "latest", {"max_train_steps": 3}, {})


@pytest.mark.integration
@pytest.mark.parametrize("steps", [2, 3])
def test_validation_images_that_a_kill_prevented_are_made_when_the_run_goes_on(finished, tmp_path, steps):
    out, _, flags = finished
    copy = shutil.copytree(out, tmp_path / "out")
    validated = ["--validation_steps", 2, "--max_train_steps", steps]
    grid = copy / "validation" / "step-000002.png"
    expected = grid.read_bytes()
    grid.unlink()
    shutil.rmtree(copy / "samples")
    (copy / WEIGHTS_NAME).unlink()
    resumed(flags, copy, *validated)
    assert grid.read_bytes() == expected and (copy / WEIGHTS_NAME).is_file() and (copy / "samples" / "00.png").is_file()


@pytest.mark.integration
def test_two_runs_into_one_folder_at_once(tiny_sd, photographs, tmp_path):
    """One ends as if alone; the other is refused and touches nothing."""
    flags = {seed: training_flags(tiny_sd, photographs, tmp_path / "out", "--seed", seed) for seed in (1, 2)}
    children = {seed: start_in_child(train, flags[seed]) for seed in flags}
    errors = {seed: child.error() for seed, child in children.items()}
    ((loser, error),) = ((seed, error) for seed, error in errors.items() if error is not None)
    last = error.strip().splitlines()[-1]
    assert "InputError: " in last and ("another run is writing to" in last or "contains another run" in last)
    winner = 3 - loser
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "alone", "--seed", winner))
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (tmp_path / "alone" / WEIGHTS_NAME).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["arguments"]["seed"] == winner


def refuse_to_load(flags: list[str]) -> None:
    import delora_diffusers.training.setup as setup

    def refused(*_: object) -> None:
        raise InputError("the model was refused")

    setup.open_base_model = refused
    import delora_diffusers.training.setup

    delora_diffusers.training.setup.open_base_model = refused
    train(flags)


@pytest.mark.integration
def test_a_refused_run_leaves_no_folder(tiny_sd, photographs, tmp_path):
    with pytest.raises(AssertionError, match="the model was refused"):
        run_in_child(refuse_to_load, training_flags(tiny_sd, photographs, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_the_current_folder_can_be_the_output_folder(tiny_sd, photographs, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_in_child(train, training_flags(tiny_sd, photographs.resolve(), tmp_path, "--output_dir", "."))
    assert (tmp_path / "here" / WEIGHTS_NAME).is_file()


def test_the_published_command_is_one_that_others_can_run(monkeypatch):
    words = [
        "--resume_from_checkpoint",
        "latest",
        "--instance_data_dir",
        "/home/me/dog",
        "--hub_token=x",
        "--rank",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/train_dreambooth_delora.py", *words])
    assert run_folder.command_line(published=True) == (
        "accelerate launch train_dreambooth_delora.py --instance_data_dir dog --rank 4"
    )
    assert run_folder.command_line().endswith(
        "--resume_from_checkpoint latest --instance_data_dir /home/me/dog --rank 4"
    )


PROMPTS = ["a 🐶 dog", "\u202eabc", "a: b # c", "'a' \"b\"", "- dash", "```\ncode", "%s {x} \\", "null", "für ä"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_model_card_is_yaml_and_markdown_whatever_the_prompt(tmp_path, prompt):
    from train_dreambooth_delora import parse_arguments

    args = parse_arguments(["--output_dir", str(tmp_path), "--validation_prompt", prompt, "--instance_prompt", prompt])
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "00.png")
    run_folder.write_model_card(tmp_path, args, "3 photos", prompt)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["instance_prompt"] == prompt and metadata["widget"][0]["text"] == prompt
    assert body.count("## Use") == 1 and len(run_folder.fenced("```").splitlines()[0]) == 4


@pytest.mark.parametrize("variable", list(UNSUPPORTED))
def test_what_accelerate_is_configured_for_but_does_not_work_is_said(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"accelerate is configured for {UNSUPPORTED[variable]}"):
        launched_accelerator()


def test_an_unknown_precision_of_accelerate_is_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="accelerate is configured for fp8"):
        launched_accelerator()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_sentence(error):
    message = "ran out.*, while training; in the order of their effect, use --a, --b"
    with pytest.raises(InputError, match=message), explain_out_of_memory("training", ["--a", "--b"]):
        raise error


def test_a_card_without_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(launching, "Accelerator", lambda **_: argparse.Namespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(InputError, match="Tesla T4 does not compute in bf16; pass --mixed_precision fp16"):
        launched_accelerator(mixed_precision="bf16")
    launched_accelerator(mixed_precision="fp16")


@pytest.mark.parametrize(("side", "expected"), [(64, [5]), (256, [4, 1]), (512, [1] * 5)])
def test_large_views_are_encoded_one_at_a_time(side, expected):
    shapes = []

    class Autoencoder(torch.nn.Module):
        dtype, config = (
            torch.float32,
            argparse.Namespace(scaling_factor=1.0, latent_channels=3, block_out_channels=(1, 1, 1, 1)),
        )

        def encode(self, pixels):
            shapes.append(len(pixels))
            latents = pixels[:, :, ::8, ::8]
            return argparse.Namespace(latent_dist=argparse.Namespace(mean=latents, std=latents))

    images = [np.full((side, side, 3), value, np.uint8) for value in range(5)]
    views = [View(image, None, (side, side, 0, 0, side, side)) for image in images]
    cache = encode_images(
        family_of("StableDiffusionPipeline"), Autoencoder(), [views[:2], views[2:]], 2, torch.device("cpu")
    )
    assert shapes == expected and cache.first == [0, 2, 5]
    assert [float(latent[0, 0, 0]) for latent in cache.mean] == pytest.approx([v / 127.5 - 1 for v in range(5)])


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), InputError("other")])
def test_other_errors_keep_their_type_and_traceback(error):
    with pytest.raises(type(error)) as raised, explain_out_of_memory("training", ["--a"]):
        raise error
    assert raised.value is error


def run_out_of_memory(flags: list[str]) -> None:
    import delora_diffusers.training.objective as objective

    original, calls = objective.denoising_losses, []

    def too_much(*arguments: object, **settings: object):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments, **settings)  # pyright: ignore[reportArgumentType]

    objective.denoising_losses = too_much
    train(flags)


@pytest.mark.integration
def test_training_that_runs_out_of_memory_says_what_helps(tiny_sd, photographs, tmp_path):
    with pytest.raises(AssertionError, match="while training on batches of 3 at 32 x 32 pixels; .*") as raised:
        more = ("--train_batch_size", 3, "--checkpointing_steps", 1)
        run_in_child(run_out_of_memory, training_flags(tiny_sd, photographs, tmp_path / "out", *more))
    message = str(raised.value)
    flags = ["--gradient_checkpointing", "--mixed_precision", "--train_batch_size 1", "--resolution", "--rank"]
    positions = [message.index(flag, message.index("use ")) for flag in flags]
    assert positions == sorted(positions)
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}." in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("learning_rate", "nan"),
        ("learning_rate", "-1"),
        ("snr_gamma", "0"),
        ("max_grad_norm", "-1"),
        ("adam_beta1", "2"),
        ("adam_epsilon", "-1"),
        ("lr_warmup_steps", "-5"),
        ("noise_offset", "inf"),
        ("seed", str(2**32)),
    ],
)
def test_numbers_with_which_no_run_ends_well_are_refused(tmp_path, flag, value):
    import train_dreambooth_delora as script

    args = script.parse_arguments(["--output_dir", str(tmp_path / "out"), f"--{flag}={value}"])
    with pytest.raises(InputError, match=f"--{flag} .* is not between"):
        script.check_arguments(args)


def test_a_schedule_that_has_an_end_is_made_longer_with_a_warning(tmp_path, caplog):
    def check(scheduler: str, steps: int) -> None:
        before = {"max_train_steps": 3, "lr_scheduler": scheduler}
        (tmp_path / "config.json").write_text(json.dumps({"arguments": before}))
        check_same_run(tmp_path, "latest", {"max_train_steps": steps, "lr_scheduler": scheduler}, {})

    check("cosine", 3)
    check("constant", 9)
    assert not caplog.records
    check("cosine", 9)
    assert "cosine depends on --max_train_steps, which was 3 and is now 9" in caplog.text


def test_the_same_folder_may_be_given_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"arguments": {"instance_data_dir": "photos"}}))
    monkeypatch.chdir(tmp_path)
    check_same_run(tmp_path, "latest", {"max_train_steps": 1, "instance_data_dir": str(tmp_path / "photos")}, {})


def test_a_run_that_ended_before_its_first_checkpoint_can_be_repeated(tmp_path):
    from delora_diffusers.outputs import check_run_folder

    (tmp_path / "logs").mkdir()
    (tmp_path / "config.json").write_text("{}")
    check_run_folder(tmp_path, None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="contains another run"):
        check_run_folder(tmp_path, None)


def test_a_file_that_may_not_be_read_is_one_sentence():
    from delora_diffusers.dispatch import exit_on_bad_input

    with (
        pytest.raises(SystemExit, match=r"error: x\.txt cannot be accessed \(Permission denied\)"),
        exit_on_bad_input(),
    ):
        raise PermissionError(13, "Permission denied", "x.txt")
    with pytest.raises(OSError, match="bad"), exit_on_bad_input():
        raise OSError(5, "bad")


@pytest.mark.integration
def test_class_images_of_another_prompt_are_not_reused(tiny_sd, photographs, tmp_path):
    prior = ["--with_prior_preservation", "--num_class_images", 1, "--class_data_dir", tmp_path / "class"]
    prior += ["--validation_inference_steps", 1, "--max_train_steps", 1]
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "a", *prior, "--class_prompt", "a dog"))
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "b", *prior, "--class_prompt", "a dog"))
    other = training_flags(tiny_sd, photographs, tmp_path / "c", *prior, "--class_prompt", "a cat")
    with pytest.raises(AssertionError, match=r"class-0-00000\.png was generated for another class prompt"):
        run_in_child(train, other)
