"""Reproduce a figure or table of the paper: train every setting on every subject and seed, generate, score, plot.

Each setting is a benchmark run in its own folder. Results that are already complete are kept, so the same command
continues a study that was stopped. Under ``accelerate launch`` the trainings are spread over the processes.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from delora_diffusers.outputs import check_results_folder
from eval.benchmark.recipes import with_papers_training, with_recipe
from eval.commands.arguments import add_run_arguments
from eval.study.frontier_settings import SCHEDULES, VARIANTS
from eval.study.settings import STUDIES

OTHER_STUDIES = ("ablation-maps", "boundary", "comparison", "flatness", "frontier", "norms")
OF_STUDIES = {
    "bounds": ("boundary", "frontier"),
    "step_multipliers": ("flatness", "frontier"),
    "schedules": ("frontier",),
    "strengths": ("frontier",),
    "clip_t_drop": ("frontier",),
    "judges": ("frontier",),
    "from_rows": ("frontier",),
}
"""The studies that have a flag which others reject."""
SHARED = ("runs", "photographs", "class-images", "map-pairs", "test-maps")
"""Folders of the runs of studies."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*STUDIES, *OTHER_STUDIES], help="which figure or table")
    parser.add_argument("--benchmark", default="toybox", help="dreambooth, toybox or a YAML file in the same format")
    methods = list(dict.fromkeys([*METHODS, *VARIANTS]))
    parser.add_argument("--methods", nargs="+", choices=methods, help="instead of the study's default methods")
    parser.add_argument(
        "--multipliers", nargs="+", type=float, help="multiples of the default rate or steps, instead of the study's"
    )
    add_run_arguments(parser)
    group = parser.add_argument_group("boundary, flatness and frontier")
    group.add_argument("--bounds", nargs="+", type=float, help="boundary, frontier: relative bounds of DeLoRA")
    group.add_argument(
        "--step_multipliers", nargs="+", type=float, help="flatness, frontier: multiples of the default training steps"
    )
    group.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="frontier: learning rate schedules")
    group.add_argument("--strengths", nargs="+", type=float, help="frontier: of the update in images; default: 0.7 1")
    group.add_argument(
        "--clip_t_drop",
        type=float,
        help="frontier: methods are compared at the base model's CLIP-T minus this; default: 0.01",
    )
    group.add_argument(
        "--judges",
        nargs="+",
        help="frontier: subjects that judge the settings chosen on the others; default: two halves in turn",
    )
    group.add_argument(
        "--from_rows",
        action="store_true",
        default=None,
        help="frontier: only write the figures, tables and page again from the rows of an earlier run",
    )
    group = parser.add_argument_group("ablation-maps")
    group.add_argument(
        "--train_data_dir", type=Path, help="pairs of images and maps; rendered for the miniature if omitted"
    )
    group.add_argument("--map_dir", type=Path, help="other pairs, whose maps are used to generate and score")
    group.add_argument(
        "--score", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of eval map2img, such as palette=ade20k"
    )


def check_study_flags(options: argparse.Namespace) -> None:
    """Reject flags that a study does not use, and numbers that are out of range.

    Raises:
        InputError
    """
    for flag, studies in OF_STUDIES.items():
        if getattr(options, flag) is not None and options.name not in studies:
            raise InputError(f"--{flag} applies to {' and '.join(studies)}, not to {options.name}; leave it out.")
    for flag in ("multipliers", "step_multipliers", "bounds", "strengths"):
        wrong = next((value for value in getattr(options, flag) or () if not 0 < value < math.inf), None)
        if wrong is not None:
            raise InputError(f"--{flag} {wrong:g} is not positive; give positive numbers, such as 0.5 or 1.")
    if options.clip_t_drop is not None and not 0 <= options.clip_t_drop < math.inf:
        raise InputError(f"--clip_t_drop is {options.clip_t_drop:g}; give a number of at least 0, such as 0.01.")
    of_subjects = ("identifier", "images_per_prompt", "score_every", "class_images", "protocol", "subjects")
    if options.name == "ablation-maps":
        given = [name for name in of_subjects if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0]} applies to studies of subjects, not to ablation-maps; leave it out.")
    unknown = [name for name in options.methods or () if name not in METHODS]
    if unknown and options.name != "frontier":
        raise InputError(f"--methods {unknown[0]} is a variant that only frontier has; choose {', '.join(METHODS)}.")
    if options.name == "norms":
        check_only(options, ("pretrained_model_name_or_path",), "applies to studies that train, which norms does not")
    if options.from_rows:
        check_only(options, ("from_rows", "clip_t_drop", "judges"), "has no effect on rows that are there already")
    if options.name == "boundary" and options.methods not in (None, ["delora"]):
        raise InputError("--methods: only DeLoRA has the boundary that this study varies; leave it out.")
    if options.name in ("prolonged", "frontier") and options.score_every:
        raise InputError(
            f"--score_every keeps the best step, but {options.name} compares how whole runs end; leave it out."
        )


def check_only(options: argparse.Namespace, used: Sequence[str], why: str) -> None:
    """Reject all flags but some.

    Args:
        used: these and the output folder are accepted. why: what the message says of any other.

    Raises:
        InputError
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for flag, value in vars(options).items():
        if flag not in ("name", "output_dir", "run", *used) and value != parser.get_default(flag):
            raise InputError(f"--{flag} {why}; leave it out.")


def is_result(name: str) -> bool:
    """Whether a name in an output folder is that of a study's result, or of what its runs share."""
    studies = (*STUDIES, *OTHER_STUDIES)
    return name in SHARED or any(name.startswith((f"{study}.", f"{study}-")) for study in studies)


def run(options: argparse.Namespace) -> None:
    check_study_flags(options)
    check_results_folder(options.output_dir, is_result, "a study")

    from eval.study import boundary, comparison, curves, flatness, frontier, maps, norms, trials  # imports torch

    if options.name != "ablation-maps":
        options = with_recipe(options)
    if options.name in (*STUDIES, "comparison"):
        options = with_papers_training(options)
    if options.name == "norms":
        trials.finish(norms.write(options.pretrained_model_name_or_path, options.output_dir / "norms"), {})
    elif options.name == "comparison":
        comparison.run(options)
    elif options.name == "flatness":
        flatness.run(options)
    elif options.name == "boundary":
        boundary.run(options)
    elif options.name == "frontier":
        frontier.run(options)
    elif options.name == "ablation-maps":
        maps.run(options)
    else:
        curves.run(options)
