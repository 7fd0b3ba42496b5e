"""Merge adapters into the base model and write the complete pipeline folder."""

import argparse
from pathlib import Path

from delora_diffusers.commands.arguments import add_adapter_arguments, add_base_model_arguments, weighted_adapters
from delora_diffusers.outputs import check_new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    add_base_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    adapters = weighted_adapters(options)
    check_new(options.output_dir, "--output_dir")
    from delora_diffusers.families.loading import pipeline_folder
    from delora_diffusers.files.merging import merge_folder
    from delora_diffusers.pipelines.adapted_pipeline import base_model_of

    base = base_model_of(options.adapter, options.pretrained_model_name_or_path, options.revision, options.variant)
    folder = pipeline_folder(base.name, revision=base.revision, variant=base.variant)
    merge_folder(folder, adapters, options.output_dir)
    print(f"wrote {options.output_dir}")
