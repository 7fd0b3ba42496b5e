"""What the files of a training run show while it goes on: curves, and the images of each validation with their scores.

What is computed from them is kept in ``runs/.studio/NAME``, beside the run.
"""

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora_diffusers.atomic import atomic_folder, write_text
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import list_images, load_rgb
from delora_diffusers.image_grid import images_of_grid
from delora_diffusers.names import CONFIG_NAME, is_miniature
from delora_diffusers.text_files import read_json
from studio.run_records import studio_folder

if TYPE_CHECKING:
    from PIL.Image import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from eval.metrics.encoders import ClipEncoder, DinoEncoder

TITLES = {
    "loss": "loss",
    "validation/loss": "loss on held-out photos",
    "distance/mean": "distance |W' - W|",
    "lambda/mean": "boundary λ",
}
"""The curves that training logs, by tag."""
SCORE_TITLES = {"dino": "DINO: similarity to the photos", "clip_t": "CLIP-T: similarity to the prompt"}
OF_PHOTOS, FIRST_SAMPLES = "photos among themselves", "first samples"
"""What the scores are compared with: DINO of the photos, which samples that are like them reach, and CLIP-T of the
first samples, which later ones fall below if the model forgets what prompts say."""
SAMPLES_FOLDER, LISTING_NAME, SCORES_NAME = "samples", "samples.json", "scores.json"
UNNAMED = {
    "dino": "DINO is not computed: name a DINO model to compare the images with the photos.",
    "clip": "CLIP-T is not computed: name a CLIP model to compare the images with their prompts.",
}

_scoring, _reading = threading.Lock(), threading.Lock()
"""Two pages of one server may show the same run."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A value over the steps of training.

    Attributes:
        reference: the name and the value of what to compare it with.
    """

    tag: str
    title: str
    steps: list[int]
    values: list[float]
    reference: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """The images of one validation.

    Attributes:
        images: (file, prompt, seed); empty if the run's prompts have changed since.
        dino, clip_t: their mean scores, None if they are not scored.
        grid: all of them with their prompts, as training wrote it.
        photos_dino: DINO of the photos among themselves, None for a single photo.
    """

    step: int
    images: list[tuple[Path, str, int]]
    dino: float | None
    clip_t: float | None
    grid: Path
    photos_dino: float | None = None


def curves(run: Path) -> list[Curve]:
    """The curves that a run has logged so far, and the scores of its samples; those without a point are left out."""
    points = _scalars(run / "logs")
    logged = [Curve(tag, title, *_sorted(points[tag])) for tag, title in TITLES.items() if points[tag]]
    of_samples = samples(run)
    for name, title in SCORE_TITLES.items():
        scored = {sample.step: value for sample in of_samples if (value := getattr(sample, name)) is not None}
        if scored:
            logged.append(Curve(name, title, *_sorted(scored), _reference(name, of_samples)))
    return logged


def _reference(name: str, of_samples: Sequence[Samples]) -> tuple[str, float] | None:
    if name == "dino":
        return next(
            ((OF_PHOTOS, sample.photos_dino) for sample in reversed(of_samples) if sample.photos_dino is not None), None
        )
    scored = [sample.clip_t for sample in of_samples if sample.clip_t is not None]
    return (FIRST_SAMPLES, scored[0]) if len(scored) > 1 else None


def samples(run: Path) -> list[Samples]:
    """The images of each validation so far, the newest last."""
    scores = _read_scores(run)
    found = []
    for grid in sorted((run / "validation").glob("step-*.png")):
        if grid.is_symlink():
            continue
        with suppress(FileNotFoundError, ValueError), _reading:
            step, known = int(grid.stem.removeprefix("step-")), scores.get(_version(grid), {})
            images = _images(run, grid, step)
            found.append(Samples(step, images, known.get("dino"), known.get("clip_t"), grid, known.get("photos_dino")))
    return found


def score_samples(run: Path, photos: Path, dino: str | None, clip: str | None) -> str | None:
    """Score the samples that are not scored yet: DINO against the photos, CLIP-T against the prompts, on the CPU.

    Args:
        dino, clip: names of models, see ``eval.metrics.encoders``; None for the included ones if the run trains the
            included miniature, and otherwise for none.

    Returns:
        A sentence about what is not computed and why; None if everything is.

    Raises:
        InputError: a model cannot be loaded, or an image cannot be read.
    """
    arguments = _arguments(run)
    if is_miniature(arguments.get("pretrained_model_name_or_path")):
        from eval.metrics.protocols import PROTOCOLS

        dino, clip = dino or PROTOCOLS["toybox"].dino, clip or PROTOCOLS["toybox"].clip
    unnamed = [UNNAMED[kind] for kind, name in (("dino", dino), ("clip", clip)) if not name]
    if dino or clip:
        with _scoring:
            _score(run, photos, dino or None, clip or None)
    return " ".join(unnamed) or None


def _score(run: Path, photos: Path, dino: str | None, clip: str | None) -> None:
    references = list_images(photos)
    scored_with = {"dino_model": dino, "clip_model": clip, "photos": [_version(path) for path in references]}
    scores = _read_scores(run)
    for sample in samples(run):
        version = _version(sample.grid)
        known = scores.get(version, {})
        if not sample.images or {key: known.get(key) for key in scored_with} == scored_with:
            continue
        scores[version] = scored_with | _scores_of(sample.images, references, dino, clip)
        write_text(studio_folder(run) / SCORES_NAME, json.dumps(scores, indent=1) + "\n")


def _scores_of(
    images: Sequence[tuple[Path, str, int]], references: Sequence[Path], dino: str | None, clip: str | None
) -> dict[str, float | None]:
    """The mean scores of the images of one validation, and DINO of the photos among themselves."""
    from eval.metrics.embedding import embed
    from eval.metrics.scores import pair_scores, real_score, text_scores, without_identifier

    paths, prompts, _ = zip(*images)
    scores: dict[str, float | None] = {"dino": None, "clip_t": None}
    if dino is not None:
        features = embed([*paths, *references], {"dino": _dino(dino)}, workers=0)["dino"]
        generated, real = features[: len(paths)], features[len(paths) :]
        scores |= {"dino": float(pair_scores(generated, real).mean()), "photos_dino": real_score(real)}
    if clip is not None:
        encoder = _clip(clip)
        features = embed(paths, {"clip": encoder}, workers=0)["clip"]
        texts = encoder.encode_texts([without_identifier(prompt) for prompt in prompts])
        scores["clip_t"] = float(text_scores(features, texts.cpu()).mean())
    return scores


@functools.lru_cache(maxsize=1)
def _dino(name: str) -> "DinoEncoder":
    from eval.metrics.encoders import DinoEncoder
    from eval.metrics.protocols import DELORA

    return DinoEncoder(
        name, DELORA.dino_transform, "cpu", norm_eps=DELORA.dino_norm_eps if name == DELORA.dino else None
    )


@functools.lru_cache(maxsize=1)
def _clip(name: str) -> "ClipEncoder":
    from eval.metrics.encoders import ClipEncoder
    from eval.metrics.protocols import DELORA

    is_protocols = name == DELORA.clip
    return ClipEncoder(name, DELORA.clip_pretrained, "cpu", DELORA.clip_crop if is_protocols else "torchvision")


def _scalars(logs: Path) -> dict[str, dict[int, float]]:
    """The logged values by tag and step. A run that was killed and continued has logged some steps twice."""
    points: dict[str, dict[int, float]] = {tag: {} for tag in TITLES}
    for folder in sorted({file.parent for file in logs.glob("**/events.out.tfevents.*")}):
        for tag, step, value in _events_in(folder):
            points[tag][step] = value
    return points


def _events_in(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError

    with suppress(DirectoryDeletedError, FileNotFoundError):
        first = min(folder.glob("events.out.tfevents.*"))
        events = _accumulator(folder, first.stat().st_ino, first.name)
        events.Reload()
        for tag in TITLES.keys() & set(events.Tags()["scalars"]):
            for event in events.Scalars(tag):
                yield tag, event.step, event.value


@functools.lru_cache(maxsize=32)
def _accumulator(folder: Path, *_: object) -> "EventAccumulator":
    """What is read from a folder of logs, so that each time only what is new is read.

    Args:
        _: what changes if the folder is removed and written again.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), {"scalars": 0, "images": 1, "tensors": 1})


def _sorted(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _images(run: Path, grid: Path, step: int) -> list[tuple[Path, str, int]]:
    """The images of a grid, which are taken out of it the first time."""
    folder, arguments = studio_folder(run) / SAMPLES_FOLDER / _version(grid), _arguments(run)
    listing = folder / LISTING_NAME
    with suppress(
        InputError, LookupError, TypeError, ValueError
    ):  # another server wrote it first, or files are damaged
        if not listing.is_file():
            prompts, seed, side = arguments["validation_prompt"], arguments["seed"], arguments["resolution"]
            size = arguments["validation_width"] or side, arguments["validation_height"] or side
            columns = arguments["num_validation_images"]
            rows = images_of_grid(load_rgb(grid), prompts, columns, size, title=f"step {step}")
            if rows is not None:
                _write_images(folder, rows, prompts, seed)
    with suppress(InputError, TypeError, ValueError):
        return [(folder / name, prompt, seed) for name, prompt, seed in read_json(listing)]
    return []


def _write_images(folder: Path, rows: Sequence[Sequence["Image"]], prompts: Sequence[str], seed: int) -> None:
    with atomic_folder(folder) as temporary:
        lines = []
        for row, (prompt, images) in enumerate(zip(prompts, rows)):
            for number, image in enumerate(images, start=seed):
                name = f"{row:02}-{number}.png"
                image.save(temporary / name)
                lines.append((name, prompt, number))
        (temporary / LISTING_NAME).write_text(json.dumps(lines) + "\n", encoding="utf-8")


def _arguments(run: Path) -> dict[str, Any]:
    """The flags of a run."""
    with suppress(InputError, OSError):
        config = read_json(run / CONFIG_NAME)
        if isinstance(config, dict) and isinstance(config.get("arguments"), dict):
            return config["arguments"]
    return {}


def _read_scores(run: Path) -> dict[str, dict[str, Any]]:
    with suppress(InputError, OSError):
        scores = read_json(studio_folder(run) / SCORES_NAME)
        if isinstance(scores, dict) and all(isinstance(known, dict) for known in scores.values()):
            return scores
    return {}


def _version(file: Path) -> str:
    """A name of a file that changes with its contents."""
    return f"{file.stem}-{os.stat(file).st_mtime_ns:x}"
