"""Training, drawing and the benchmark on N GPUs of one host against one of them: the same results, and how much faster.

    python -m benchmarks.several_gpus OUT_DIR [--processes 2] [--parts step train generate benchmark]

- step: a training step at Stable Diffusion 1.5's shape, recorded as a CUDA graph, by one process while the others wait
  and by all; median of many between CUDA events. The exchanges of a step are counted by the profiler.
- train: ``accelerate launch`` with N processes against one with ``--gradient_accumulation_steps N``, how far apart the
  adapters end as a share of the way they went, beside two runs of the very same command.
- generate: the same command by N processes and by one: files compared byte by byte, seconds.
- benchmark: ``eval benchmark`` on toys with ``--deterministic`` trainings, adapters and pictures compared byte by byte.
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

BATCH_SIZES = (1, 4, 16)
PARTS = ("step", "train", "generate", "benchmark")


def launch(processes: int, *typed: object) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] if processes > 1 else [] if torch.cuda.is_available() else ["--cpu"]
    return [*command, *map(str, typed)]


def run(log: Path, command: list[str]) -> float:
    """Seconds that a command takes."""
    begun = time.perf_counter()
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"error: {' '.join(command)} failed with {code}; see {log}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - begun


def timed_step() -> None:
    """By every process of a launch; the first one prints JSON."""
    import gc

    from accelerate import Accelerator

    accelerator, found = Accelerator(), {}
    for batch_size in BATCH_SIZES:
        found[batch_size] = time_one(accelerator, batch_size)
        gc.collect()
        torch.cuda.empty_cache()
    if accelerator.is_main_process:
        print("STEP " + json.dumps(found))
    accelerator.end_training()


def time_one(accelerator: Any, batch_size: int, rounds: int = 3, steps: int = 16) -> dict[str, float]:
    """Median milliseconds of a step on this GPU while the others wait, and on all; exchanges of a step."""
    from benchmarks.train_step import Trial, ours
    from delora_diffusers.methods.config import UNET_TARGETS
    from delora_diffusers.training import gradients

    trial = Trial(ours(method="delora"), UNET_TARGETS, batch_size, str(accelerator.device), record=True)
    assert trial.optimizer is not None and trial.recorded is not None

    def step(together: bool) -> None:
        trial.recorded(trial.batch)  # pyright: ignore[reportOptionalCall]
        if together:
            gradients.average(accelerator, trial.parameters)
        gradients.clip(accelerator, trial.parameters, 1.0, 1)
        trial.optimizer.step()  # pyright: ignore[reportOptionalMemberAccess]
        trial.optimizer.zero_grad(set_to_none=False)  # pyright: ignore[reportOptionalMemberAccess]

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
    found: dict[str, float] = {"exchanges": exchanges, "together": statistics.median(times[True])}
    return found | ({"alone": statistics.median(times[False])} if times[False] else {})


def measure_step(out_dir: Path, processes: int) -> list[str]:
    log = out_dir / "step.log"
    run(log, launch(processes, "-m", "benchmarks.several_gpus", out_dir, "--timed_step"))
    found = json.loads(log.read_text().rsplit("STEP ", 1)[1].splitlines()[0])
    head = f"images/s on 1 | images/s on {processes} | efficiency | ms on 1 | ms on {processes} | exchanges a step"
    lines = [f"| batch on each GPU | {head} |", f"| ---: |{' ---: |' * 6}"]
    for batch_size, one in found.items():
        alone, together = (1000 * int(batch_size) / one[key] for key in ("alone", "together"))
        together *= processes
        cells = [f"{alone:.1f}", f"{together:.1f}", f"{together / alone / processes:.3f}"]
        cells += [f"{one['alone']:.2f}", f"{one['together']:.2f}", f"{one['exchanges']}"]
        lines.append(f"| {batch_size} | {' | '.join(cells)} |")
    return lines


def training(model: Path, photographs: Path, output_dir: Path, *more: object) -> list[object]:
    found: list[object] = ["train_dreambooth_delora.py", "--pretrained_model_name_or_path", model]
    found += ["--instance_data_dir", photographs, "--instance_prompt", "a photo of sks dog", "--report_to", "none"]
    return [*found, "--output_dir", output_dir, "--mixed_precision", "bf16", "--train_batch_size", 4, *more]


def measure_training(out_dir: Path, model: Path, photographs: Path, processes: int, steps: int) -> list[str]:
    from safetensors.torch import load_file

    def trained(name: str, count: int, *more: object) -> tuple[dict[str, torch.Tensor], float]:
        command = launch(count, *training(model, photographs, out_dir / name, "--max_train_steps", steps, *more))
        seconds = run(out_dir / f"{name}.log", command)
        return load_file(next((out_dir / name).glob("*.safetensors"))), seconds

    accumulating = ("--gradient_accumulation_steps", processes)
    several, fast = trained("train-several", processes)
    one, slow = trained("train-one", 1, *accumulating)
    again, _ = trained("train-again", 1, *accumulating)
    starts = {key: one[f"{key}0"] for key in one if key.endswith(("delora_A", "delora_B"))}

    def length(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(a[key] - b[key]).norm() for key in starts]).norm())

    way = length(one, starts)
    shares = [length(several, one) / way, length(again, one) / way]
    return [
        f"{processes} processes and 1 with {processes} accumulated micro-batches, {steps} steps of batch 4, bf16:",
        f"apart by {shares[0]:.4f} of the way gone; two runs of the latter by {shares[1]:.4f}. Seconds, command to "
        f"file: {fast:.0f} and {slow:.0f}.",
    ]


def same_files(one: Path, other: Path, pattern: str) -> str:
    names = sorted(str(path.relative_to(one)) for path in one.glob(pattern))
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    return f"{len(names) - len(different)} of {len(names)} the same bytes"


def measure_generation(out_dir: Path, model: Path, processes: int, pictures: int) -> list[str]:
    adapter = next(out_dir.glob("train-one/*.safetensors")).parent
    base = [
        "-m",
        "delora_diffusers",
        "generate",
        "--adapter",
        adapter,
        "--prompt",
        "a sks dog",
        "a sks dog in the snow",
    ]
    base += ["--num_inference_steps", 25, "--batch_size", 4, "--output_dir"]
    seconds = {}
    for count in (1, processes):
        for name, images in (("few", 2 * processes), ("many", pictures // 2)):
            place = out_dir / f"generate-{count}-{name}"
            command = launch(count, *base, place, "--num_images", images)
            seconds[count, name] = run(out_dir / f"{place.name}.log", command)
    compared = same_files(out_dir / "generate-1-many", out_dir / f"generate-{processes}-many", "*[!t].*")
    drawn = pictures - 4 * processes
    rates = {count: drawn / (seconds[count, "many"] - seconds[count, "few"]) for count in (1, processes)}
    return [
        f"{pictures} pictures of 512 pixels, 25 steps, batch 4: {compared}; seconds, command to end: "
        f"{seconds[1, 'many']:.1f} on 1, {seconds[processes, 'many']:.1f} on {processes}; less what {4 * processes} "
        f"pictures take, {rates[1]:.2f} and {rates[processes]:.2f} pictures a second "
        f"({rates[processes] / rates[1]:.2f} times).",
    ]


def measure_benchmark(out_dir: Path, processes: int) -> list[str]:
    base: list[object] = ["-m", "eval", "benchmark", "toybox", "--subjects", "car", "robot"]
    base += ["--train", "max_train_steps=60", "deterministic", "mixed_precision=bf16"]
    base += ["--generate", "num_inference_steps=10", "mixed_precision=bf16", "batch_size=16", "--output_dir"]
    seconds = {}
    for count in (1, processes):
        place = out_dir / f"benchmark-{count}"
        seconds[count] = run(out_dir / f"{place.name}.log", launch(count, *base, place))
    one, other = (out_dir / f"benchmark-{count}" for count in (1, processes))
    adapters = same_files(one, other, "seed-0/*/adapter/*.safetensors")
    drawn = same_files(one, other, "seed-0/*/pictures/0*.png")
    table = same_files(one, other, "subjects.csv")
    return [
        f"Two toys, 60 steps: adapters {adapters}, pictures {drawn}, table {table}; seconds {seconds[1]:.0f} on 1, "
        f"{seconds[processes]:.0f} on {processes}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=40, help="of the trainings compared")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--shape", choices=("sd15", "tiny"), default="sd15")
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

        model, photographs = write_inputs(options.out_dir, options.shape)
    for part in options.parts:
        if part == "step":
            found = measure_step(options.out_dir, options.processes)
        elif part == "train":
            found = measure_training(options.out_dir, model, photographs, options.processes, options.steps)
        elif part == "generate":
            found = measure_generation(options.out_dir, model, options.processes, options.pictures)
        else:
            found = measure_benchmark(options.out_dir, options.processes)
        print("\n".join(["", *found]), flush=True)
        lines += ["", *found]
    (options.out_dir / "several_gpus.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
