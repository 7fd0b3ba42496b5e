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
from eval.study.frontier_settings import SCHEDULES, VARIANTS
from eval.study.settings import STUDIES

OTHER_STUDIES = ("ablation-maps", "comparison", "frontier", "norms")
OF_FRONTIER = ("bounds", "schedules", "step_multipliers", "strengths", "clip_t_drop", "judges", "from_rows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*STUDIES, *OTHER_STUDIES], help="which figure or table")
    parser.add_argument("--benchmark", default="toybox", help="dreambooth, toybox or a YAML file in the same format")
    methods = list(dict.fromkeys([*METHODS, *VARIANTS]))
    parser.add_argument("--methods", nargs="+", choices=methods, help="instead of the study's default methods")
    parser.add_argument(
        "--multipliers", nargs="+", type=float, help="multiples of the default rate or steps, instead of the study's"
    )
    add_run_arguments(parser)
    group = parser.add_argument_group("frontier")
    group.add_argument("--bounds", nargs="+", type=float, help="relative bounds of DeLoRA")
    group.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="learning rate schedules")
    group.add_argument("--step_multipliers", nargs="+", type=float, help="multiples of the default training steps")
    group.add_argument("--strengths", nargs="+", type=float, help="of the update in generated images; default: 0.7 1")
    group.add_argument(
        "--clip_t_drop", type=float, help="methods are compared at the base model's CLIP-T minus this; default: 0.01"
    )
    group.add_argument(
        "--judges", nargs="+", help="subjects that judge the settings chosen on the others; default: two halves in turn"
    )
    group.add_argument(
        "--from_rows",
        action="store_true",
        default=None,
        help="only write the figures, tables and page again from the rows of an earlier run",
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
    """Reject flags that a study does not use.

    Raises:
        InputError
    """
    check_frontier_flags(options)
    of_subjects = ("identifier", "images_per_prompt", "score_every", "class_images", "protocol", "subjects")
    if options.name == "ablation-maps":
        given = [name for name in of_subjects if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0]} applies to studies of subjects, not to ablation-maps; leave it out.")
    if options.name == "prolonged" and options.score_every:
        raise InputError("--score_every keeps the best step, but prolonged shows how long trainings end; leave it out.")


def check_frontier_flags(options: argparse.Namespace) -> None:
    """Reject flags of ``frontier`` for other studies, and values of them that are out of range.

    Raises:
        InputError
    """
    if options.name != "frontier":
        given = [name for name in OF_FRONTIER if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0]} applies to the study frontier, not to {options.name}; leave it out.")
        unknown = [name for name in options.methods or () if name not in METHODS]
        if unknown:
            raise InputError(
                f"--methods {unknown[0]} is a variant that only frontier has; choose {', '.join(METHODS)}."
            )
        return
    if options.score_every:
        raise InputError("--score_every keeps the best step, but frontier compares whole runs; leave it out.")
    for name in ("bounds", "step_multipliers", "strengths"):
        wrong = next((value for value in getattr(options, name) or () if not 0 < value < math.inf), None)
        if wrong is not None:
            raise InputError(f"--{name} {wrong:g} is not positive; give positive numbers.")
    if options.clip_t_drop is not None and not 0 <= options.clip_t_drop < math.inf:
        raise InputError(f"--clip_t_drop is {options.clip_t_drop:g}; give a number of at least 0, such as 0.01.")


def run(options: argparse.Namespace) -> None:
    for multiplier in options.multipliers or ():
        if not 0 < multiplier < math.inf:
            raise InputError(f"--multipliers {multiplier:g} is not positive; give positive numbers, 1 for the default.")

    check_study_flags(options)

    from eval.study import comparison, curves, frontier, maps, norms, trials  # imports torch

    if options.name != "ablation-maps":
        options = with_recipe(options)
    if options.name == "norms":
        trials.finish(norms.write(options.pretrained_model_name_or_path, options.output_dir / "norms"), {})
    elif options.name == "comparison":
        comparison.run(options)
    elif options.name == "frontier":
        frontier.run(options)
    elif options.name == "ablation-maps":
        maps.run(options)
    else:
        curves.run(options)
