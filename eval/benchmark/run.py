"""Run tasks, several at once, spread over the processes of ``accelerate launch``, and skip commands that are done.

Without a GPU, commands are forked from one process that has already done the slow imports. CUDA does not survive a
fork, so with a GPU each command is a new process.
"""

import datetime
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from tqdm.auto import tqdm

from delora_diffusers.errors import InputError, printable
from delora_diffusers.locking import locked_folder
from eval.benchmark.plan import Plan
from eval.benchmark.schedule import class_image_tasks, tasks_of_all
from eval.benchmark.tasks import ROOT, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")
"""Environment variables of accelerate launch, which the commands of a task must not inherit."""

LONGEST_WAIT = datetime.timedelta(days=14)
"""How long processes wait for the slowest one."""

Process = subprocess.Popen[bytes] | BaseProcess
Started = tuple[Process, Callable[[], int | None]]
"""A process, and the function that waits for it and returns its exit code."""


class Descriptor(Protocol):
    """A file descriptor that was sent to another process."""

    def detach(self) -> int: ...


def start_accelerator() -> "Accelerator":
    """An accelerator whose processes may wait for one another for a long time."""
    from accelerate.utils import InitProcessGroupKwargs

    from delora_diffusers.launching import launched_accelerator

    return launched_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


def exit_with_failures(failed: dict[str, str]) -> None:
    """Print each failure, and exit with an error if there are any."""
    if failed:
        for folder, problem in failed.items():
            print(printable(f"failed: {folder}: {problem}"), file=sys.stderr)
        sys.exit(f"error: {len(failed)} failed and are excluded from all means; run the same command again to retry.")


def run_tasks(
    tasks: Sequence[Task], jobs: int, environment: dict[str, str], show: bool, fork: bool = False
) -> dict[str, str]:
    """Run tasks, ``jobs`` at a time; a task that fails does not stop the others.

    Args:
        environment: of the commands. show: whether to show a progress bar.
        fork: fork the commands from a process that has done the imports, instead of starting new processes.

    Returns:
        The error, by the folder of each result that is missing.
    """
    running: set[Process] = set()
    start = _start_fork if fork else _start_process

    def run(task: Task) -> str | None:
        problem = None
        with locked_folder(task.folder, wait=True) as lock, (task.folder / "log.txt").open("ab") as log:
            for step in task.steps:
                try:
                    command = None if step.is_done() else step.command()
                except InputError as error:
                    problem, command = problem or str(error), None
                if command is None:
                    continue
                process, wait = start(command, log, environment, lock)
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
                failed |= {str(result.folder): problem for result in task.results if not result.is_done()}
                tqdm.write(printable(f"{task.folder}: {problem}"), file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
    return failed


def run_on_all(accelerator: "Accelerator", tasks: Sequence[Task], jobs: int) -> dict[str, str]:
    """Run tasks, spread over the processes of ``accelerate launch``, ``jobs`` at a time in each.

    Every process passes the same tasks and receives the errors of all of them.
    """
    from accelerate.utils import gather_object

    accelerator.wait_for_everyone()  # all processes must have checked what is done before the first one writes
    index, count = accelerator.process_index, accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    environment = child_environment(jobs, count, accelerator.local_process_index, on_gpu)
    show = accelerator.is_local_main_process
    failed_here = run_tasks(tasks[index::count], jobs, environment, show, fork=not on_gpu)
    failed: dict[str, str] = dict(gather_object(list(failed_here.items())))
    accelerator.wait_for_everyone()
    return failed


def run_plans(accelerator: "Accelerator", plans: Sequence[Plan], together: int, jobs: int) -> dict[str, str]:
    """Generate the class images that are missing, then train every subject and generate its images.

    Args:
        together: see ``schedule.tasks``.

    Returns:
        The error, by the folder of each subject or base model whose images are missing.
    """
    failed_classes = run_on_all(accelerator, class_image_tasks(plans), jobs)
    failed = {
        str(plan.subject_folder(subject, seed)): failed_classes[str(plan.class_folder(subject))]
        for plan in plans
        if plan.class_images is not None
        for subject in plan.benchmark.subjects
        for seed in plan.seeds
        if str(plan.class_folder(subject)) in failed_classes
    }
    return failed | run_on_all(accelerator, tasks_of_all(plans, together, failed), jobs)


def _start_process(command: Sequence[str], log: IO[bytes], environment: dict[str, str], lock: int | None) -> Started:
    """Start a command in a new process.

    The command inherits the lock, so the folder stays locked if this process is killed and the command lives on.
    """
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        env=environment,
        pass_fds=[] if lock is None else [lock],
    )
    return process, process.wait


def _start_fork(command: Sequence[str], log: IO[bytes], environment: dict[str, str], lock: int | None) -> Started:
    """Start a command in a fork of a process that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.benchmark.warm"])
    arguments = (list(command[1:]), DupFd(log.fileno()), environment, None if lock is None else DupFd(lock))
    process = context.Process(target=_become_command, args=arguments)
    process.start()

    def wait() -> int | None:
        process.join()
        return process.exitcode

    return process, wait


def _become_command(words: list[str], log: Descriptor, environment: dict[str, str], lock: Descriptor | None) -> None:
    """Become ``python WORDS`` with its output, environment and arguments. Holds the lock until the process ends."""
    if lock is not None:
        lock.detach()
    log_descriptor = log.detach()
    for stream in (1, 2):
        os.dup2(log_descriptor, stream)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch read the variable when it was imported
    sys.path.insert(0, str(ROOT))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def child_environment(jobs: int, num_processes: int, local_index: int, on_gpu: bool) -> dict[str, str]:
    """The environment of a task's commands: a single process with its share of the cores and this process's GPU.

    Args:
        jobs: tasks that run at once in this process.
        num_processes: number of processes on this host. local_index: index of this process on the host.
        on_gpu: whether each process has a GPU.
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


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines[-3:] if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1].removeprefix("error: ")[:500]
