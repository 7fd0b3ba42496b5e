"""What options of training change: each on ten toys that the miniature never saw, against training without it.

    python -m benchmarks.training_options buckets|preservation|masks|ema OUT [--seeds 3] [--workers 16]

Each toy has six photos in three shapes. Every arm of a comparison trains mini-sd on them, generates the toy in other
places and scores the images; the same prompts without the identifier, and prompts for other classes, show how far the
base model drifted. Writes ``table.md``, ``table.json`` (the scores of every run) and ``sheet.png`` (an image of every
arm and toy) to OUT/COMPARISON. Finished runs are kept, so the same command continues after an interruption.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.miniature_runs import (
    IDENTIFIER,
    IMAGES_PER_PROMPT,
    PROMPT_PLACES,
    flags,
    generate,
    prepare,
    run_all,
    score,
    train,
)
from benchmarks.reporting import print_and_save
from delora_diffusers.atomic import write_text
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.training.arguments import positive_int

SUBJECTS = (210, 211, 212, 214, 215, 216, 217, 218, 221, 222)
"""Ten classes; these numbers had no part in choosing the options."""

OTHER_PROMPTS = (
    "a photo of a ball on the beach",
    "a photo of a tree in the snow",
    "a photo of a hat on a wooden floor",
    "a photo of a mushroom at night",
)
"""Of the four classes that no subject belongs to."""

PHOTO_PLACES = ("white rug", "cobblestones", "kitchen", "city", "pink fabric", "desert", "mountain", "water")
"""Where all photos of a toy are taken in the comparison of masks, a different place from toy to toy."""

SQUARE, WIDE, TALL = (128, 128), (160, 96), (96, 160)
PHOTO_SHAPES = tuple((2 * width, 2 * height) for width, height in (SQUARE, WIDE, TALL))
"""Photos are larger than the resolution that they are trained at."""

PHOTOS, CLASS_IMAGES = 6, 100
BASE = "base model"

TITLES = {
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "drift_class": "drift of the class",
    "drift_others": "drift of other classes",
    "class_dino": "DINO of the class",
    "cut_off": "cut off",
    "elsewhere": "DINO, photos elsewhere",
    "in_place": "in the prompt's place",
    "leaked": "in the photos' place",
}
"""Titles of the scores; the names of scores of wide and tall images end with their shape."""

EXPLAINED = {
    "dino": "similarity to real photos of the same views, in the shape of the images",
    "clip_t": "similarity to the prompt",
    "drift_class": "1 - DINO cosine with the base model's image of the same seed, for prompts without the identifier",
    "drift_others": "the same for prompts of four other classes",
    "class_dino": "similarity of images of the class, without the identifier, to the photos of the toy",
    "cut_off": "share of images in which the segmented toy touches the border",
    "elsewhere": "similarity to photos of the toy in the places of the prompts",
    "in_place": "share of images whose place, by mini-clip, is that of the prompt",
    "leaked": "share of images whose place, by mini-clip, is that of the photos",
}


DRIFTS = ("drift_class", "drift_others")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms that are compared.

    Attributes:
        arms: flags of the training script by the arm's name; the first is the reference.
        scores: measured besides DINO, CLIP-T and both drifts.
        shapes: (width, height) of the generated images.
        one_place: whether all photos of a toy show the same place.
    """

    arms: dict[str, dict[str, Any]]
    scores: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = (SQUARE,)
    one_place: bool = False

    def columns(self) -> dict[str, str]:
        """Titles of all scores by name."""
        names = ("dino", "clip_t", *self.scores)
        titles = {n + suffix(shape): TITLES[n] + title_suffix(shape) for shape in self.shapes for n in names}
        return titles | {name: TITLES[name] for name in DRIFTS}


COMPARISONS = {
    "buckets": Comparison(
        {"square crops": {"square": True}, "buckets": {}}, scores=("cut_off",), shapes=(SQUARE, WIDE, TALL)
    ),
    "preservation": Comparison(
        {
            "none": {},
            "prior preservation": {"with_prior_preservation": True},
            "output preservation": {"with_output_preservation": True},
            "output preservation at weight 10": {"with_output_preservation": True, "output_preservation_weight": 10},
        },
        scores=("class_dino",),
    ),
    "masks": Comparison(
        {
            "none": {},
            "masks with background 0.1": {"use_masks": True, "mask_background_weight": 0.1},
            "masks with background 0": {"use_masks": True, "mask_background_weight": 0},
        },
        scores=("elsewhere", "in_place", "leaked"),
        one_place=True,
    ),
    "ema": Comparison(
        {
            "none": {},
            "EMA 0.99": {"use_ema": True, "ema_decay": 0.99},
            "EMA 0.999": {"use_ema": True, "ema_decay": 0.999},
        }
    ),
}


class Run(NamedTuple):
    """A toy, and an arm with a seed to train it with; or the base model, whose seed is None.

    Attributes:
        folder: of the toy, for all its runs.
    """

    folder: Path
    comparison: str
    arm: str
    subject: int
    seed: int | None
    max_train_steps: int

    @property
    def output(self) -> Path:
        """The folder of this run."""
        arm = self.arm.replace(" ", "-")
        return self.folder / (arm if self.seed is None else f"{arm}-seed-{self.seed}")

    def images(self, shape: tuple[int, int] = SQUARE) -> Path:
        """The folder of the toy's images of a shape."""
        return self.output / f"images{suffix(shape)}"

    def others(self) -> Path:
        """The folder of the images without the identifier: of the class, and of other classes."""
        return self.output / "without-identifier"


def suffix(shape: tuple[int, int]) -> str:
    """What names of files and scores of a shape end with; nothing for squares."""
    return "" if shape == SQUARE else f"_{shape[0]}x{shape[1]}"


def title_suffix(shape: tuple[int, int]) -> str:
    return suffix(shape).replace("_", ", ")


def size_flags(shape: tuple[int, int]) -> dict[str, Any]:
    """The flags of generate for a shape; none for squares, which are the default."""
    return {} if shape == SQUARE else {"width": shape[0], "height": shape[1]}


def kind_of(number: int) -> str:
    """The class of a subject."""
    from data.toybox.shapes import CLASSES

    return CLASSES[number % len(CLASSES)]


def photo_place(run: Run) -> str | None:
    """The place of all photos of a toy; None if they differ."""
    if not COMPARISONS[run.comparison].one_place:
        return None
    return PHOTO_PLACES[run.subject % len(PHOTO_PLACES)]


def subject_prompts(kind: str) -> list[str]:
    return [f"a photo of {IDENTIFIER} {kind} {place}" for place in PROMPT_PLACES]


def class_prompts(kind: str) -> list[str]:
    """The prompts without the identifier."""
    return [f"a photo of a {kind} {place}" for place in PROMPT_PLACES]


def training_flags(run: Run) -> dict[str, Any]:
    """The flags of the training script for a run."""
    values = COMPARISONS[run.comparison].arms[run.arm]
    kind = kind_of(run.subject)
    photos = "photos-and-masks" if values.get("use_masks") else "photos"
    training: dict[str, Any] = {
        "instance_data_dir": run.folder / photos,
        "instance_prompt": f"a photo of {IDENTIFIER} {kind}",
        "output_dir": run.output / "adapter",
        "seed": run.seed,
        "max_train_steps": run.max_train_steps,
        "recipe": "paper",  # the default when the published numbers were measured
    }
    if values.get("with_prior_preservation") or values.get("with_output_preservation"):
        training["class_prompt"] = f"a photo of a {kind}"
    if values.get("with_prior_preservation"):
        training |= {"class_data_dir": run.folder / "class_images", "num_class_images": CLASS_IMAGES}
    return training | values


def write_references(run: Run) -> None:
    """Render the photos to train on, and those to compare with."""
    from benchmarks.toy_scores import place_of
    from data.toybox.scenes import photograph, unseen_subject
    from data.toybox.write import subject_scenes, write_once, write_photos

    comparison, place = COMPARISONS[run.comparison], photo_place(run)

    def write(name: str, scenes: list[Any], shapes: Sequence[tuple[int, int]], masks: bool = False) -> None:
        write_once(run.folder / name, lambda folder: write_photos(folder, scenes, shapes, masks, "cpu"))

    scenes = subject_scenes(run.subject, PHOTOS, place=place)
    write("photos", scenes, PHOTO_SHAPES)
    if any(values.get("use_masks") for values in comparison.arms.values()):
        write("photos-and-masks", scenes, PHOTO_SHAPES, masks=True)
    for shape in comparison.shapes:
        write(f"references{suffix(shape)}", scenes, [(2 * shape[0], 2 * shape[1])])
    if "elsewhere" in comparison.scores:
        subject = unseen_subject(run.subject)
        elsewhere = [photograph(subject, 0, i, place_of(prompt)) for i, prompt in enumerate(subject_prompts(""))]
        write("references-elsewhere", elsewhere, PHOTO_SHAPES[:1])


def generate_images(run: Run, adapter: Path | None) -> None:
    """Generate the toy in every shape, its class and the other classes."""
    kind = kind_of(run.subject)
    values: dict[str, Any] = {"num_images": IMAGES_PER_PROMPT} | ({"adapter": adapter} if adapter else {})
    for shape in COMPARISONS[run.comparison].shapes:
        generate(values | size_flags(shape) | {"prompt": subject_prompts(kind), "output_dir": run.images(shape)})
    generate(values | {"prompt": [*class_prompts(kind), *OTHER_PROMPTS], "output_dir": run.others()})


def prepare_toy(run: Run) -> dict[str, Any]:
    """Render a toy, generate with the base model, and score that; an existing result is read instead."""
    if (run.output / "result.json").exists():
        return json.loads((run.output / "result.json").read_text())
    prepare(run.output)
    write_references(run)
    if any(values.get("with_prior_preservation") for values in COMPARISONS[run.comparison].arms.values()):
        prompt = f"a photo of a {kind_of(run.subject)}"
        folder = run.folder / "class_images"
        generate({"prompt": prompt, "num_images": CLASS_IMAGES, "batch_size": 50, "output_dir": folder})
    generate_images(run, None)
    return write_result(run, 0.0)


def run_arm(run: Run) -> dict[str, Any]:
    """Train, generate and score; an existing result is read instead."""
    if (run.output / "result.json").exists():
        return json.loads((run.output / "result.json").read_text())
    prepare(run.output, "adapter")
    start = time.monotonic()
    train(training_flags(run))
    seconds = time.monotonic() - start
    generate_images(run, run.output / "adapter")
    return write_result(run, seconds)


def write_result(run: Run, seconds: float) -> dict[str, Any]:
    """Score the images of a run and write its result, with the scores of the real photos."""
    from benchmarks.toy_scores import cut_off, dino_to_photos, drift, place_shares
    from data.photographs import find_photographs
    from eval.metrics.generated import read_generated

    comparison, kind = COMPARISONS[run.comparison], kind_of(run.subject)
    scores: dict[str, float] = {}
    real: dict[str, float] = {}
    for shape in comparison.shapes:
        references, images, end = run.folder / f"references{suffix(shape)}", run.images(shape), suffix(shape)
        scored = score(images, references)
        scores |= {f"dino{end}": scored["scores"]["dino"], f"clip_t{end}": scored["scores"]["clip_t"]}
        real[f"dino{end}"] = scored["real"]["dino"]
        if "cut_off" in comparison.scores:
            scores[f"cut_off{end}"] = cut_off([path for path, _ in read_generated(images)])
            real[f"cut_off{end}"] = cut_off([photo.path for photo in find_photographs(references)])
    if "elsewhere" in comparison.scores:
        scores["elsewhere"] = score(run.images(), run.folder / "references-elsewhere")["scores"]["dino"]
    if "leaked" in comparison.scores:
        scores |= place_shares(run.images(), kind, photo_place(run) or "")
    if "class_dino" in comparison.scores:
        scores["class_dino"] = dino_to_photos(run.others(), class_prompts(kind), run.folder / "references")
    if run.seed is not None:
        base = run._replace(arm=BASE, seed=None).others()
        scores["drift_class"] = drift(run.others(), base, class_prompts(kind))
        scores["drift_others"] = drift(run.others(), base, OTHER_PROMPTS)
    values = {} if run.seed is None else comparison.arms[run.arm]
    result = {"arm": run.arm, "flags": values, "subject": run.subject, "kind": kind, "seed": run.seed}
    result |= {"place": photo_place(run), "seconds": round(seconds, 1), "scores": scores, "real": real}
    write_text(run.output / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def text_of(comparison: Comparison, results: Sequence[dict[str, Any]], wanted: int) -> str:
    """The tables, and what their columns mean.

    Args:
        wanted: number of training runs, of which some may have failed.
    """
    from benchmarks.paired_table import CAPTION, table

    real = [r | {"arm": "real photos", "scores": r["real"]} for r in results if r["arm"] == BASE]
    trained = [r for r in results if r["arm"] != BASE]
    arms = list(dict.fromkeys(r["arm"] for r in trained))
    reference = next(iter(comparison.arms))
    compared = [arm for arm in arms if arm != reference and reference in arms]
    titles = comparison.columns()
    lines = [table([*real, *results], ["real photos", BASE, *arms], reference, compared, titles), ""]
    toys, seeds = (len({r[key] for r in trained}) for key in ("subject", "seed"))
    lines += [f"Toys: {toys}; seeds: {seeds}; {len(trained)} of {wanted} training runs finished. {CAPTION}", ""]
    lines += [f"- {TITLES[name]}: {EXPLAINED[name]}." for name in ("dino", "clip_t", *comparison.scores, *DRIFTS)]
    return "\n".join(lines)


def save_sheet(file: Path, runs: Sequence[Run]) -> None:
    """One image per toy and arm, each toy in another place: the first image of a prompt; white if a run failed."""
    from PIL import Image

    from delora_diffusers.image_files import load_rgb
    from delora_diffusers.image_grid import labelled_grid
    from eval.metrics.generated import read_generated

    comparison = COMPARISONS[runs[0].comparison]
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)

    def image(run: Run, folder: Path, index: int) -> Image.Image:
        if not (run.output / "result.json").exists():
            return Image.new("RGB", SQUARE, "white")
        return load_rgb(read_generated(folder)[IMAGES_PER_PROMPT * (index % len(PROMPT_PLACES))][0])

    rows = [("first photo", [load_rgb(run.folder / "photos" / "00.png") for run in by_arm[BASE]])]
    for shape in comparison.shapes:
        for arm, toys in by_arm.items():
            images = [image(run, run.images(shape), index) for index, run in enumerate(toys)]
            rows.append((arm + title_suffix(shape), images))
    if "class_dino" in comparison.scores:
        for arm, toys in by_arm.items():
            images = [image(run, run.others(), index) for index, run in enumerate(toys)]
            rows.append((f"{arm}: the class, without the identifier", images))
    labelled_grid(rows, 128, title=f"Places in turn: {', '.join(PROMPT_PLACES)}").save(file)


def check_flags(runs: Sequence[Run]) -> None:
    """Reject flags that the commands do not have, before anything is rendered or trained."""
    import train_dreambooth_delora
    from delora_diffusers.commands.generate import add_arguments

    generating = argparse.ArgumentParser()
    add_arguments(generating)
    shapes = COMPARISONS[runs[0].comparison].shapes
    checks = [(generating.parse_args, {"prompt": "", **size_flags(shape)}) for shape in shapes]
    checks += [(train_dreambooth_delora.parse_arguments, training_flags(run)) for run in runs]
    for parse, values in checks:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parse(flags(values))
        except SystemExit:
            reason = errors.getvalue().strip().rpartition("error: ")[2]
            sys.exit(f"error: this version lacks a flag of the comparison ({reason}); choose other --arms.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_options",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("comparison", choices=list(COMPARISONS))
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--arms", nargs="+", help="run only these arms; default: all of the comparison")
    parser.add_argument("--subjects", type=int, nargs="+", default=SUBJECTS, help="numbers of unseen subjects")
    parser.add_argument("--seeds", type=positive_int, default=1, help="training runs of each arm and toy; default: 1")
    parser.add_argument("--max_train_steps", type=positive_int, default=300, help="default: 300")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count(), help="runs at the same time")
    options = parser.parse_args(argv)
    comparison = COMPARISONS[options.comparison]
    unknown = [arm for arm in options.arms or () if arm not in comparison.arms]
    if unknown:
        parser.error(f"--arms {unknown[0]!r} is no arm of {options.comparison}; it has {', '.join(comparison.arms)}.")
    folder = options.out_dir / options.comparison

    def runs_of(arm: str, seed: int | None) -> list[Run]:
        settings = (options.comparison, arm)
        return [Run(folder / f"{n:03}", *settings, n, seed, options.max_train_steps) for n in options.subjects]

    toys, chosen = runs_of(BASE, None), options.arms or list(comparison.arms)
    runs = [run for seed in range(options.seeds) for arm in chosen for run in runs_of(arm, seed)]
    check_flags([run for run in runs if run.subject == options.subjects[0] and run.seed == 0])
    results = list(run_all(prepare_toy, toys, options.workers))
    prepared = {result["subject"] for result in results}
    ready = [run for run in runs if run.subject in prepared]
    for result in run_all(run_arm, ready, options.workers) if ready else ():
        results.append(result)
        print(json.dumps({k: result[k] for k in ("arm", "subject", "seed", "seconds", "scores")}), flush=True)
    if len(results) == len(prepared):
        sys.exit("error: no run finished; see the errors above.")
    order = [BASE, *comparison.arms]
    results.sort(key=lambda r: (order.index(r["arm"]), r["subject"], r["seed"] or 0))
    write_text(folder / "table.json", json.dumps(results, indent=1) + "\n")
    save_sheet(folder / "sheet.png", [run for run in [*toys, *runs] if run.subject in prepared and not run.seed])
    print_and_save(text_of(comparison, results, len(runs)), folder / "table.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
