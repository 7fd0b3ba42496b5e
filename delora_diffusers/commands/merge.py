"""Write a whole pipeline folder with the adapter merged into its weights."""

import argparse
import os
import shutil
from pathlib import Path

from delora_diffusers.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, required=True, help="an output folder or the file in it")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--pretrained_model_name_or_path", help="instead of the base model recorded in the adapter")
    parser.add_argument("--revision")
    parser.add_argument("--variant")


def run(options: argparse.Namespace) -> None:
    if options.output_dir.exists():
        raise InputError(f"--output_dir {options.output_dir} exists already; name a new folder.")
    from delora_diffusers.adapted_pipeline import load_adapted_pipeline
    from delora_diffusers.reading import read_header

    if "control_encoder" in read_header(options.adapter):
        raise InputError(f"{options.adapter} follows maps, which a pipeline folder has no place for; use generate.")

    pipeline = load_adapted_pipeline(
        [(options.adapter, 1.0)],
        options.pretrained_model_name_or_path,
        revision=options.revision,
        variant=options.variant,
    )
    part = options.output_dir.with_name(f".{options.output_dir.name}.{os.getpid()}.part")
    try:
        pipeline.save_pretrained(part)
        part.rename(options.output_dir)
    except OSError as error:
        raise InputError(f"{options.output_dir} could not be written ({error}); free some space.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"wrote {options.output_dir}")
