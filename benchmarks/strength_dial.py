"""Trains toys together, generates them at several strengths, and compares settings at equal prompt fidelity.

Subject fidelity rises and prompt fidelity falls with the strength, so one setting is a curve: from the base model at
strength 0 to the trained adapter at 1. Its upper envelope where CLIP-T is ``CLIP_T_LOSS`` below the base model's is one
number by which settings can be compared. Between measured strengths it is interpolated.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd

from benchmarks.miniature_runs import IDENTIFIER, generate, prepare, score, train
from delora_diffusers.atomic import write_text
from delora_diffusers.json_lines import write_json_lines
from eval.benchmark.results import RESAMPLES
from eval.study.envelope import Estimate, bootstrap_weights, estimate, highest_y, weighted_means

CHOOSING = (220, 221, 223, 224, 225, 226, 228, 229, 232, 233)
"""Ten classes of toys that settings are chosen on."""
JUDGING = tuple(range(200, 210))
"""Those of the benchmark toybox, on which the chosen settings are judged."""
PHOTOS = 5
STRENGTHS = (0.5, 0.7, 1.0)
CLIP_T_LOSS = 0.01
PLACES = (
    "on the beach",
    "in the snow",
    "in the jungle",
    "on a city street",
    "in the desert",
    "on a wooden floor",
    "on a white rug",
    "at night",
    "in a meadow",
    "floating on water",
)
LOOKS = ("red", "striped")


class Toys(NamedTuple):
    """A setting, trained on all toys at once.

    Attributes:
        folder: of this run. photos: has a folder for each toy. subjects: numbers of toys.
        train: flags of the training script; None for the base model's own images.
        boundary: the boundary's schedule, see ``boundary_schedule``; empty for none.
        model: that makes the base model's images; None for the miniature.
    """

    folder: Path
    photos: Path
    subjects: tuple[int, ...]
    seed: int
    train: Mapping[str, Any] | None
    boundary: tuple[tuple[float, float], ...] = ()
    strengths: tuple[float, ...] = STRENGTHS
    model: str | None = None


def subject_prompt(number: int) -> str:
    from data.toybox.shapes import CLASSES

    return f"a photo of {IDENTIFIER} {CLASSES[number % len(CLASSES)]}"


def prompts_of(number: int) -> list[str]:
    """Twelve prompts: ten places and two changes of look."""
    subject = subject_prompt(number)
    changed = [subject.replace(IDENTIFIER, f"{look} {IDENTIFIER}") for look in LOOKS]
    return [*(f"{subject} {place}" for place in PLACES), *changed]


def write_photos(folder: Path, subjects: Sequence[int]) -> None:
    """Render the photos of toys that are not there yet."""
    from data.toybox.write import write_unseen_subject

    for number in subjects:
        if not (folder / f"{number:03}").is_dir():
            write_unseen_subject(folder / f"{number:03}", number, PHOTOS)


def run_toys(run: Toys) -> dict[str, Any]:
    """Train unless it is the base model, generate and score; an existing result is read instead.

    Returns:
        ``folder``, its name; ``seed``; ``rows``, one per toy and strength.
    """
    file = run.folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    prepare(run.folder, "training", "adapters", "images")
    adapters = {number: run.folder / "adapters" / f"{number:03}" for number in run.subjects}
    if run.train is not None:
        lines = [
            {
                "instance_data_dir": str(run.photos / f"{number:03}"),
                "instance_prompt": subject_prompt(number),
                "class_prompt": subject_prompt(number).replace(f"{IDENTIFIER} ", ""),
                "seed": run.seed,
                "output_dir": str(adapters[number]),
            }
            for number in run.subjects
        ]
        write_json_lines(run.folder / "subjects.jsonl", lines)
        values = {"square": True, "checkpointing_steps": 1_000_000, **run.train}
        values |= {"subjects_file": run.folder / "subjects.jsonl", "output_dir": run.folder / "training"}
        with boundary_schedule(run.boundary, int(values.get("max_train_steps", 300))):
            train({name: value for name, value in values.items() if value is not False})
    rows = []
    for strength in run.strengths if run.train is not None else (0.0,):
        requests = []
        for number in run.subjects:
            request = {"prompts": prompts_of(number), "seed": 1000 * run.seed}
            request["output_dir"] = str(run.folder / "images" / f"{number:03}-{strength:g}")
            requests.append(request | ({} if run.train is None else {"adapter": str(adapters[number])}))
        write_json_lines(run.folder / "requests.jsonl", requests)
        generation = {"requests_file": run.folder / "requests.jsonl", "num_images": 1}
        base = {} if run.model is None else {"pretrained_model_name_or_path": run.model}
        generate(generation | (base if run.train is None else {"strength": strength}))
        for number in run.subjects:
            scores = score(run.folder / "images" / f"{number:03}-{strength:g}", run.photos / f"{number:03}")["scores"]
            rows.append({"subject": number, "strength": strength, "dino": scores["dino"], "clip_t": scores["clip_t"]})
    result = {"folder": run.folder.name, "seed": run.seed, "rows": rows}
    write_text(file, json.dumps(result, indent=1) + "\n")
    return result


def boundary_schedule(points: Sequence[tuple[float, float]], steps: int) -> AbstractContextManager[Any]:
    """Multiplies every lambda after each step of the training loop, so that it follows a piecewise linear curve.

    Meant for ``--lambda_learning_rate`` near 0; otherwise lambda also moves by its own gradient.

    Args:
        points: (share of training, factor of the configured boundary), factors above 0. steps: of the training.
    """
    if not points:
        return nullcontext()
    import torch

    from delora_diffusers.adapter.tensors import Adapter
    from delora_diffusers.training import loop

    shares, factors = zip(*points)

    def factor(step: int) -> float:
        return float(np.interp(step / steps, shares, factors))

    class Scheduled(loop.WeightAverage):
        """The loop updates its average after each step, which is where lambda is set."""

        def __init__(self, parameters: Any, adapters: Any, *rest: Any) -> None:
            super().__init__(parameters, adapters, *rest)
            self.scheduled: Sequence[Adapter] = adapters
            self.step = 0
            self.scale(factor(0))

        @torch.no_grad()
        def scale(self, ratio: float) -> None:
            for adapter in self.scheduled:
                for stack in adapter.stacks:
                    stack.trainable["lambda"].mul_(ratio)

        def update(self) -> None:
            self.scale(factor(self.step + 1) / factor(self.step))
            self.step += 1
            super().update()

    return patch.object(loop, "WeightAverage", Scheduled)


def as_rows(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row per run, toy and strength, with the name and seed of the run."""
    return pd.DataFrame(
        [
            {"name": result["folder"].rsplit("-seed-", 1)[0], "seed": result["seed"], **row}
            for result in results
            for row in result["rows"]
        ]
    )


def at_equal_clip_t(rows: pd.DataFrame, base: pd.DataFrame) -> np.ndarray:
    """DINO where CLIP-T is ``CLIP_T_LOSS`` below the base model's, in the sample and its resamples, (1 + B,).

    The same subjects and seeds make the same resamples, so that the values of two settings are paired.

    Args:
        rows: of the settings whose common envelope is taken. base: of the base model, with the same toys and seeds.
    """

    def arrays(group: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:  # (subjects, seeds) each
        tables = [group.pivot_table(index="subject", columns="seed", values=score) for score in ("clip_t", "dino")]
        return tables[0].to_numpy(float), tables[1].to_numpy(float)

    points = [arrays(base), *(arrays(pd.DataFrame(group)) for _, group in rows.groupby(["name", "strength"]))]
    x, y = (np.stack([point[k] for point in points]) for k in (0, 1))
    weights = bootstrap_weights(x.shape[1], x.shape[2], RESAMPLES)
    means_x, means_y = weighted_means(weights, x), weighted_means(weights, y)
    return highest_y(means_x, means_y, means_x[:, :1] - CLIP_T_LOSS)[:, 0]


def difference(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """A setting minus another, paired; of ``at_equal_clip_t``."""
    return estimate(values - reference)
