"""Where the seconds before the first training step go, each in fresh processes.

    python -m benchmarks.startup [--runs 5] [--output OUT]

The training rows run the shipped miniature for one step, so that next to nothing but the start is left.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).parent.parent
SCRIPT = "train_dreambooth_delora.py"
OURS = "import train_dreambooth_delora, delora_diffusers.training.setup, delora_diffusers.training.validation"
STOCK = "import torch, accelerate, transformers; from diffusers import DDPMScheduler, StableDiffusionPipeline"


def commands(out_dir: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    python = [sys.executable]
    train = [SCRIPT, "--max_train_steps", "1", "--report_to", "none", "--output_dir", str(out_dir / "run")]
    return {
        "python": [*python, "-c", ""],
        "import torch": [*python, "-c", "import torch"],
        "what any script of diffusers imports": [*python, "-c", STOCK],
        "the same and this toolkit": [*python, "-c", f"{STOCK}; {OURS}"],
        f"{SCRIPT} --help": [*python, SCRIPT, "--help"],
        f"{SCRIPT}, refused": [*python, SCRIPT, "--instance_data_dir", "nowhere", "--instance_prompt", "a toy"],
        "one step of the miniature": [*python, *train],
        "the same by accelerate launch": [*python, "-m", "accelerate.commands.launch", "--num_processes", "1", *train],
    }


def seconds_of(command: list[str], expected: int) -> float:
    """Wall-clock seconds of a command."""
    begun = time.perf_counter()
    ended = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    if ended.returncode != expected:
        raise SystemExit(f"error: {' '.join(command[:4])} ended with {ended.returncode}: {ended.stderr[-500:]}")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    for turn in range(options.runs + 1):  # the first warms the disk and is left out
        with tempfile.TemporaryDirectory() as folder:
            for name in commands(Path(folder)):
                command = commands(Path(folder, str(len(found)), str(turn), name.replace(" ", "-")))[name]
                seconds = seconds_of(command, 1 if name.endswith("refused") else 0)
                if turn:
                    found.setdefault(name, []).append(seconds)
    lines = ["| | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {statistics.median(times):.1f} |" for name, times in found.items()]
    lines += [
        "",
        f"Median of {options.runs} fresh processes; python {platform.python_version()}, {platform.platform()}.",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
