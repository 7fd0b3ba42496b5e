"""Train and draw the subjects of a benchmark: commands run as a user would type them, each only where its result is not
there and whole.

Where there is no GPU they are forked from one process that has imported what takes seconds to import; CUDA does not
survive a fork, so with a GPU each command is a fresh process.
"""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from eval.writing import write_text

ROOT = Path(__file__).parent.parent
TRAINING_SCRIPT = ROOT / "train_dreambooth_delora.py"
WEIGHTS_NAME = "pytorch_delora_weights.safetensors"

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")
"""What accelerate launch tells its processes, and a subject's own commands must not hear."""


class Made(Protocol):
    """What a task makes in a folder of its own."""

    @property
    def place(self) -> Path: ...

    def is_done(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Item:
    """One subject and seed: its adapter goes into ``place/adapter``, its pictures into ``place/pictures``.

    Attributes:
        own: the flags of its training that are its own; None for pictures of the base model.
        prompts: what is drawn. seed: of the pictures.
    """

    place: Path
    own: Mapping[str, object] | None
    prompts: Sequence[str]
    seed: int

    @property
    def adapter(self) -> Path | None:
        return None if self.own is None else self.place / "adapter"

    def is_trained(self) -> bool:
        return self.adapter is None or (self.adapter / WEIGHTS_NAME).is_file()

    def is_done(self) -> bool:
        return self.is_trained() and pictures_are_whole(self.place / "pictures", self.prompts)


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, which is made when its turn comes (None: there is nothing to do it with), and whether it is done."""

    command: Callable[[], Sequence[str] | None]
    is_done: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Task:
    """What commands make of one item, or of several at once; what they print goes to ``folder/log.txt``."""

    folder: Path
    items: Sequence[Made]
    steps: Sequence[Step]

    def is_done(self) -> bool:
        return all(item.is_done() for item in self.items)


def flags(values: Mapping[str, object]) -> list[str]:
    """``{"rank": 4, "center_crop": True}`` as typed flags; None leaves one out."""
    typed: list[str] = []
    for name, value in values.items():
        if value is not None:
            typed += [f"--{name}", *([] if value is True else [str(value)])]
    return typed


def task(
    folder: Path,
    items: Sequence[Item],
    training: Mapping[str, object],
    drawing: Mapping[str, object],
    continues: Path | None = None,
) -> Task:
    """Train and draw one item, or several at once.

    Args:
        folder: of the log; with several items also of the checkpoints and of the files that list them.
        training, drawing: the flags that all items have in common.
        continues: the folder of a shorter training of the same items; where it left a checkpoint, that is gone on from.
    """
    several = len(items) > 1
    kept = "training" if several else "adapter"
    training = {"checkpoints_total_limit": 1, "report_to": "tensorboard", **training}

    def train() -> Sequence[str]:
        checkpoint = None if continues is None or _checkpoints(folder / kept) else _checkpoints(continues / kept)
        start = str(checkpoint[-1]) if checkpoint else "latest"
        command = [sys.executable, str(TRAINING_SCRIPT), *flags(training), "--resume_from_checkpoint", start]
        if not several:
            return [*command, *flags(items[0].own or {}), "--output_dir", str(items[0].adapter)]
        lines = [{**(item.own or {}), "output_dir": str(item.adapter)} for item in items]
        file = _write_lines(folder / "subjects.jsonl", lines)
        return [*command, "--subjects_file", file, "--output_dir", str(folder / kept)]

    def draw() -> Sequence[str] | None:
        command = [sys.executable, "-m", "delora_diffusers", "generate", *flags(drawing)]
        trained = [item for item in items if item.is_trained()]
        if not trained:
            return None
        if not several:
            (item,) = items
            own = {"adapter": item.adapter, "seed": item.seed, "output_dir": item.place / "pictures"}
            return [*command, *flags(own), "--prompt", *item.prompts]
        lines = [
            {"adapter": str(i.adapter), "prompts": i.prompts, "seed": i.seed, "output_dir": str(i.place / "pictures")}
            for i in trained
        ]
        return [*command, "--requests_file", _write_lines(folder / "requests.jsonl", lines)]

    steps = [Step(draw, lambda: all(item.is_done() for item in items))]
    if any(item.own is not None for item in items):
        steps.insert(0, Step(train, lambda: all(item.is_trained() for item in items)))
    return Task(folder, items, steps)


def in_order(tasks: Sequence[Task]) -> Task:
    """One task that does what these do, one after another; what they print goes to the last one's log."""
    items, steps = [item for task in tasks for item in task.items], [step for task in tasks for step in task.steps]
    return Task(tasks[-1].folder, items, steps)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _write_lines(file: Path, records: Sequence[Mapping[str, object]]) -> str:
    write_text(file, "".join(json.dumps(record, default=str) + "\n" for record in records))
    return str(file)


def pictures_are_whole(folder: Path, prompts: Sequence[str]) -> bool:
    """Whether the folder's ``metadata.jsonl`` has all prompts and every picture in it is there to its last byte."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return False
    found = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            with Image.open(folder / record["file_name"]) as image:
                image.verify()
            found.add(record["prompt"])
        except (OSError, SyntaxError, ValueError, KeyError, TypeError):
            return False
    return found >= set(prompts)


def run_tasks(
    tasks: Sequence[Task], jobs: int, environment: dict[str, str], show: bool, fork: bool = False
) -> dict[str, str]:
    """Run tasks, ``jobs`` at a time; one that fails does not stop the others.

    Args:
        environment: of the commands. show: a progress bar.
        fork: fork the commands from a warm process instead of starting each afresh.

    Returns:
        What went wrong, a sentence for each place of an item that is not done.
    """
    running: set[Any] = set()
    start = _forked if fork else _fresh

    def run(task: Task) -> str | None:
        task.folder.mkdir(parents=True, exist_ok=True)
        problem = None
        with lock(task.folder / ".lock") as held, (task.folder / "log.txt").open("ab") as log:
            for step in task.steps:
                command = None if step.is_done() else step.command()
                if command is None:
                    continue
                process, wait = start(command, log, environment, held)
                running.add(process)
                code = wait()
                running.discard(process)
                if problem is None and not step.is_done():
                    problem = f"{_last_line(task.folder / 'log.txt')} (exit {code}; {task.folder}/log.txt)"
        return problem

    failed = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        progress = tqdm(pool.map(run, tasks), total=len(tasks), desc="subjects", disable=None if show else True)
        for task, problem in zip(tasks, progress):
            if problem is not None:
                failed |= {str(item.place): problem for item in task.items if not item.is_done()}
                tqdm.write(f"{task.folder}: {problem}", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
    return failed


def run_on_all(accelerator: Any, tasks: Sequence[Task], jobs: int) -> dict[str, str]:
    """Run tasks, spread over the processes of ``accelerate launch``, ``jobs`` at a time in each.

    Every process gives the same tasks, and gets what went wrong in any.
    """
    from accelerate.utils import gather_object

    accelerator.wait_for_everyone()  # every process has looked at what is there before the first one writes
    index, count = accelerator.process_index, accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    environment = child_environment(jobs, count, accelerator.local_process_index, on_gpu)
    show = accelerator.is_local_main_process
    mine = run_tasks(tasks[index::count], jobs, environment, show, fork=not on_gpu)
    failed: dict[str, str] = dict(gather_object(list(mine.items())))
    accelerator.wait_for_everyone()
    return failed


def _fresh(command: Sequence[str], log: IO, environment: dict[str, str], lock: int) -> tuple[Any, Callable[[], Any]]:
    """Start a command; the process, and what waits for its exit code.

    The lock goes on with the command, should this process be killed and the command go on.
    """
    process = subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, pass_fds=[lock]
    )
    return process, process.wait


def _forked(command: Sequence[str], log: IO, environment: dict[str, str], lock: int) -> tuple[Any, Callable[[], Any]]:
    """The same, in a fork of a process whose imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.warm"])
    words = (list(command[1:]), DupFd(log.fileno()), environment, DupFd(lock))
    process = context.Process(target=_as_command, args=words)
    process.start()

    def wait() -> int | None:
        process.join()
        return process.exitcode

    return process, wait


def _as_command(words: list[str], log: Any, environment: dict[str, str], lock: Any) -> None:
    """Become ``python WORDS``: its output, its environment, its arguments. The lock is held while this process is."""
    lock.detach()
    stream = log.detach()
    for standard in (1, 2):
        os.dup2(stream, standard)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the variable is read when torch is imported
    sys.path.insert(0, str(ROOT))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def child_environment(jobs: int, num_processes: int, local_index: int, on_gpu: bool) -> dict[str, str]:
    """The environment of a subject's commands: one process, its share of the cores, the GPU of this process.

    Args:
        jobs: subjects that run at once in this process.
        num_processes: of accelerate launch on this host. local_index: which of them this is.
        on_gpu: whether the processes have a GPU each.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCH_VARIABLES and not name.startswith(LAUNCH_PREFIXES)
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (jobs * num_processes)))
    if on_gpu and num_processes > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_index] if visible else str(local_index)
    return environment


@contextmanager
def lock(path: Path) -> Iterator[int]:
    """Hold a file's lock, waiting for whoever holds it: a command of a run that was killed may still be at work."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"waiting for another command that is at work in {path.parent}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    refusals = [line for line in lines[-3:] if line.startswith("error: ")]
    return (refusals or lines or ["nothing was printed"])[-1].removeprefix("error: ")[:500]
