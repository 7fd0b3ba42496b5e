"""Flags that several commands share."""

import argparse
from pathlib import Path

from eval.benchmark.recipes import NAMES
from eval.metrics.protocols import IDENTIFIERS, PRECISIONS, PROTOCOLS

LPIPS_BACKBONES = ("alex", "vgg", "squeeze", "none")


def add_encoder_arguments(parser: argparse._ActionsContainer, batch_size: int) -> None:
    """Which encoders compute the features, and how."""
    parser.add_argument("--dino", help="DINO model instead of the protocol's: timm name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument(
        "--clip", help="CLIP model instead of the protocol's: open_clip name, hf-hub:ID or local-dir:FOLDER"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of the encoders")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="batch size of the encoders")


def add_scorer_arguments(parser: argparse.ArgumentParser, *more: str) -> None:
    """How one subject is scored.

    Args:
        more: protocols besides those that compare all pairs of images and photos.
    """
    of_one_subject = sorted(name for name, protocol in PROTOCOLS.items() if not protocol.pairs_by_name)
    parser.add_argument("--protocol", choices=[*of_one_subject, *more], default="delora", help="default: delora")
    parser.add_argument("--identifier", nargs="+", default=list(IDENTIFIERS), help="words to remove from prompts")
    parser.add_argument("--device", help="default: the GPU if there is one")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a benchmark and a study train, generate and score."""
    parser.add_argument("--output_dir", type=Path, required=True, help="the results folder, which records its settings")
    parser.add_argument(
        "--photographs", type=Path, help="folder with one folder of photos per subject; rendered for toybox if omitted"
    )
    parser.add_argument(
        "--recipe", choices=NAMES, help="settings of the paper's experiment, as defaults of the other flags"
    )
    group = parser.add_argument_group("training and generating")
    group.add_argument("--pretrained_model_name_or_path", help="base model (default for toybox: the miniature)")
    group.add_argument(
        "--train", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of the training script, such as rank=16"
    )
    group.add_argument(
        "--generate",
        nargs="+",
        default=[],
        metavar="FLAG=VALUE",
        help="flags of generate, such as num_inference_steps=25",
    )
    group.add_argument("--identifier", help="word that stands for the subject, instead of the benchmark's")
    group.add_argument("--images_per_prompt", type=int, help="instead of the benchmark's number")
    group.add_argument(
        "--score_every",
        type=int,
        metavar="STEPS",
        help="score after every N steps, keep the best; 0: the last",
    )
    group.add_argument(
        "--keep_best_by", choices=("dino", "clip_i", "clip_t"), default="dino", help="default: dino, the highest mean"
    )
    group.add_argument(
        "--class_images", type=Path, help="folder with a folder of class images per class; generated if omitted"
    )
    group.add_argument("--seeds", type=int, default=1, help="number of trainings per subject, with seeds 0, 1, ...")
    group.add_argument("--subjects", nargs="+", help="run only these subjects")
    group.add_argument("--jobs", type=int, default=1, help="number of subjects that each process runs at once")
    group.add_argument(
        "--together", type=int, default=1, help="number of subjects that each job trains at once on one model"
    )
    group = parser.add_argument_group("scoring")
    group.add_argument("--protocol", nargs="+", choices=sorted(PROTOCOLS), help="default: delora; toybox for toys")
    add_encoder_arguments(group, batch_size=64)
    group.add_argument("--lpips", choices=LPIPS_BACKBONES, help="LPIPS backbone (default: alex; none for toybox)")
    group.add_argument("--workers", type=int, help="number of processes that decode images")
