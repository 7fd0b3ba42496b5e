"""Training from the command line: the loss falls, processes agree, a killed run resumes to the same bytes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from delora_diffusers.names import WEIGHTS_NAME
from tests.helpers import ROOT, fixed_loss, run_in_child, run_in_two_processes, train, training_flags

FEW_STEPS = ["--validation_inference_steps", "2"]
REAL_PHOTOGRAPHS = ROOT.parent / "shared" / "photos" / "dreambooth" / "dog6"


def train_and_die(flags: list[str], where: str, when: int) -> None:
    """Train, and stop like ``kill -9``: at a step, or while a checkpoint is being written."""
    from accelerate import Accelerator

    original = getattr(Accelerator, where)
    calls = 0

    def dying(self, *arguments, **settings):
        nonlocal calls
        calls += 1
        result = original(self, *arguments, **settings)
        if calls == when:
            if where == "save_state":
                model = Path(arguments[0]) / "model.safetensors"
                model.write_bytes(model.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(Accelerator, where, dying)
    train(flags)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["delora", "lora"])
def test_the_loss_falls_in_200_steps(tiny_sd, photographs, tmp_path, method):
    folder = REAL_PHOTOGRAPHS if REAL_PHOTOGRAPHS.is_dir() else photographs
    flags = training_flags(tiny_sd, folder, tmp_path / "out", "--resolution", 64, "--max_train_steps", 200)
    run_in_child(train, [*flags, "--method", method, "--train_batch_size", "2"])
    before, after = fixed_loss(tiny_sd, folder, tmp_path / "out")
    assert after < 0.85 * before


@pytest.mark.integration
def test_two_processes_equal_one_with_accumulation(tiny_sd, photographs, tmp_path):
    flags = training_flags(tiny_sd, photographs, tmp_path / "two", "--train_batch_size", 2, "--learning_rate", 1e-3)
    prior = ["--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", "3", *FEW_STEPS]
    run_in_two_processes(train, [*flags, *prior])
    single = training_flags(tiny_sd, photographs, tmp_path / "one", "--train_batch_size", 2, "--learning_rate", 1e-3)
    run_in_child(train, [*single, "--gradient_accumulation_steps", "2", *prior])
    for name in sorted(p.name for p in (tmp_path / "one" / "class_images").iterdir()):
        assert (tmp_path / "two" / "class_images" / name).is_file()
    from_two, from_one = load_file(tmp_path / "two" / WEIGHTS_NAME), load_file(tmp_path / "one" / WEIGHTS_NAME)
    assert from_two.keys() == from_one.keys()
    for name in from_two:
        torch.testing.assert_close(from_two[name], from_one[name], atol=1e-5, rtol=1e-5)
    trained = [n for n in from_two if n.endswith("_A") and not torch.equal(from_two[n], from_two[n + "0"])]
    assert len(trained) == 56


@pytest.fixture(scope="module")
def uninterrupted_run(tiny_sd, photographs, tmp_path_factory):
    """The bytes of a run that was never stopped, and a function that returns the same flags for another folder."""

    def flags(out: Path) -> list[str]:
        more = ("--max_train_steps", 8, "--checkpointing_steps", 3, "--noise_offset", 0.05, "--lr_scheduler", "cosine")
        return training_flags(tiny_sd, photographs, out, *more, "--random_flip", "--train_batch_size", 2)

    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_in_child(train, flags(out))
    return (out / WEIGHTS_NAME).read_bytes(), flags


@pytest.mark.integration
@pytest.mark.parametrize(("where", "when"), [("backward", 2), ("backward", 5), ("save_state", 2)])
def test_a_killed_run_resumes_to_the_same_bytes(uninterrupted_run, tmp_path, where, when):
    expected, flags = uninterrupted_run
    out = tmp_path / "out"
    assert run_in_child(train_and_die, flags(out), where, when) == -signal.SIGKILL
    assert not (out / WEIGHTS_NAME).exists()
    partial = list(out.glob(".checkpoint-*.part"))
    assert len(partial) == (where == "save_state")
    assert len(list(out.glob("checkpoint-*"))) == (when > 2 or where == "save_state")
    run_in_child(train, [*flags(out), "--resume_from_checkpoint", "latest"])
    assert (out / WEIGHTS_NAME).read_bytes() == expected
    assert not list(out.glob(".*.part"))


@pytest.mark.integration
def test_a_resumed_run_must_keep_its_settings(uninterrupted_run, tmp_path):
    _, flags = uninterrupted_run
    out = tmp_path / "out"
    run_in_child(train, [*flags(out), "--max_train_steps", "3"])
    with pytest.raises(AssertionError, match="trained with --rank 4, but --rank is now 8"):
        run_in_child(train, [*flags(out), "--rank", "8", "--resume_from_checkpoint", "latest"])
    with pytest.raises(
        AssertionError, match="--resume_from_checkpoint checkpoint-7 does not exist; .* has checkpoint-3"
    ):
        run_in_child(train, [*flags(out), "--resume_from_checkpoint", "checkpoint-7"])


@pytest.mark.integration
def test_a_run_with_all_options(tiny_sd, photographs, tmp_path):
    """Prior preservation, text encoder, captions, min-SNR, v-prediction, checkpoint limit, validation, tracker."""
    from data.tiny_sd import write
    from tests.helpers import write_photos

    model = write(tmp_path / "v", prediction_type="v_prediction")
    folder = write_photos(tmp_path / "photos", 3)
    (folder / "00.txt").write_text("sks toy on a table\n")
    config_file = tmp_path / "config.yaml"
    config_file.write_text(
        "with_prior_preservation: true\nclass_prompt: a photo of a toy\nnum_class_images: 3\nrank: 2\n"
        "train_text_encoder: true\nsnr_gamma: 5.0\nmax_train_steps: 2\nvalidation_prompt: [a sks toy, a cat]\n"
        "gradient_checkpointing: true\nmax_grad_norm: 1\n"
    )
    out = tmp_path / "out"
    flags = training_flags(
        model, folder, out, "--config", config_file, "--max_train_steps", 4, "--report_to", "tensorboard"
    )
    flags += [
        "--checkpointing_steps",
        "1",
        "--checkpoints_total_limit",
        "2",
        "--validation_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    flags += ["--validation_inference_steps", "2", "--num_validation_images", "2"]
    run_in_child(train, flags)
    written = {p.name for p in out.iterdir()}
    assert {WEIGHTS_NAME, "config.json", "README.md", "logs", "validation", "class_images"} <= written
    assert {name for name in written if "checkpoint" in name} == {"checkpoint-3", "checkpoint-4"}
    assert len(list((out / "class_images").glob("*.png"))) == 3
    assert {p.name for p in (out / "validation").iterdir()} == {"step-000002.png", "step-000004.png"}
    tensors = load_file(out / WEIGHTS_NAME)
    assert any(name.startswith("text_encoder.") for name in tensors)
    trained = [n for n in tensors if n.startswith("text_encoder.") and n.endswith("_B")]
    assert all(not torch.equal(tensors[n], tensors[n + "0"]) for n in trained)
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["rank"] == 4, "a flag on the command line must override the config file"
    assert config["arguments"]["snr_gamma"] == 5.0
    card = (out / "README.md").read_text()
    assert "accelerate launch" in card and "validation/step-000004.png" in card and "v_prediction" not in card

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "logs" / "dreambooth-delora")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "learning_rate", "lambda_learning_rate", "lambda/mean", "distance/max"} <= scalars
    assert len(events.Scalars("loss")) == 4 and events.Tags()["images"] == ["validation"]


@pytest.mark.integration
def test_a_loss_that_is_not_finite_stops_the_run(tiny_sd, photographs, tmp_path):
    out = tmp_path / "out"
    more = ("--method", "lora", "--checkpointing_steps", 1, "--learning_rate", 1e30, "--max_train_steps", 30)
    with pytest.raises(AssertionError, match=r"the loss was not finite at step \d+; the last good checkpoint is .*-1;"):
        run_in_child(train, training_flags(tiny_sd, photographs, out, *more))
    assert not (out / WEIGHTS_NAME).exists()
    for checkpoint in out.glob("checkpoint-*"):
        assert all(torch.isfinite(t).all() for t in load_file(checkpoint / "model.safetensors").values())


def train_on_a_disk_that_fills(flags: list[str]) -> None:
    from accelerate import Accelerator

    original, calls = Accelerator.save_state, []

    def full(self, folder):
        calls.append(folder)
        original(self, folder)
        if len(calls) == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos\n397120 vs 397012")

    Accelerator.save_state = full
    train(flags)


@pytest.mark.integration
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny_sd, photographs, tmp_path):
    out = tmp_path / "out"
    flags = training_flags(tiny_sd, photographs, out, "--checkpointing_steps", 2)
    with pytest.raises(AssertionError, match="checkpoint-4 could not be written .*; free some space"):
        run_in_child(train_on_a_disk_that_fills, flags)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-2", "config.json"]


def test_randomness_is_a_function_of_the_microbatch():
    from delora_diffusers.training.order import generator, sample_indices

    indices = [index for microbatch in range(5) for index in sample_indices(7, microbatch, 2, 5)]
    assert sorted(indices[:5]) == sorted(indices[5:]) == [0, 1, 2, 3, 4]
    assert indices != [index for microbatch in range(5) for index in sample_indices(8, microbatch, 2, 5)]
    first, second = (torch.randn(4, generator=generator(0, 3)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, torch.randn(4, generator=generator(0, 4)))


def test_min_snr_weights_and_v_targets():
    from diffusers import DDPMScheduler

    from delora_diffusers.training.noising import loss_weights

    timesteps = torch.tensor([0, 10, 500, 999])
    for prediction in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=prediction)
        alpha = scheduler.alphas_cumprod.double().numpy()[timesteps]
        snr = alpha / (1 - alpha)
        expected = np.minimum(snr, 5) / (snr if prediction == "epsilon" else snr + 1)
        np.testing.assert_allclose(loss_weights(scheduler, timesteps, 5.0).numpy(), expected, rtol=1e-3)
        assert torch.equal(loss_weights(scheduler, timesteps, None), torch.ones(4))
