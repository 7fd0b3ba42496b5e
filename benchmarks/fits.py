"""Does training fit a GPU's memory? Each line runs the real commands, from photos to one generated image, under a cap.

    python -m benchmarks.fits [--only 1 SDXL] [--jobs 1] [--output table.md]
    python -m benchmarks.fits --rehearse         # the same commands on tiny models and without a cap; also on a CPU

The models have the shapes of Stable Diffusion 1.5 and XL and random weights (9 GB, written to --work_dir once). Each
command runs in a process of its own, which may reserve the memory named in the table less 0.5 GiB for the CUDA context
and the libraries' kernels. Every line trains on batches of 1 for 10 steps, saves the adapter and generates an image.

The process is started as

    python -m benchmarks.fits --run CAP_GIB REPORT.json SCRIPT_OR_MODULE [ARGUMENT ...]

which limits PyTorch's allocator by ``torch.cuda.set_per_process_memory_fraction``, runs the script or module as
``python`` would, and writes peak memory, seconds per step and the error, if there is one, to the report. The cap
concerns the allocator only: ``torch.cuda.mem_get_info`` still shows the memory of the whole GPU. A command that wants
to know what is free under the cap must ask ``torch.cuda.get_per_process_memory_fraction``.
"""

import argparse
import dataclasses
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.reporting import print_and_save
from benchmarks.true_shapes import write_photos
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.names import WEIGHTS_NAME

TOP = Path(__file__).resolve().parent.parent
TRAIN, GENERATE = (str(TOP / "train_dreambooth_delora.py"),), ("delora_diffusers", "generate")
CONTEXT_GIB = 0.5
"""What a process needs beside PyTorch's allocator: the CUDA context and the kernels of the libraries."""
CHECKPOINTING = "--gradient_checkpointing"
TINY_KINDS = {"sd15": "sd1", "sdxl": "sdxl"}
RESOLUTIONS = {"sd15": 512, "sdxl": 1024}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        title: model and settings. memory: of the GPU, in GB. model: ``"sd15"`` or ``"sdxl"``.
        training: arguments of training, one string each, with ``=`` before a value.
        shared: arguments of training and of ``generate``, as far as ``generate`` has them.
    """

    title: str
    memory: float
    model: str
    training: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    precision: str = "bf16"


EVERYTHING = (
    "--train_text_encoder",
    "--with_prior_preservation",
    "--class_prompt=a photo of a toy",
    "--num_class_images=4",
    "--validation_prompt=a photo of sks toy on the beach",
    "--num_validation_images=1",
    "--validation_inference_steps=4",
)
LINES = (
    Line("SD 1.5, bf16", 4, "sd15"),
    Line("SD 1.5, fp16", 4, "sd15", precision="fp16"),
    Line("SD 1.5, bf16, text encoder, prior preservation, validation", 6, "sd15", EVERYTHING),
    Line("SDXL, bf16, checkpointing", 8, "sdxl", (CHECKPOINTING,)),
    Line("SDXL, nf4, checkpointing", 6, "sdxl", (CHECKPOINTING,), ("--base_precision=nf4",)),
    Line("SDXL, bf16, CUDA graph", 16, "sdxl"),
    Line("SDXL, bf16, offload, checkpointing", 6, "sdxl", (CHECKPOINTING,), ("--offload",)),
    Line("SDXL, int8, checkpointing", 8, "sdxl", (CHECKPOINTING,), ("--base_precision=int8",)),
    Line("SD 1.5, fp16, checkpointing", 4, "sd15", (CHECKPOINTING,), precision="fp16"),
)


class StepClock:
    """The time between this process's optimizer steps, measured so that nothing waits for the GPU between them."""

    def __init__(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.cuda = torch.cuda.is_available()
        self.marks: list[Any] = []
        register_optimizer_step_post_hook(self.mark)

    def mark(self, *_: Any) -> None:
        import torch

        if not self.cuda:
            self.marks.append(time.perf_counter())
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)

    def seconds(self) -> float | None:
        """Median seconds of a step in the second half of training, which is after the warm-up."""
        import torch

        pairs = list(zip(self.marks, self.marks[1:]))
        if not pairs:
            return None
        if self.cuda:
            torch.cuda.synchronize()
        times = [first.elapsed_time(second) / 1000 if self.cuda else second - first for first, second in pairs]
        return statistics.median(times[len(times) // 2 :])


def run_capped(cap_gib: float, report_file: Path, command: Sequence[str]) -> None:
    """Run a command in this process, with a cap on its GPU memory, and report what it used.

    Args:
        cap_gib: what PyTorch may reserve; 0 for no cap.
        report_file: gets a JSON object, also if the command fails.
        command: a file that ends in ``.py`` or the name of a module, and its arguments.
    """
    import torch

    report: dict[str, Any] = {"torch": torch.__version__, "device": "CPU", "error": None}
    cuda = torch.cuda.is_available()
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        report["device"] = properties.name
        if cap_gib:
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / properties.total_memory), 0)
    clock = StepClock()
    sys.argv = list(command)
    try:
        if command[0].endswith(".py"):
            runpy.run_path(command[0], run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        report["seconds_per_step"] = clock.seconds()
    except SystemExit as error:
        report["error"] = error.code if isinstance(error.code, str) else None
        raise
    except BaseException as error:
        report["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if cuda:
            report["reserved"] = torch.cuda.max_memory_reserved() / 2**30
            report["allocated"] = torch.cuda.max_memory_allocated() / 2**30
        report_file.write_text(json.dumps(report))


def run(command: Sequence[str], cap_gib: float, log: Path, timeout: float) -> dict[str, Any]:
    """The report of a command in a process of its own; ``error`` is the sentence with which it failed, or None.

    Args:
        log: gets the output; the report is written beside it.
    """
    report_file = log.with_suffix(".json")
    report_file.unlink(missing_ok=True)
    runner = [sys.executable, "-m", "benchmarks.fits", "--run", str(cap_gib), str(report_file)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code: int | str
    with log.open("w") as stream:
        try:
            output: Any = {"stdout": stream, "stderr": subprocess.STDOUT}
            code = subprocess.run([*runner, *command], cwd=TOP, env=environment, timeout=timeout, **output).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {timeout:.0f} s"
    report: dict[str, Any] = {"error": None}
    if report_file.exists():
        report |= json.loads(report_file.read_text())
    if code != 0 and not report["error"]:  # argparse prints its message itself, and a killed process writes no report
        lines = [line for line in log.read_text().splitlines() if line.strip()] or ["no output"]
        report["error"] = f"{lines[-1]} ({code if isinstance(code, str) else f'exit code {code}'})"
    report["error"] = report["error"] and " ".join(report["error"].split())
    return report


@dataclasses.dataclass(frozen=True)
class Trial:
    """How the lines are run.

    Attributes:
        work_dir: contains the models and the photos. flags: of training and of generate, as ``--help`` names them.
    """

    work_dir: Path
    rehearse: bool
    timeout: float
    flags: dict[tuple[str, ...], str]

    def arguments(self, line: Line, command: tuple[str, ...]) -> list[str]:
        """The line's own arguments of a command. A rehearsal and generate leave out those that it does not have."""
        given = [*line.shared, *(line.training if command == TRAIN else ())]
        if command == TRAIN and not self.rehearse:
            return given
        known = [argument for argument in given if f"{argument.split('=')[0]} " in self.flags[command]]
        for argument in given:
            if argument not in known:
                print(f"note: {line.title}: {Path(command[-1]).name} has no {argument}", flush=True)
        return known

    def run(self, number: int, line: Line) -> dict[str, Any]:
        """Train, then generate an image; returns the reports of both and the seconds in all."""
        model = self.work_dir / (f"tiny-{line.model}" if self.rehearse else line.model)
        out = self.work_dir / "outputs" / f"line-{number}"
        shutil.rmtree(out, ignore_errors=True)
        logs = self.work_dir / "logs"
        cap = 0.0 if self.rehearse else line.memory - CONTEXT_GIB
        precision = "no" if self.rehearse and line.precision == "fp16" else line.precision  # a CPU has no fp16
        training = [
            *(*TRAIN, f"--pretrained_model_name_or_path={model}", "--instance_prompt=a photo of sks toy"),
            *(f"--instance_data_dir={photo_folder(self.work_dir, self.rehearse)}", f"--output_dir={out}"),
            *(f"--resolution={64 if self.rehearse else RESOLUTIONS[line.model]}", "--train_batch_size=1"),
            *("--max_train_steps=10", "--checkpointing_steps=10", "--report_to=none"),
            *(f"--mixed_precision={precision}", *self.arguments(line, TRAIN)),
        ]
        generating = [
            *(*GENERATE, f"--adapter={out}", "--prompt=a photo of sks toy in the snow"),
            *("--num_images=1", "--num_inference_steps=4", f"--mixed_precision={precision}"),
            *(f"--output_dir={out / 'images'}", *self.arguments(line, GENERATE)),
        ]
        start = time.perf_counter()
        reports = {"training": run(training, cap, logs / f"line-{number}-training.log", self.timeout)}
        if not reports["training"]["error"]:
            if not (out / WEIGHTS_NAME).is_file():
                reports["training"]["error"] = f"{out / WEIGHTS_NAME} was not written"
            else:
                log = logs / f"line-{number}-generating.log"
                reports["generating"] = run(generating, cap, log, self.timeout)
                if not reports["generating"]["error"] and not list((out / "images").glob("[0-9]*.png")):
                    reports["generating"]["error"] = f"no image was written to {out / 'images'}"
        return {**reports, "seconds": time.perf_counter() - start}


def photo_folder(work_dir: Path, rehearse: bool) -> Path:
    return work_dir / ("tiny-photos" if rehearse else "photos")


def write_inputs(work_dir: Path, models: set[str], rehearse: bool) -> None:
    """Write the models and the photos, unless they exist. The models come from other processes, which free the GPU."""
    (work_dir / "logs").mkdir(parents=True, exist_ok=True)
    photos = photo_folder(work_dir, rehearse)
    write_photos(photos, 3 if rehearse else 12, (120, 90) if rehearse else (1600, 1200))
    python = [sys.executable, "-m"]
    if rehearse:
        missing = [model for model in sorted(models) if not (work_dir / f"tiny-{model}").exists()]
        for model in missing:
            command = ["data.tiny_sd", str(work_dir / f"tiny-{model}"), "--kind", TINY_KINDS[model]]
            subprocess.run([*python, *command], cwd=TOP, check=True)
    elif not all((work_dir / model).exists() for model in models):
        command = [*python, "benchmarks.true_shapes", str(work_dir), *sorted(models)]
        subprocess.run(command, cwd=TOP, check=True)


def help_text(command: tuple[str, ...]) -> str:
    start = [sys.executable] if command == TRAIN else [sys.executable, "-m"]
    result = subprocess.run([*start, *command, "--help"], cwd=TOP, check=True, capture_output=True, text=True)
    return " ".join(result.stdout.replace("]", " ]").replace(",", " ,").split())


HEAD = (
    "| | line | memory | cap | fits | training, GiB: reserved / allocated | generating, GiB: reserved / allocated | "
    "s per step | s in all |\n| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
)


def row(number: int, line: Line, result: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    errors = [f"{part}: {result[part]['error']}" for part in ("training", "generating") if error_in(result, part)]
    verdict = "no; " + errors[0].replace("|", "/") if errors else "yes"
    seconds = result["training"].get("seconds_per_step")
    step = "" if seconds is None else f"{seconds:.3f}"
    peaks = " | ".join(memory(result.get(part, {})) for part in ("training", "generating"))
    sizes = f"{line.memory:g} GB | {line.memory - CONTEXT_GIB:.1f} GiB"
    return f"| {number} | {line.title} | {sizes} | {verdict} | {peaks} | {step} | {result['seconds']:.0f} |"


def error_in(result: dict[str, Any], part: str) -> bool:
    return bool(result.get(part, {}).get("error"))


def memory(report: dict[str, Any]) -> str:
    """Peak reserved and allocated GiB of a process; empty without a GPU."""
    return f"{report['reserved']:.2f} / {report['allocated']:.2f}" if "reserved" in report else ""


def chosen(only: Sequence[str] | None) -> list[tuple[int, Line]]:
    """The lines with these numbers or with one of these texts in the title."""
    numbered = list(enumerate(LINES, 1))
    if not only:
        return numbered
    numbers = {int(text) for text in only if text.isdecimal()}
    texts = [text.lower() for text in only if not text.isdecimal()]
    return [(n, line) for n, line in numbered if n in numbers or any(text in line.title.lower() for text in texts)]


def measure(lines: Sequence[tuple[int, Line]], jobs: int, run_line: Callable[..., dict[str, Any]]) -> list[Any]:
    """Run the lines, ``jobs`` at a time, and print each when it is finished; returns the results in order."""

    def run_and_print(numbered: tuple[int, Line]) -> dict[str, Any]:
        result = run_line(*numbered)
        print(row(*numbered, result), flush=True)
        return result

    with ThreadPoolExecutor(jobs) as executor:
        return list(executor.map(run_and_print, lines))


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        return run_capped(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="LINE", help="run only these lines: numbers or parts of titles")
    parser.add_argument("--memory", type=float, help="GB of memory to try instead of the lines' own")
    parser.add_argument(
        "--jobs", type=int, default=3, help="lines at a time; give 1 for undisturbed times of steps; default: 3"
    )
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each command; default: 240")
    parser.add_argument("--rehearse", action="store_true", help="use tiny models, no cap and only flags that exist")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/fits"), help="models, outputs and logs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = chosen(options.only)
    if not lines:
        parser.error(f"no line has the number or the text {' or '.join(options.only)}")
    if options.memory:
        lines = [(number, dataclasses.replace(line, memory=options.memory)) for number, line in lines]
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: there is no GPU; pass --rehearse to try the commands on tiny models.")
    start = time.perf_counter()
    work_dir = options.work_dir.resolve()
    write_inputs(work_dir, {line.model for _, line in lines}, options.rehearse)
    flags = {command: help_text(command) for command in (TRAIN, GENERATE)}
    trial = Trial(work_dir, options.rehearse, options.timeout, flags)
    print(f"inputs: {time.perf_counter() - start:.0f} s\n{HEAD}", flush=True)
    results = measure(lines, options.jobs, trial.run)
    rows = [row(number, line, result) for (number, line), result in zip(lines, results)]
    ran_on = results[0]["training"]
    end = (
        f"{ran_on.get('device', '')}, torch {ran_on.get('torch', '')}; {options.jobs} lines at a time, "
        f"{time.perf_counter() - start:.0f} s in all."
    )
    print_and_save("\n".join(["", HEAD, *rows, "", end]), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
