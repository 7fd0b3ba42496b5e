"""Export one adapter, or several combined, to another tool's format: diffusers, peft, kohya or peft-delora."""

import argparse
from pathlib import Path
from typing import Any

from delora_diffusers.commands.arguments import add_adapter_arguments, weighted_adapters
from delora_diffusers.errors import InputError
from delora_diffusers.outputs import check_new

FORMATS = {
    "diffusers": "pipe.load_lora_weights",
    "kohya": "AUTOMATIC1111, ComfyUI, sd-scripts",
    "peft": "PEFT, a LoraConfig folder",
    "peft-delora": "PEFT, a DeloraConfig folder",
}
DTYPES = ("fp32", "fp16", "bf16")
SHOWN_ERRORS = 1e-12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument(
        "--format", choices=list(FORMATS), required=True, help="; ".join(map(": ".join, FORMATS.items()))
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="new file; for several files, as of the peft formats, a new folder"
    )
    parser.add_argument("--rank", type=int, help="truncate to this rank; default: full rank, without loss")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")


def run(options: argparse.Namespace) -> None:
    adapters = weighted_adapters(options)
    if options.rank is not None and options.rank < 1:
        raise InputError(f"--rank is {options.rank}; give at least 1.")
    check_new(options.output, "--output")
    writes_folder = options.format.startswith("peft")
    if writes_folder and options.output.suffix == ".safetensors":
        raise InputError(f"--output {options.output} is a file, but {options.format} writes a folder; give a folder.")
    if options.format == "peft-delora" and (len(adapters) > 1 or adapters[0][1] != 1 or options.rank is not None):
        raise InputError(
            "--format peft-delora exports a single complete adapter; give one --adapter without --rank and "
            "--adapter_weights."
        )

    from delora_diffusers.files import formats

    dtype = formats.DTYPES[options.dtype]
    if options.format == "peft-delora":
        written = formats.write_peft_delora(options.adapter[0], options.output, dtype)
        print(f"wrote {written}")
        return
    source, errors = formats.read_source(adapters, options.rank)
    writers: dict[str, Any] = {
        "diffusers": formats.write_diffusers,
        "kohya": formats.write_kohya,
        "peft": formats.write_peft,
    }
    written = writers[options.format](source, options.output, dtype)
    ranks = [factors.rank for modules in source.factors.values() for factors in modules.values()]
    if max(errors.values()) > SHOWN_ERRORS:
        print("relative error |dW - dW'| / |dW| per layer:")
        for name, error in errors.items():
            print(f"  {error:.3e}  {name}")
    else:
        print("exported without loss: every layer has its full rank")
    print(f"wrote {written}: {len(ranks)} layers of rank {' and '.join(map(str, sorted(set(ranks))))}")
