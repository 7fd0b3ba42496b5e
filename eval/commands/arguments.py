"""Flags that several commands have."""

import argparse
from pathlib import Path

from delora_diffusers.errors import InputError
from eval.metrics.protocols import IDENTIFIERS, PRECISIONS, PROTOCOLS

LPIPS_BACKBONES = ("alex", "vgg", "squeeze", "none")


def add_encoder_arguments(parser: argparse._ActionsContainer, batch_size: int) -> None:
    """Which encoders compute the features, and how."""
    parser.add_argument("--dino", help="another DINO: timm name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--clip", help="another CLIP: open_clip name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoders")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="of the encoders")


def add_scorer_arguments(parser: argparse.ArgumentParser) -> None:
    """How one subject is scored."""
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="delora")
    parser.add_argument("--identifier", nargs="+", default=list(IDENTIFIERS), help="words to remove from the prompts")
    parser.add_argument("--device", help="default: a GPU if there is one")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a benchmark and a study train, generate and score."""
    parser.add_argument("--output_dir", type=Path, required=True, help="the results folder, which records its settings")
    parser.add_argument("--photographs", type=Path, help="contains a folder for each subject; toybox renders its own")
    group = parser.add_argument_group("training and generating")
    group.add_argument("--pretrained_model_name_or_path", help="base model; default for toybox: the miniature")
    group.add_argument("--train", nargs="+", default=[], metavar="FLAG=VALUE", help="training flags: rank=16")
    group.add_argument(
        "--generate", nargs="+", default=[], metavar="FLAG=VALUE", help="generate flags: num_inference_steps=25"
    )
    group.add_argument("--seeds", type=int, default=1, help="trainings of each subject, with seeds 0, 1, ...")
    group.add_argument("--subjects", nargs="+", help="only these")
    group.add_argument("--jobs", type=int, default=1, help="subjects at once in each process")
    group.add_argument("--together", type=int, default=1, help="subjects that each job trains at once on one model")
    group = parser.add_argument_group("scoring")
    group.add_argument("--protocol", nargs="+", choices=sorted(PROTOCOLS), help="default: delora, and toybox for toys")
    add_encoder_arguments(group, batch_size=64)
    group.add_argument("--lpips", choices=LPIPS_BACKBONES, help="backbone; default: alex, and none for toybox")
    group.add_argument("--workers", type=int, help="processes that decode images")


def check_new(*files: Path) -> None:
    """Reject output files that exist.

    Raises:
        InputError
    """
    for file in files:
        if file.exists():
            raise InputError(f"{file} already exists; remove it or give another --output.")
