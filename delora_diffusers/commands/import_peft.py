"""Convert a denoiser's DeLoRA adapter saved by PEFT (a DeloraConfig folder) to an adapter file."""

import argparse
from pathlib import Path

from delora_diffusers.commands.arguments import add_base_model_arguments
from delora_diffusers.errors import InputError
from delora_diffusers.names import recorded_model_name
from delora_diffusers.outputs import check_new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peft_dir",
        type=Path,
        required=True,
        help="folder with adapter_config.json and adapter_model.safetensors",
    )
    add_base_model_arguments(parser, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")


def run(options: argparse.Namespace) -> None:
    if not options.peft_dir.is_dir():
        raise InputError(f"--peft_dir {options.peft_dir} is not a folder; give a folder that PEFT saved.")
    check_new(options.output_dir, "--output_dir")
    import torch
    from torch import nn

    from delora_diffusers.families.loading import open_model
    from delora_diffusers.files.formats import read_peft_delora

    name = options.pretrained_model_name_or_path
    model = open_model(name, revision=options.revision, variant=options.variant, model_config=options.model_config)
    component = model.family.DENOISER
    denoiser = model.load(component, torch.float32)
    weights = {n: m.weight.detach() for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    base = {"base_model": recorded_model_name(name)}
    if options.model_config is not None:
        base["model_config"] = recorded_model_name(options.model_config)
    if component == "transformer":  # its exports depend on the class; files of UNets stay as they were
        base["pipeline"] = type(model.pipeline).__name__
    print(f"wrote {read_peft_delora(options.peft_dir, weights, base, component, options.output_dir)}")
