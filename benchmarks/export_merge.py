"""Time and peak memory of export and merge at the true shapes of Stable Diffusion 1.5 and XL, on a CPU.

    python -m benchmarks.export_merge OUT_DIR [--models sd15 sdxl]

Writes a pipeline folder whose UNet has random weights in fp16, and a DeLoRA adapter of rank 16 for its attention. Every
command runs in a new process; its peak memory is what the operating system reports. The first row is a process that
only imports torch and diffusers.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.train_step import RANK, build_unet
from delora_diffusers.dispatch import exit_on_bad_input


def write_inputs(folder: Path, shape: str) -> tuple[Path, Path]:
    """Write a pipeline folder whose UNet has the true shape, and an adapter for it; returns their folders."""
    import torch
    from safetensors.torch import save_file

    from data.tiny_sd import write
    from delora_diffusers import AdapterConfig, attach, save_adapter

    model, adapter = folder / f"model-{shape}", folder / f"adapter-{shape}"
    if not model.exists():
        write(model, kind="sdxl" if shape == "sdxl" else "sd1")
        unet: Any = build_unet("cpu", shape)
        shutil.rmtree(model / "unet")
        (model / "unet").mkdir()
        unet.save_config(model / "unet")
        weights = {name: tensor.half() for name, tensor in unet.state_dict().items()}
        save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        del weights
        attached = attach(unet, AdapterConfig(rank=RANK), torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.mul_(1.1).add_(0.01)
        kind = "StableDiffusionXLPipeline" if shape == "sdxl" else "StableDiffusionPipeline"
        save_adapter(attached, adapter, base_model=str(model), pipeline=kind)
    return model, adapter


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of python with these arguments."""
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *arguments], dict(os.environ))
    _, status, usage = os.wait4(child, 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"error: python {' '.join(arguments)} failed with exit code {code}.")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=("sd15", "sdxl"), default=["sd15", "sdxl"])
    options = parser.parse_args()
    options.out_dir.mkdir(parents=True, exist_ok=True)
    lines = ["| | seconds | peak MiB | file, MiB |", "| --- | ---: | ---: | ---: |"]
    seconds, peak = measure(["-c", "import torch, diffusers, delora_diffusers.adapter"])
    lines.append(f"| importing torch and diffusers | {seconds:.1f} | {peak:.0f} | |")
    for shape in options.models:
        # In a child process, so that its memory is released.
        if os.fork() == 0:
            write_inputs(options.out_dir, shape)
            os._exit(0)
        os.wait()
        model, adapter = options.out_dir / f"model-{shape}", options.out_dir / f"adapter-{shape}"
        cases = {
            "export --format diffusers": ["export", "--format", "diffusers", "--output"],
            "export --format kohya --dtype fp16 --rank 8": [
                *("export", "--format", "kohya", "--dtype", "fp16", "--rank", "8", "--output")
            ],
            "merge": ["merge", "--output_dir"],
        }
        for name, command in cases.items():
            written = options.out_dir / "written"
            shutil.rmtree(written, ignore_errors=True)
            arguments = ["-m", "delora_diffusers", *command, str(written), "--adapter", str(adapter)]
            if command[0] == "merge":
                arguments += ["--pretrained_model_name_or_path", str(model)]
            seconds, peak = measure(arguments)
            size = max(file.stat().st_size for file in written.rglob("*.safetensors")) / 2**20
            lines.append(f"| {shape}, {name} | {seconds:.1f} | {peak:.0f} | {size:.0f} |")
            shutil.rmtree(written, ignore_errors=True)
    print("\n".join(lines))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
