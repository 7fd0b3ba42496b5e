"""Write an adapter, or several as one, in the format of another tool: diffusers, peft, kohya or peft-delora."""

import argparse
from pathlib import Path
from typing import Any

from delora_diffusers.commands.arguments import add_adapter_arguments, weighted_adapters
from delora_diffusers.errors import InputError

FORMATS = {
    "diffusers": "pipe.load_lora_weights",
    "kohya": "AUTOMATIC1111, ComfyUI, sd-scripts",
    "peft": "a LoraConfig folder",
    "peft-delora": "a DeloraConfig folder",
}
DTYPES = ("fp32", "fp16", "bf16")
SHOWN_ERRORS = 1e-12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("--format", choices=list(FORMATS), required=True, help=str(FORMATS)[1:-1].replace("'", ""))
    parser.add_argument("--output", type=Path, required=True, help="a new file, or a new folder")
    parser.add_argument("--rank", type=int, help="truncate to this rank; by default nothing is lost")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")


def run(options: argparse.Namespace) -> None:
    adapters = weighted_adapters(options)
    if options.rank is not None and options.rank < 1:
        raise InputError(f"--rank is {options.rank}; give at least 1.")
    if options.output.exists():
        raise InputError(f"--output {options.output} exists already; name a new file or folder.")
    folder = options.format.startswith("peft")
    if folder and options.output.suffix == ".safetensors":
        raise InputError(f"--output {options.output} is a file, but {options.format} is a folder; name a folder.")
    if options.format == "peft-delora" and (len(adapters) > 1 or adapters[0][1] != 1 or options.rank is not None):
        raise InputError("peft-delora holds one whole adapter; leave out --rank and --adapter_weights, name one.")

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
    ranks = [one.rank for modules in source.factors.values() for one in modules.values()]
    if max(errors.values()) > SHOWN_ERRORS:
        print("relative error |dW - dW'| / |dW| of each layer:")
        for name, error in errors.items():
            print(f"  {error:.3e}  {name}")
    else:
        print("nothing is lost: every layer has its whole rank")
    print(f"wrote {written}: {len(ranks)} layers of rank {' and '.join(map(str, sorted(set(ranks))))}")
