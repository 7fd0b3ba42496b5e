"""Flags that several commands have."""

import argparse
from pathlib import Path

from delora_diffusers.errors import InputError


def add_adapter_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """``--adapter`` and ``--adapter_weights``; see ``weighted_adapters``."""
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs="+",
        required=required,
        default=[],
        help="an output folder, the file in it, or a hub id; several are summed",
    )
    parser.add_argument("--adapter_weights", type=float, nargs="+", help="one per adapter; default: 1 for each")


def add_base_model_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """``--pretrained_model_name_or_path``, ``--revision`` and ``--variant``."""
    what = "the base model the adapter belongs to" if required else "instead of the base model recorded in the adapter"
    parser.add_argument("--pretrained_model_name_or_path", required=required, help=what)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--variant", help="file variant, for example fp16")


def weighted_adapters(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """The adapters with their weights.

    Raises:
        InputError: the number of weights is not the number of adapters.
    """
    weights = options.adapter_weights or [1.0] * len(options.adapter)
    if len(weights) != len(options.adapter):
        raise InputError(
            f"--adapter_weights has {len(weights)} numbers for {len(options.adapter)} adapters; give one per adapter."
        )
    return list(zip(options.adapter, weights))
