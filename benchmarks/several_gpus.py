"""Training, generating and a benchmark on N GPUs of one host against one: whether results agree, and the speed-up.

    python -m benchmarks.several_gpus OUT_DIR [--processes 2] [--parts step train generate benchmark]

- step: a training step at Stable Diffusion 1.5's shape, replayed from a CUDA graph, in one process while the others
  wait, and in all of them; medians of many steps between CUDA events. The profiler counts the exchanges per step.
- train: ``accelerate launch`` with N processes against one with ``--gradient_accumulation_steps N``. Reports how far
  the adapters differ relative to the distance trained, and the same for two runs of one command.
- generate: the same command with N processes and with one; compares the files byte by byte, and the time.
- benchmark: ``eval benchmark`` on toys with ``--deterministic`` training; compares adapters and images byte by byte.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from delora_diffusers.dispatch import exit_on_bad_input

BATCH_SIZES = (1, 4, 16)
PARTS = ("step", "train", "generate", "benchmark")


def launch(processes: int, *arguments: object) -> list[str]:
    """The command that launches a script with this number of processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] if processes > 1 else [] if torch.cuda.is_available() else ["--cpu"]
    return [*command, *map(str, arguments)]


def run(log: Path, command: list[str]) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(
            f"error: {' '.join(command)} failed with exit code {code}; see {log}:\n{log.read_text()[-3000:]}"
        )
    return time.perf_counter() - start


def timed_step() -> None:
    """Time steps in every launched process; the main process prints the results as JSON."""
    import gc

    from accelerate import Accelerator

    accelerator, results = Accelerator(), {}
    for batch_size in BATCH_SIZES:
        results[batch_size] = time_batch_size(accelerator, batch_size)
        gc.collect()
        torch.cuda.empty_cache()
    if accelerator.is_main_process:
        print("STEP " + json.dumps(results))
    accelerator.end_training()


def time_batch_size(accelerator: Any, batch_size: int, rounds: int = 3, steps: int = 16) -> dict[str, float]:
    """Median time of a step in ms, on this GPU while the others wait and on all GPUs; and the exchanges per step."""
    from benchmarks.train_step import Trial, ours
    from delora_diffusers.methods.config import UNET_TARGETS
    from delora_diffusers.training.gradients import average_gradients, clip_gradients

    trial = Trial(ours(method="delora"), UNET_TARGETS, batch_size, str(accelerator.device), cuda_graph=True)
    optimizer, micro_batches = trial.optimizer, trial.micro_batches
    assert optimizer is not None and micro_batches is not None

    def step(together: bool) -> None:
        micro_batches(trial.batch)
        if together:
            average_gradients(accelerator, trial.parameters)
        clip_gradients(accelerator, trial.parameters, 1.0, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(6):
        step(True)
    for _ in range(rounds):
        for together in (False, True):
            accelerator.wait_for_everyone()
            if together or accelerator.is_main_process:
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
                for mark in marks:
                    step(together)
                    mark.record()
                torch.cuda.synchronize()
                times[together] += [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
            accelerator.wait_for_everyone()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(True)
        torch.cuda.synchronize()
    exchanges = sum(e.count for e in profile.key_averages() if "nccl" in e.key.lower() and "reduce" in e.key.lower())
    result: dict[str, float] = {"exchanges": exchanges, "together": statistics.median(times[True])}
    return result | ({"alone": statistics.median(times[False])} if times[False] else {})


def measure_step(out_dir: Path, processes: int) -> list[str]:
    """A table with a row per batch size."""
    log = out_dir / "step.log"
    run(log, launch(processes, "-m", "benchmarks.several_gpus", out_dir, "--timed_step"))
    results = json.loads(log.read_text().rsplit("STEP ", 1)[1].splitlines()[0])
    head = f"images/s on 1 | images/s on {processes} | efficiency | ms on 1 | ms on {processes} | exchanges per step"
    lines = [f"| batch per GPU | {head} |", f"| ---: |{' ---: |' * 6}"]
    for batch_size, result in results.items():
        alone, together = (1000 * int(batch_size) / result[key] for key in ("alone", "together"))
        together *= processes
        cells = [f"{alone:.1f}", f"{together:.1f}", f"{together / alone / processes:.3f}"]
        cells += [f"{result['alone']:.2f}", f"{result['together']:.2f}", f"{result['exchanges']}"]
        lines.append(f"| {batch_size} | {' | '.join(cells)} |")
    return lines


def training(model: Path, photos: Path, output_dir: Path, *flags: object) -> list[object]:
    """The training script and its arguments."""
    arguments: list[object] = ["train_dreambooth_delora.py", "--pretrained_model_name_or_path", model]
    arguments += ["--instance_data_dir", photos, "--instance_prompt", "a photo of sks dog", "--report_to", "none"]
    return [*arguments, "--output_dir", output_dir, "--mixed_precision", "bf16", "--train_batch_size", 4, *flags]


def measure_training(out_dir: Path, model: Path, photos: Path, processes: int, steps: int) -> list[str]:
    """How far the adapters of N processes and of one differ, and the time of both."""
    from safetensors.torch import load_file

    def train(name: str, count: int, *flags: object) -> tuple[dict[str, torch.Tensor], float]:
        command = launch(count, *training(model, photos, out_dir / name, "--max_train_steps", steps, *flags))
        seconds = run(out_dir / f"{name}.log", command)
        return load_file(next((out_dir / name).glob("*.safetensors"))), seconds

    accumulation = ("--gradient_accumulation_steps", processes)
    several, seconds_several = train("train-several", processes)
    single, seconds_single = train("train-one", 1, *accumulation)
    repeated, _ = train("train-again", 1, *accumulation)
    starts = {key: single[f"{key}0"] for key in single if key.endswith(("delora_A", "delora_B"))}

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(a[key] - b[key]).norm() for key in starts]).norm())

    trained = distance(single, starts)
    return [
        f"{processes} processes against 1 with {processes} accumulated micro-batches, {steps} steps of batch 4, bf16: "
        f"the adapters differ by {distance(several, single) / trained:.4f} of the distance trained; those of two runs "
        f"of the latter by {distance(repeated, single) / trained:.4f}. Seconds, command to file: "
        f"{seconds_several:.0f} and {seconds_single:.0f}."
    ]


def compare_files(folder: Path, other: Path, pattern: str) -> str:
    """How many files of a folder have the same bytes in the other folder."""
    names = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
    identical = [name for name in names if (folder / name).read_bytes() == (other / name).read_bytes()]
    return f"{len(identical)} of {len(names)} identical"


def measure_generation(out_dir: Path, processes: int, images: int) -> list[str]:
    """Whether N processes and one generate the same files, and the images per second of both."""
    adapter = next(out_dir.glob("train-one/*.safetensors")).parent
    base: list[object] = ["-m", "delora_diffusers", "generate", "--adapter", adapter]
    base += ["--prompt", "a sks dog", "a sks dog in the snow"]
    base += ["--num_inference_steps", 25, "--batch_size", 4, "--output_dir"]
    few = 4 * processes
    seconds = {}
    for count in (1, processes):
        for name, total in (("few", few), ("many", images)):
            folder = out_dir / f"generate-{count}-{name}"
            command = launch(count, *base, folder, "--num_images", total // 2)
            seconds[count, name] = run(out_dir / f"{folder.name}.log", command)
    files = compare_files(out_dir / "generate-1-many", out_dir / f"generate-{processes}-many", "*[!t].*")
    rates = {count: (images - few) / (seconds[count, "many"] - seconds[count, "few"]) for count in (1, processes)}
    return [
        f"{images} images of 512 pixels, 25 steps, batch 4: {files}. Seconds from start to end: "
        f"{seconds[1, 'many']:.1f} on 1, {seconds[processes, 'many']:.1f} on {processes}. Without the time that {few} "
        f"images take: {rates[1]:.2f} and {rates[processes]:.2f} images per second, a factor of "
        f"{rates[processes] / rates[1]:.2f}."
    ]


def measure_benchmark(out_dir: Path, processes: int) -> list[str]:
    """Whether a benchmark with N processes and with one writes the same files, and the time of both."""
    base: list[object] = ["-m", "eval", "benchmark", "toybox", "--subjects", "car", "robot"]
    base += ["--train", "max_train_steps=60", "deterministic", "mixed_precision=bf16"]
    base += ["--generate", "num_inference_steps=10", "mixed_precision=bf16", "batch_size=16", "--output_dir"]
    folders = {count: out_dir / f"benchmark-{count}" for count in (1, processes)}
    seconds = {
        count: run(out_dir / f"{folder.name}.log", launch(count, *base, folder)) for count, folder in folders.items()
    }
    adapters, images, table = (
        compare_files(folders[1], folders[processes], pattern)
        for pattern in ("seed-0/*/adapter/*.safetensors", "seed-0/*/pictures/0*.png", "subjects.csv")
    )
    return [
        f"Two toys, 60 steps: adapters {adapters}, images {images}, tables {table}; seconds {seconds[1]:.0f} on 1, "
        f"{seconds[processes]:.0f} on {processes}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--processes", type=int, default=2, help="number of GPUs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="generate needs the output of train")
    parser.add_argument("--steps", type=int, default=40, help="training steps of the part train")
    parser.add_argument("--pictures", type=int, default=48, help="images of the part generate")
    parser.add_argument("--shape", choices=("sd15", "tiny"), default="sd15", help="shape of the base model")
    parser.add_argument("--timed_step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timed_step:
        timed_step()
        return
    options.out_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [f"{options.processes} x {device}, torch {torch.__version__}."]
    if "train" in options.parts or "generate" in options.parts:
        from benchmarks.end_to_end import write_inputs

        model, photos = write_inputs(options.out_dir, options.shape)
    for part in options.parts:
        if part == "step":
            results = measure_step(options.out_dir, options.processes)
        elif part == "train":
            results = measure_training(options.out_dir, model, photos, options.processes, options.steps)
        elif part == "generate":
            results = measure_generation(options.out_dir, options.processes, options.pictures)
        else:
            results = measure_benchmark(options.out_dir, options.processes)
        print("\n".join(["", *results]), flush=True)
        lines += ["", *results]
    (options.out_dir / "several_gpus.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
