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

OTHER_STUDIES = ("ablation-maps", "comparison", "norms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*STUDIES, *OTHER_STUDIES], help="which figure or table")
    parser.add_argument("--benchmark", default="toybox", help="dreambooth, toybox or a YAML file in the same format")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="instead of the study's default methods")
    parser.add_argument(
        "--multipliers", nargs="+", type=float, help="multiples of the default rate or steps, instead of the study's"
    )
    add_run_arguments(parser)
    group = parser.add_argument_group("ablation-maps")
    group.add_argument(
        "--train_data_dir", type=Path, help="pairs of images and maps; rendered for the miniature if omitted"
    )
    group.add_argument("--map_dir", type=Path, help="other pairs, whose maps are used to generate and score")
    group.add_argument(
        "--score", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of eval map2img, such as palette=ade20k"
    )


def run(options: argparse.Namespace) -> None:
    for multiplier in options.multipliers or ():
        if not 0 < multiplier < math.inf:
            raise InputError(f"--multipliers {multiplier:g} is not positive; give positive numbers, 1 for the default.")

    from eval.study import comparison, curves, maps, norms, trials  # imports torch

    if options.name != "ablation-maps":
        options = with_recipe(options)
    if options.name == "norms":
        trials.finish(norms.write(options.pretrained_model_name_or_path, options.output_dir / "norms"), {})
    elif options.name == "comparison":
        comparison.run(options)
    elif options.name == "ablation-maps":
        maps.run(options)
    else:
        curves.run(options)
