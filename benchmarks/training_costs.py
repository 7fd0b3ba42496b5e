"""What options of training cost: time of a step and memory, with the shapes of Stable Diffusion 1.5 and random weights.

    python -m benchmarks.training_costs OUT_DIR [--steps 150] [--output FILE.md]

Every option is a run of the training script in its own process, on photos of three shapes. The time is the mean over
the steps after the recording of CUDA graphs, between events in the stream; it includes the optimizer and what prepares
the next batch. Needs a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.reporting import print_and_save
from delora_diffusers.dispatch import exit_on_bad_input

SIZES = ((1200, 1200), (1600, 1200), (1200, 1600))
OPTIONS: dict[str, list[str]] = {
    "square crops": ["--square"],
    "buckets, 3 shapes (the default)": [],
    "512 and 768 pixels": ["--resolution", "512", "768"],
    "masks": ["--use_masks"],
    "prior preservation": ["--with_prior_preservation"],
    "output preservation": ["--with_output_preservation"],
    "prior and output preservation": ["--with_prior_preservation", "--with_output_preservation"],
    "EMA": ["--use_ema"],
    "captions of 3 chunks": ["--max_prompt_chunks", "3"],
    "text encoder too": ["--train_text_encoder"],
}
"""Flags of the training script by the option's name."""
SKIPPED = 30
"""Steps that are not timed: graphs are recorded, and clocks settle."""


def write_photos(folder: Path) -> None:
    """Two photos of each shape, with masks."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES * 2):
        noise = Image.fromarray(random.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
        noise.resize((width, height)).save(folder / f"{number}.jpg")
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : -height // 4, width // 4 : -width // 4] = 255
        Image.fromarray(mask).save(folder / f"{number}.mask.png")


def run_timed(words: list[str], report: Path) -> None:
    """Run the training script in this process and write the mean time of a step and the peak memory."""
    import torch

    import train_dreambooth_delora
    from delora_diffusers.training import loop

    events: list[Any] = []

    class Timed(loop.LossMonitor):
        def add(self, losses: torch.Tensor, step: int) -> None:
            super().add(losses, step)
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            if len(events) == 1:
                torch.cuda.reset_peak_memory_stats()

    loop.LossMonitor = Timed
    train_dreambooth_delora.main(words)
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in zip(events[SKIPPED:], events[SKIPPED + 1 :])]
    values = {
        "mean_ms": sum(times) / len(times),
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    report.write_text(json.dumps(values) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="+", help="run only the options whose name contains one of these")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_timed(options.run[1:], Path(options.run[0]))
        return
    from benchmarks.true_shapes import write

    model, photos = options.out_dir / "sd15", options.out_dir / "photos"
    if not model.is_dir():
        write(model, "sd15", "cuda")
    write_photos(photos)
    results: dict[str, dict[str, Any]] = {}
    for number, (name, flags) in enumerate(OPTIONS.items()):
        if options.only and not any(part in name for part in options.only):
            continue
        report = options.out_dir / f"{number:02}.json"
        words = ["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photos)]
        long = " and a ball" * 60 if "chunks" in name else ""
        words += ["--instance_prompt", f"a photo of sks toy{long}", "--class_prompt", "a photo of a toy"]
        words += ["--num_class_images", "8", "--class_data_dir", str(options.out_dir / f"classes-{number}")]
        words += ["--output_dir", str(options.out_dir / f"run-{number}-{os.getpid()}"), "--report_to", "none"]
        words += ["--mixed_precision", "bf16", "--max_train_steps", str(options.steps), "--logging_steps", "1000"]
        words += ["--checkpointing_steps", "100000", "--validation_inference_steps", "4", *flags]
        command = [
            sys.executable,
            "-m",
            "benchmarks.training_costs",
            str(options.out_dir),
            "--run",
            str(report),
            *words,
        ]
        with (options.out_dir / f"{number:02}.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if report.is_file():
            results[name] = json.loads(report.read_text())
            print(name, results[name], flush=True)
    base = next(iter(results.values()))
    lines = ["| | ms per step | / the first | reserved, GiB |", "| --- | ---: | ---: | ---: |"]
    for name, values in results.items():
        ratio = values["mean_ms"] / base["mean_ms"]
        lines.append(f"| {name} | {values['mean_ms']:.1f} | {ratio:.2f} | {values['reserved_gib']:.2f} |")
    lines += ["", f"{base['device']}, torch {base['torch']}; SD 1.5, 512 pixels, batch 1, bf16, rank 16, CUDA graphs."]
    print_and_save("\n".join(lines), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
