"""Where the time before the first training step goes, and how long the included models take to load.

    python -m benchmarks.startup [--runs 5] [--output OUT]

Every command runs in a new process. The training rows run one step of the included miniature, so that little but the
startup is left. The loading rows come from a process that refuses network connections, and do not include imports.
"""

import argparse
import importlib
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reporting import print_and_save
from delora_diffusers.dispatch import exit_on_bad_input

TOP = Path(__file__).parent.parent
SCRIPT = "train_dreambooth_delora.py"
OURS = "import train_dreambooth_delora, delora_diffusers.training.setup, delora_diffusers.training.validation"
STOCK = "import torch, accelerate, transformers; from diffusers import DDPMScheduler, StableDiffusionPipeline"
INVALID = f"{SCRIPT} with an invalid argument"
LOAD_FAMILY = "from benchmarks import startup; startup.refuse_connections(); startup.load_family()"
IMPORTED_WHEN_LOADING = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
    "transformers.models.segformer.image_processing_segformer",
    "transformers.models.segformer.modeling_segformer",
)
"""Modules that diffusers and transformers import only when they load a model."""


def commands(out_dir: Path) -> dict[str, list[str]]:
    """The arguments of python to time, by name of the row; ``out_dir`` is for training output."""
    train = [SCRIPT, "--max_train_steps", "1", "--report_to", "none", "--output_dir"]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1"]
    return {
        "python": ["-c", ""],
        "import torch": ["-c", "import torch"],
        "what any diffusers script imports": ["-c", STOCK],
        "the same plus this toolkit": ["-c", f"{STOCK}; {OURS}"],
        f"{SCRIPT} --help": [SCRIPT, "--help"],
        INVALID: [SCRIPT, "--instance_data_dir", "nowhere", "--instance_prompt", "a toy"],
        "one step of the miniature": [*train, str(out_dir / "python")],
        "the same with accelerate launch": [*launch, *train, str(out_dir / "launch")],
    }


def run(arguments: list[str], exit_code: int = 0) -> tuple[float, str]:
    """Seconds that python takes with these arguments, and what it prints; the exit code must be ``exit_code``."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, *arguments], cwd=TOP, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode != exit_code:
        command = " ".join(["python", *arguments[:3]])
        raise SystemExit(f"error: {command} failed with exit code {result.returncode}: {result.stderr[-500:]}")
    return seconds, result.stdout


def refuse_connections() -> None:
    """Make every attempt of this process to connect a socket fail."""

    def refuse(*_: Any) -> None:
        raise OSError("this process has no network")

    socket.socket.connect = socket.socket.connect_ex = refuse  # pyright: ignore[reportAttributeAccessIssue]


def load_family() -> None:
    """Load the included models, and print the seconds for each as JSON."""
    import open_clip
    import timm
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    from data.miniature import MINI_CLIP, MINI_DINO, MINI_SEGMENTER
    from delora_diffusers.families.loading import load_pipeline

    def load_clip() -> None:
        open_clip.create_model_and_transforms(f"local-dir:{MINI_CLIP}")
        open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")

    def load_segmenter() -> None:
        AutoModelForSemanticSegmentation.from_pretrained(MINI_SEGMENTER)
        AutoImageProcessor.from_pretrained(MINI_SEGMENTER)

    for module in IMPORTED_WHEN_LOADING:
        importlib.import_module(module)
    seconds = {}
    for name, load in {
        "mini-sd": lambda: load_pipeline(None),
        "mini-clip": load_clip,
        "mini-dino": lambda: timm.create_model(f"local-dir:{MINI_DINO}", pretrained=True),
        "mini-segmenter": load_segmenter,
    }.items():
        start = time.perf_counter()
        load()
        seconds[name] = time.perf_counter() - start
    print(json.dumps(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each command; their median is reported")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    for run_number in range(options.runs + 1):  # run 0 only fills the disk cache
        with tempfile.TemporaryDirectory() as folder:
            seconds = {
                name: run(arguments, exit_code=1 if name == INVALID else 0)[0]
                for name, arguments in commands(Path(folder)).items()
            }
        models = json.loads(run(["-c", LOAD_FAMILY])[1])
        seconds |= {f"loading {name} without network": value for name, value in models.items()}
        seconds["loading all four"] = sum(models.values())
        if run_number:
            for name, value in seconds.items():
                times.setdefault(name, []).append(value)
    lines = ["| | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {statistics.median(values):.1f} |" for name, values in times.items()]
    versions = f"python {platform.python_version()}, {platform.platform()}"
    lines += ["", f"Median of {options.runs} fresh processes; {versions}."]
    print_and_save("\n".join(lines), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
