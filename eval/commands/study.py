"""Reproduce a figure or table of the paper: train every setting on every subject and seed, generate, score, plot.

Each setting is a benchmark run in its own folder. Results that are already complete are kept, so the same command
continues a study that was stopped. Under ``accelerate launch`` the trainings are spread over the processes.
"""

import argparse
import math
from pathlib import Path

from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from eval.benchmark.recipes import with_recipe
from eval.commands.arguments import add_run_arguments
from eval.study.settings import STUDIES

OTHER_STUDIES = ("ablation-maps", "boundary", "comparison", "flatness", "norms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*STUDIES, *OTHER_STUDIES], help="which figure or table")
    parser.add_argument("--benchmark", default="toybox", help="dreambooth, toybox or a YAML file in the same format")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="instead of the study's default methods")
    parser.add_argument(
        "--multipliers", nargs="+", type=float, help="multiples of the default rate or steps, instead of the study's"
    )
    add_run_arguments(parser)
    group = parser.add_argument_group("flatness and boundary")
    group.add_argument(
        "--step_multipliers", nargs="+", type=float, help="flatness: multiples of the default steps (1/3, 1 and 3)"
    )
    group.add_argument("--bounds", nargs="+", type=float, help="boundary: relative bounds (0.025 to 0.45)")
    group = parser.add_argument_group("ablation-maps")
    group.add_argument(
        "--train_data_dir", type=Path, help="pairs of images and maps; rendered for the miniature if omitted"
    )
    group.add_argument("--map_dir", type=Path, help="other pairs, whose maps are used to generate and score")
    group.add_argument(
        "--score", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of eval map2img, such as palette=ade20k"
    )


def check_study_flags(options: argparse.Namespace) -> None:
    """Reject flags that a study does not use.

    Raises:
        InputError
    """
    of_subjects = ("identifier", "images_per_prompt", "score_every", "class_images", "protocol", "subjects")
    if options.name == "ablation-maps":
        given = [name for name in of_subjects if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0]} applies to studies of subjects, not to ablation-maps; leave it out.")
    for flag, name in (("step_multipliers", "flatness"), ("bounds", "boundary")):
        if getattr(options, flag) and options.name != name:
            raise InputError(f"--{flag} applies to {name}, not to {options.name}; leave it out.")
    if options.name == "boundary" and options.methods not in (None, ["delora"]):
        raise InputError("--methods: only DeLoRA has the boundary that this study varies; leave it out.")
    if options.name == "prolonged" and options.score_every:
        raise InputError("--score_every keeps the best step, but prolonged shows how long trainings end; leave it out.")


def run(options: argparse.Namespace) -> None:
    for flag, remedy in (
        ("multipliers", "1 for the default"),
        ("step_multipliers", "1 for the default"),
        ("bounds", "such as 0.1"),
    ):
        for value in getattr(options, flag) or ():
            if not 0 < value < math.inf:
                raise InputError(f"--{flag} {value:g} is not positive; give positive numbers, {remedy}.")

    from eval.study import boundary, comparison, curves, flatness, maps, norms, trials  # imports torch

    check_study_flags(options)
    if options.name != "ablation-maps":
        options = with_recipe(options)
    if options.name == "norms":
        trials.finish(norms.write(options.pretrained_model_name_or_path, options.output_dir / "norms"), {})
    elif options.name == "comparison":
        comparison.run(options)
    elif options.name == "flatness":
        flatness.run(options)
    elif options.name == "boundary":
        boundary.run(options)
    elif options.name == "ablation-maps":
        maps.run(options)
    else:
        curves.run(options)
