"""Say what an adapter file is: base model, method, settings, size, lambda and tensors."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="an output folder or the file in it")


def run(options: argparse.Namespace) -> None:
    from delora_diffusers.files import adapter_path, read_adapter

    file = adapter_path(options.adapter)
    header, tensors = read_adapter(file)
    print(f"{file}  {file.stat().st_size / 2**20:.2f} MiB, format version {header['format_version']}")
    print(f"base model: {header['base_model'] or 'not recorded'}")
    for component, config in header["config"].items():
        modules = {name.rpartition(".")[0] for name in tensors if name.startswith(component + ".")}
        print(f"{component}: {len(modules)} modules")
        for key, value in config.items():
            if value is not None:
                print(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")
        lambdas = [t.item() for n, t in tensors.items() if n.startswith(component) and n.endswith(".delora_lambda")]
        if lambdas:
            mean = sum(lambdas) / len(lambdas)
            print(f"  trained lambda: mean {mean:.4g}, {min(lambdas):.4g} to {max(lambdas):.4g}")
    if "control_encoder" in header:
        palette = header["control_encoder"]["palette"]
        kind = "maps in colour" if palette is None else f"index maps, a palette of {len(palette)} colours"
        print(f"control encoder: follows {kind}")
