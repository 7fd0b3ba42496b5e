"""Convert an adapter of another tool to an adapter file: a LoRA, or a denoiser's DeLoRA saved by PEFT."""

import argparse
from pathlib import Path

from delora_diffusers.commands.arguments import add_base_model_arguments, recorded_files
from delora_diffusers.errors import InputError
from delora_diffusers.names import recorded_model_name
from delora_diffusers.outputs import check_new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--peft_dir",
        type=Path,
        help="folder of a DeLoRA with adapter_config.json and adapter_model.safetensors",
    )
    source.add_argument("--lora", type=Path, help="a LoRA of sd-scripts, diffusers or PEFT: file, folder or hub id")
    add_base_model_arguments(parser, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")


def run(options: argparse.Namespace) -> None:
    if options.peft_dir is not None and not options.peft_dir.is_dir():
        raise InputError(f"--peft_dir {options.peft_dir} is not a folder; give a folder that PEFT saved.")
    check_new(options.output_dir, "--output_dir")
    if options.lora is not None:
        _import_lora(options)
    else:
        _import_peft_delora(options)


def _import_lora(options: argparse.Namespace) -> None:
    from delora_diffusers.families.loading import open_model
    from delora_diffusers.files.formats import write_adapter
    from delora_diffusers.files.lora_files import adapter_files, as_adapter, is_ours, read_lora

    files = adapter_files(options.lora)
    if is_ours(files):
        raise InputError(f"--lora {options.lora} is an adapter of this library already; use it as it is.")
    name = options.pretrained_model_name_or_path
    files_of_model = {key: getattr(options, key) for key in ("revision", "variant", "model_config")}
    model = open_model(name, **files_of_model, with_weights=False)
    models = {component: skeleton for component, skeleton in model.skeletons.items() if component != "vae"}
    pipeline = type(model.pipeline).__name__
    components = {c: as_adapter(modules) for c, modules in read_lora(files, models, pipeline).items()}
    base = {"base_model": recorded_model_name(name), "pipeline": pipeline}
    base |= {key: value for key, value in recorded_files(options).items() if value is not None}
    print(f"wrote {write_adapter(components, base, files[-1], options.output_dir)}")


def _import_peft_delora(options: argparse.Namespace) -> None:
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
