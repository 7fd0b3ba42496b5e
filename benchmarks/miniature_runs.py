"""What the benchmarks on the miniature share: training and generating in this process, and a pool of such runs."""

import argparse
import functools
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

IDENTIFIER = "sks"
PROMPT_PLACES = ("on the beach", "in the snow", "in the jungle", "on a wooden floor", "at night", "in a meadow")
IMAGES_PER_PROMPT = 2
GENERATION: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 4.0, "batch_size": 12}


def flags(values: dict[str, Any]) -> list[str]:
    """Command line flags from values by name: ``{"rank": 4, "offload": True}`` gives ``--rank 4 --offload``."""
    arguments = []
    for name, value in values.items():
        values_of_flag = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values_of_flag)]
    return arguments


def toy_number(text: str) -> int:
    """The number of an unseen toy, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative; toys have numbers from 0 on")
    return number


def prepare(folder: Path, *outputs: str) -> None:
    """Make a run's folder and remove these outputs of an interrupted run, which starts from scratch."""
    for output in outputs:
        shutil.rmtree(folder / output, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def train(values: dict[str, Any]) -> None:
    """Train on a subject in this process, with these flags."""
    from accelerate.state import AcceleratorState

    import train_dreambooth_delora

    AcceleratorState._reset_state(reset_partial_state=True)
    train_dreambooth_delora.main(flags({"report_to": "none", **values}))


def generate(values: dict[str, Any]) -> None:
    """Generate images in this process, with these flags in addition to ``GENERATION``."""
    from accelerate.state import AcceleratorState

    from delora_diffusers.__main__ import main as library

    AcceleratorState._reset_state(reset_partial_state=True)
    library(["generate", *flags(GENERATION | values)])


@functools.cache
def toybox_encoders() -> Any:
    """The miniature DINO and CLIP, loaded once per process."""
    from eval.metrics.encoders import device_of, load_encoders
    from eval.metrics.protocols import PROTOCOLS

    return load_encoders(PROTOCOLS["toybox"], None, None, device_of(None), "fp32")


def score(images: Path, references: Path) -> dict[str, Any]:
    """The scores of generated images against the photos of a folder, as ``eval dreambooth --protocol toybox``."""
    from data.photographs import find_photographs
    from eval.metrics.generated import read_generated
    from eval.metrics.protocols import IDENTIFIERS, PROTOCOLS
    from eval.metrics.subjects import score_subject

    photos = [photo.path for photo in find_photographs(references)]
    encoders, protocol = toybox_encoders(), PROTOCOLS["toybox"]
    return score_subject(read_generated(images), photos, protocol, encoders, IDENTIFIERS, batch_size=32)


def run_all(
    run: Callable[[Any], dict[str, Any]], tasks: Sequence[Any], workers: int, per_process: int | None = 8
) -> Iterator[dict[str, Any]]:
    """Results of the tasks as they finish, without those that failed, whose errors are printed.

    Args:
        run: a function of a module. tasks: the first item of each is its folder.
        workers: processes; they share the GPU, or are spread over those that are visible.
        per_process: tasks after which a process is replaced.
    """
    import torch

    context, gpus = multiprocessing.get_context("spawn"), torch.cuda.device_count()
    with context.Pool(min(workers, len(tasks)), _use_gpu, (gpus,), maxtasksperchild=per_process) as pool:
        for result in pool.imap_unordered(functools.partial(_run_or_report, run), tasks, chunksize=1):
            if result is not None:
                yield result


def _use_gpu(count: int) -> None:
    """Let a process of the pool see one of several GPUs; they take turns. Runs before the process imports torch."""
    if count > 1:
        number = multiprocessing.current_process()._identity[-1] - 1
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(number, count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_of(number: int, count: int, visible: str | None) -> str:
    """The GPU of process ``number`` of a pool, as CUDA_VISIBLE_DEVICES names it.

    Args:
        count: of GPUs. visible: those that the pool may use, separated by commas; None for all.
    """
    return visible.split(",")[number % count].strip() if visible else str(number % count)


def _run_or_report(run: Callable[[Any], dict[str, Any]], task: Any) -> dict[str, Any] | None:
    import torch

    torch.set_num_threads(1)
    try:
        return run(task)
    except BaseException as error:
        print(f"{task[0]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
