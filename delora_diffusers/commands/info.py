"""Describe an adapter file, or the memory that training on a base model needs.

Of an adapter: base model, method, settings, training, size, and lambda and distance by layer.
"""

import argparse
from pathlib import Path

from delora_diffusers.errors import InputError
from delora_diffusers.families.flags import add_single_file_arguments

BAR = 30
"""Length of the longest bar, in characters."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, nargs="?", help="output folder, the file in it, or hub id")
    parser.add_argument("--adapter", type=Path, dest="adapter_flag", metavar="ADAPTER", help="the same, as a flag")
    parser.add_argument(
        "--memory", metavar="MODEL", help="instead: what training on this base model needs of a GPU's memory, by flags"
    )
    add_single_file_arguments(parser, prediction=False)
    parser.add_argument("--resolution", type=int, help="side length in pixels for --memory; default: the model's")


def run(options: argparse.Namespace) -> None:
    adapters = [path for path in (options.adapter, options.adapter_flag) if path is not None]
    if len(adapters) + (options.memory is not None) != 1:
        raise InputError("give either an adapter to describe, or a base model with --memory.")
    if options.memory is not None:
        _print_memory(options.memory, options.resolution, options.model_config)
    else:
        _describe(*adapters)


def _print_memory(name: str, resolution: int | None, model_config: str | None) -> None:
    from delora_diffusers.families.checks import check_patches
    from delora_diffusers.families.loading import open_model
    from delora_diffusers.pipelines.sampling import default_resolution
    from delora_diffusers.training.memory_report import memory_table

    model = open_model(name, model_config=model_config, with_weights=False)
    side = resolution or default_resolution(model.pipeline, model.skeletons[model.family.DENOISER])
    check_patches(model.patch_pixels, side)
    if side < 1:
        raise InputError(f"--resolution is {side}; give a positive number.")
    print(memory_table(model, side))


def _describe(adapter: Path) -> None:
    from delora_diffusers.errors import printable
    from delora_diffusers.files.low_rank import low_rank_factors
    from delora_diffusers.files.reading import adapter_path, parse_config, read_adapter
    from delora_diffusers.methods.table import METHODS

    file = adapter_path(adapter)
    header, tensors = read_adapter(file)
    print(f"{file}  {file.stat().st_size / 2**20:.2f} MiB, format version {header['format_version']}")
    print(printable(f"base model: {header['base_model'] or 'not recorded'}"))
    for component, values in header["config"].items():
        config = parse_config(file, values)
        modules = {name.rpartition(".")[0] for name in tensors if name.startswith(component + ".")}
        print(f"{component}: {len(modules)} modules")
        for key, value in values.items():
            if value is not None:
                print(printable(f"  {key}: {', '.join(value) if isinstance(value, list) else value}"))
        lambdas = {
            name.removeprefix(component + ".").removesuffix(".delora_lambda"): tensor.item()
            for name, tensor in tensors.items()
            if name.startswith(component + ".") and name.endswith(".delora_lambda")
        }
        if lambdas:
            print("  trained lambda:")
            _chart(lambdas)
        if METHODS[config.method].has_factors:
            print("  distance |W' - W|_F:")
            _chart({name: factors.norm() for name, factors in low_rank_factors(component, config, tensors).items()})
    if header.get("training"):
        print(printable("training: " + ", ".join(f"{key} {value}" for key, value in header["training"].items())))
    if "control_encoder" in header:
        palette = header["control_encoder"]["palette"]
        kind = "maps in colour" if palette is None else f"index maps with a palette of {len(palette)} colours"
        print(f"control encoder: follows {kind}")


def _chart(values: dict[str, float]) -> None:
    """Print a bar per block and projection, the mean over its layers."""
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        block = name.split(".attentions")[0].split(".layers")[0]
        block = block if block != name else name.partition(".")[0]
        projection = ".".join(name.replace("to_out.0", "to_out").split(".")[-2:])
        groups.setdefault(f"{block} {projection}", []).append(value)
    means = {name: sum(layers) / len(layers) for name, layers in groups.items()}
    width, highest = max(map(len, means)), max(max(means.values()), 1e-30)
    for name, mean in means.items():
        length = round(BAR * min(1.0, max(0.0, mean / highest)))  # in this order, so that it is 0 for NaN
        print(f"    {name:{width}} {'█' * length:{BAR}} {mean:.4g}")
    all_values = list(values.values())
    overall = sum(all_values) / len(all_values)
    print(f"    mean {overall:.4g}, range {min(all_values):.4g} to {max(all_values):.4g}")
