"""Write a whole pipeline folder with adapters merged into its weights."""

import argparse
from pathlib import Path

from delora_diffusers.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Path, nargs="+", required=True, help="an output folder, file or hub id; several are summed"
    )
    parser.add_argument("--adapter_weights", type=float, nargs="+", help="of each adapter, by default 1")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--pretrained_model_name_or_path", help="instead of the base model recorded in the adapter")
    parser.add_argument("--revision")
    parser.add_argument("--variant")


def weighted(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """The adapters with their weights.

    Raises:
        InputError: not as many weights as adapters.
    """
    weights = options.adapter_weights or [1.0] * len(options.adapter)
    if len(weights) != len(options.adapter):
        raise InputError(f"--adapter_weights has {len(weights)} numbers for {len(options.adapter)} adapters; give all.")
    return list(zip(options.adapter, weights))


def run(options: argparse.Namespace) -> None:
    adapters = weighted(options)
    if options.output_dir.exists():
        raise InputError(f"--output_dir {options.output_dir} exists already; name a new folder.")
    from delora_diffusers.adapted_pipeline import base_model_of
    from delora_diffusers.base_model import pipeline_folder
    from delora_diffusers.merging import merge_folder

    base = base_model_of(options.adapter, options.pretrained_model_name_or_path)
    folder = pipeline_folder(base, revision=options.revision, variant=options.variant)
    merge_folder(folder, adapters, options.output_dir)
    print(f"wrote {options.output_dir}")
