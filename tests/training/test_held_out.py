"""The loss on held-out photos, and the best adapter: neither touches training, and both survive a kill."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import train_dreambooth_delora as script
from delora_diffusers.errors import InputError
from delora_diffusers.files.reading import read_header
from delora_diffusers.names import BEST_FOLDER, WEIGHTS_NAME
from delora_diffusers.training.held_out import DIRECTIONS, BestAdapter, HeldOutLoss, split
from tests.helpers import run_in_child, train, training_flags, write_photos

VALIDATED = (
    "--recipe",
    "paper",
    "--validation_steps",
    1,
    "--logging_steps",
    1,
    "--train_batch_size",
    2,
    "--max_train_steps",
    5,
)
HELD_OUT = (*VALIDATED, "--bucket_step", 8, "--validation_split", 0.4, "--keep_best", "loss", "--learning_rate", 0.1)


@given(st.integers(2, 200), st.floats(0.01, 0.9), st.integers(0, 99))
def test_the_split(count, share, seed):
    held = split(count, share, seed)
    assert held == split(count, share, seed) == sorted(set(held))
    assert 1 <= len(held) < count and set(held) <= set(range(count))
    assert abs(len(held) - share * count) <= 1 or len(held) in (1, count - 1)


def test_the_split_depends_on_the_seed():
    assert len({tuple(split(20, 0.2, seed)) for seed in range(10)}) > 5


def losses_of(out: Path) -> dict[int, float]:
    files = sorted((out / "validation").glob("step-*.json"))
    records = [json.loads(file.read_text()) for file in files]
    assert [int(file.stem.removeprefix("step-")) for file in files] == [record["step"] for record in records]
    return {record["step"]: record["loss"] for record in records}


@pytest.fixture(scope="module")
def run(tiny_sd, photographs, tmp_path_factory) -> Path:
    """A run that holds two of five photos out."""
    out = tmp_path_factory.mktemp("held-out") / "out"
    script.main(training_flags(tiny_sd, photographs, out, *HELD_OUT, "--report_to", "tensorboard"))
    return out


@pytest.mark.integration
def test_training_is_that_of_the_remaining_photos(run, tiny_sd, photographs, tmp_path):
    """Also where prompts and crops depend on a photo's number; and the held-out photos may lie in a folder."""
    held = split(5, 0.4, 0)
    for name in ("rest", "held"):
        (tmp_path / name).mkdir()
    for number, photo in enumerate(sorted(photographs.glob("*.png"))):
        shutil.copy(photo, tmp_path / ("held" if number in held else "rest"))
    flags = training_flags(
        tiny_sd, tmp_path / "rest", tmp_path / "out", *VALIDATED, "--bucket_step", 8, "--learning_rate", 0.1
    )
    script.main([*flags, "--validation_data_dir", str(tmp_path / "held")])
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (run / WEIGHTS_NAME).read_bytes()
    assert losses_of(tmp_path / "out") == losses_of(run)
    alone = training_flags(
        tiny_sd, tmp_path / "rest", tmp_path / "alone", *VALIDATED, "--bucket_step", 8, "--learning_rate", 0.1
    )
    script.main(alone)
    assert (tmp_path / "alone" / WEIGHTS_NAME).read_bytes() == (run / WEIGHTS_NAME).read_bytes()
    assert not (tmp_path / "alone" / "validation").exists()


@pytest.mark.integration
def test_the_loss_is_written_and_logged_and_the_best_adapter_kept(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = losses_of(run)
    assert list(losses) == [1, 2, 3, 4, 5] and len(set(losses.values())) == 5
    events = EventAccumulator(str(run / "logs" / "dreambooth-delora")).Reload()
    logged = {event.step: event.value for event in events.Scalars("validation/loss")}
    assert logged == pytest.approx(losses)
    best = min(losses, key=lambda step: losses[step])
    assert best == 3, "if this is the last step, the tests below show less"
    training = read_header(run / BEST_FOLDER)["training"]
    assert (training["step"], training["validation_loss"]) == (best, losses[best])


@pytest.mark.integration
def test_the_loss_is_that_of_the_adapter_that_is_kept(run, tiny_sd, photographs, tmp_path, monkeypatch):
    """Computed from the file, with the same photos, noise and timesteps; twice the same."""
    best = read_header(run / BEST_FOLDER)["training"]
    readings: list[float] = []
    compute = HeldOutLoss.__call__

    def twice(self: HeldOutLoss) -> float:
        readings.extend([compute(self), compute(self)])
        return readings[-1]

    monkeypatch.setattr(HeldOutLoss, "__call__", twice)
    start = ("--init_adapter", run / BEST_FOLDER, "--learning_rate", 0.0, "--lambda_learning_rate", 0.0)
    script.main(training_flags(tiny_sd, photographs, tmp_path / "out", *HELD_OUT, *start, "--max_train_steps", 1))
    assert len(readings) == 2 and readings[0] == readings[1]
    assert readings[0] == pytest.approx(best["validation_loss"], rel=1e-5)


@pytest.mark.integration
def test_the_loss_is_the_mean_over_photos(tiny_sd, tmp_path, monkeypatch):
    """Of buckets and batches of different sizes, each draw of a photo counts alike, whatever the batch size."""
    photos = write_photos(tmp_path / "photos", 2)
    held = write_photos(tmp_path / "held", 5)
    rows: list[tuple[int, float]] = []
    call = HeldOutLoss.__call__

    def recording(self: HeldOutLoss) -> float:
        value = call(self)
        with torch.no_grad():
            rows.extend((count, self.losses(**batch).item()) for batch, count in self._batches())
        expected = sum(count * loss for count, loss in rows) / sum(count for count, _ in rows)
        assert value == pytest.approx(expected, rel=1e-6)
        assert all(len(bucket.latents.mean) == len(bucket.latents) for bucket in self.buckets)  # one view of each
        return value

    monkeypatch.setattr(HeldOutLoss, "__call__", recording)
    more = ("--validation_data_dir", held, "--max_train_steps", 1, "--bucket_step", 8, "--train_batch_size", 2)
    script.main(training_flags(tiny_sd, photos, tmp_path / "out", *more, "--random_flip"))
    assert sum(count for count, _ in rows) == 16 * 5 and {count for count, _ in rows} == {1, 2}


def train_and_die_at(flags: list[str], when: int) -> None:
    """Train, and stop like ``kill -9`` right after the validation of a step has kept its adapter."""
    offer = BestAdapter.offer

    def dying(self: BestAdapter, step: int, readings: Any) -> None:
        offer(self, step, readings)
        if step == when:
            os.kill(os.getpid(), signal.SIGKILL)

    BestAdapter.offer = dying
    train(flags)


@pytest.mark.integration
@pytest.mark.parametrize("when", [3, 4])
def test_a_killed_run_keeps_the_same_best_adapter(run, tiny_sd, photographs, tmp_path, when):
    """Killed when the best adapter is that of the step, which is trained again, or before the readings of a step that
    has a checkpoint."""
    out = tmp_path / "out"
    flags = training_flags(tiny_sd, photographs, out, *HELD_OUT, "--checkpointing_steps", 2)
    assert run_in_child(train_and_die_at, flags, when) == -signal.SIGKILL
    assert when not in losses_of(out)
    run_in_child(train, [*flags, "--resume_from_checkpoint", "latest"])
    assert losses_of(out) == losses_of(run)
    for name in (WEIGHTS_NAME, f"{BEST_FOLDER}/{WEIGHTS_NAME}"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


class Files:
    """Adapter files that only note what is written."""

    def __init__(self, folder: Path, finite: bool = True):
        self.subjects, self.finite = [type("Flags", (), {"output_dir": folder})], finite
        self.written: list[tuple[int, float]] = []

    def is_finite(self, subject: int) -> bool:
        return self.finite

    def write(self, subject: int, folder: Path, step: int, readings: dict[str, float]) -> None:
        self.written.append((step, *readings.values()))


@pytest.mark.parametrize(("by", "steps"), [("loss", [0, 2, 5]), ("dino", [0, 1, 4])])
def test_the_best_is_the_lowest_loss_or_the_highest_similarity(tmp_path, by, steps):
    files: Any = Files(tmp_path)
    best, values = BestAdapter(files, by), [3.0, 4.0, 2.0, 2.0, 5.0, 1.0]
    for step, value in enumerate(values):
        best.offer(step, {by: value, "other": -value})
    assert [step for step, _ in files.written] == steps and best.best == values[steps[-1]]
    broken: Any = Files(tmp_path, finite=False)
    best = BestAdapter(broken, by)
    best.offer(0, {by: 1.0})
    assert not broken.written and best.best is None and set(DIRECTIONS) == {"loss", "dino"}


@pytest.mark.integration
def test_a_resumed_run_knows_only_the_best_of_its_past(run):
    """The adapter of a step that is still to come does not count, in case the run ends before it."""
    files: Any = Files(run)
    for step, value in ((2, None), (3, losses_of(run)[3]), (5, losses_of(run)[3])):
        best = BestAdapter(files, "loss")
        best.resume(run / f"checkpoint-{step}")
        assert best.best == value


@pytest.mark.integration
def test_keep_best_dino(tiny_sd, tiny_scorers, photographs, tmp_path, monkeypatch):
    """With the similarity that scoring gives for the validation images of that step."""
    from eval.metrics.similarity import DinoSimilarity

    images: list[list[Any]] = []
    call = DinoSimilarity.__call__
    monkeypatch.setattr(DinoSimilarity, "__call__", lambda self, i: images.append(list(i)) or call(self, i))
    validation = ("--validation_prompt", "a sks toy", "a toy", "--num_validation_images", 2, "--max_train_steps", 3)
    dino = f"local-dir:{tiny_scorers / 'dino'}"
    more = ("--keep_best", "dino", "--dino", dino, "--validation_inference_steps", 2, "--learning_rate", 0.1)
    out = tmp_path / "out"
    script.main(training_flags(tiny_sd, photographs, out, *VALIDATED, *validation, *more))
    files = sorted((out / "validation").glob("*.json"))
    readings = {record["step"]: record["dino"] for record in (json.loads(file.read_text()) for file in files)}
    assert list(readings) == [1, 2, 3] and [len(batch) for batch in images] == [4] * 3
    best = max(readings, key=lambda step: readings[step])
    training = read_header(out / BEST_FOLDER)["training"]
    assert (training["step"], training["validation_dino"]) == (best, readings[best])
    from PIL import Image

    references = [Image.open(photo).convert("RGB") for photo in sorted(photographs.glob("*.png"))]
    assert call(DinoSimilarity(references, dino, "cpu"), images[0]) == pytest.approx(readings[1], abs=1e-6)


@pytest.mark.integration
def test_every_part_of_validation_with_a_trained_text_encoder(tiny_sd, photographs, tmp_path):
    """The held-out loss sees the text encoder as it is, and the best adapter has it."""
    out = tmp_path / "out"
    more = ("--train_text_encoder", "--with_output_preservation", "--class_prompt", "a toy", "--max_train_steps", 3)
    script.main(training_flags(tiny_sd, photographs, out, *HELD_OUT, *more))
    assert len(set(losses_of(out).values())) == 3
    assert any(name.startswith("text_encoder.") for name in load_file(out / BEST_FOLDER / WEIGHTS_NAME))


REFUSED = {
    "split and folder": (("--validation_split", 0.5, "--validation_data_dir", "x"), "are both given; choose one"),
    "best without photos": (("--keep_best", "loss"), "--keep_best loss needs held-out photos"),
    "best without images": (("--keep_best", "dino"), "--keep_best dino compares validation images"),
    "a model without use": (("--dino", "x"), "--dino belongs to --keep_best dino"),
    "a share of all": (("--validation_split", 0.95), "--validation_split 0.95 is not between 0 and 0.9"),
    "an odd width": (("--validation_width", 33), "--validation_width 33 is not a multiple of 8; use 32"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_flags_that_do_not_fit(tiny_sd, photographs, tmp_path, case):
    flags, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        script.main(training_flags(tiny_sd, photographs, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_a_single_photo_cannot_be_held_out(tiny_sd, tmp_path):
    photos = write_photos(tmp_path / "photos", 1)
    with pytest.raises(InputError, match="--validation_split needs at least 2 photos, but .*photos has 1"):
        script.main(training_flags(tiny_sd, photos, tmp_path / "out", "--validation_split", 0.5))
    assert not (tmp_path / "out").exists()
