"""Flags that several commands share."""

import argparse
import math
from pathlib import Path

from delora_diffusers.errors import InputError
from delora_diffusers.families.flags import add_single_file_arguments
from delora_diffusers.names import recorded_model_name


def add_adapter_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """``--adapter`` and ``--adapter_weights``; see ``weighted_adapters``."""
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs="+",
        required=required,
        default=[],
        help="output folder, the file in it, or hub id; the updates of several adapters are added",
    )
    parser.add_argument("--adapter_weights", type=float, nargs="+", help="one weight per adapter; default: 1 each")


def add_base_model_arguments(parser: argparse.ArgumentParser, required: bool = False, prediction: bool = False) -> None:
    """``--pretrained_model_name_or_path``, ``--revision``, ``--variant`` and those of ``add_single_file_arguments``."""
    help_text = "the base model of the adapter" if required else "default: the base model recorded in the adapter"
    parser.add_argument("--pretrained_model_name_or_path", required=required, help=help_text)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--variant", help="file variant, for example fp16")
    add_single_file_arguments(parser, prediction)


def recorded_files(options: argparse.Namespace) -> dict[str, str | None]:
    """Which files of the base model were used, as an adapter records it."""
    config = options.model_config
    files = {"revision": options.revision, "variant": options.variant}
    return files | {"model_config": None if config is None else recorded_model_name(config)}


def weighted_adapters(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """The adapters with their weights.

    Raises:
        InputError: the numbers of weights and of adapters differ.
    """
    weights = options.adapter_weights or [1.0] * len(options.adapter)
    if len(weights) != len(options.adapter):
        raise InputError(f"--adapter_weights: {len(weights)} for {len(options.adapter)} --adapter; give one for each.")
    wrong = next((weight for weight in weights if not math.isfinite(weight)), None)
    if wrong is not None:
        raise InputError(f"--adapter_weights contains {wrong}; give finite numbers.")
    return list(zip(options.adapter, weights))
