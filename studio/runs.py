"""Training runs in processes of their own, which outlive the page and its server. Imports no torch.

A run is ``runs/NAME`` of the workspace, the output folder of the training script. What the studio knows of it beyond
that is in ``runs/.studio/NAME``: ``run.json`` and the output of its processes, ``log.txt``.

A run's processes are recognized by a random token in their environment, which they inherit from each other. A process
that has got the number of an earlier one does not have it, and a training process is found when its launcher is gone.
"""

import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError, printable
from delora_diffusers.locking import locked_folder
from delora_diffusers.names import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    checkpoint_step,
    is_miniature,
    list_checkpoints,
    may_be_hub_id,
)
from delora_diffusers.text_files import read_json
from studio import flags
from studio.workspace import Workspace

STUDIO_FOLDER = ".studio"
RECORD_NAME, LOG_NAME = "run.json", "log.txt"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
"""What ``accelerate launch`` runs, of the environment that this process is in."""
TOKEN = "DELORA_STUDIO_RUN"
"""The environment variable of a run's processes."""
PHOTOS = "photos"
"""The key of the photo set's name among a form's values."""
TAIL_BYTES = 64 * 2**10
TAIL_LINES = 200
FORK_SECONDS = 1
"""A process appears later than its record, by at most this."""
SETTLED_SECONDS = 5
"""From then on, the time left follows from the mean time of the steps."""

Status = Literal["starting", "training", "stopping", "stopped", "finished", "failed", "lost"]

PROGRESS = re.compile(r"training: +\d+%\|[^|\r\n]*\| *(\d+)/(\d+) \[([\d:]+)<[^,\]]*(?:, +([\d.]+)(it/s|s/it))?")
"""tqdm's line: steps done, steps in all, the time since the start, and the speed."""
STOPPED = re.compile(r"^stopped after step (\d+)", re.MULTILINE)
ERROR = re.compile(r"^(?:\S+\.py: )?error: (.+)$", re.MULTILINE)
EXCEPTION = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class RunState:
    """What is known of a run.

    Attributes:
        status: ``lost`` if its process ended without a message.
        step: finished optimizer steps. steps: to do in all, 0 if unknown.
        message: what happened and what to do, a sentence.
        command: as the user could type it. log_tail: the last lines of its output.
        started: seconds since the epoch. pid: of the oldest of its processes, None if there is none.
    """

    name: str
    status: Status
    step: int
    steps: int
    seconds_left: float | None
    message: str
    command: str
    log_tail: str
    started: float
    pid: int | None


@dataclasses.dataclass(frozen=True)
class Record:
    """What the studio writes down when it starts a run's processes.

    Attributes:
        values: of the form. command: its words. token: of the processes.
        first_step: that of the checkpoint from which they continue. steps: ``--max_train_steps``.
        log_start: where their output begins in the log. stop_requested: when the user asked to stop, or None.
    """

    values: dict[str, Any]
    command: list[str]
    token: str
    started: float
    first_step: int
    steps: int
    log_start: int
    stop_requested: float | None = None


def studio_folder(run: Path) -> Path:
    """Where the studio keeps what belongs to a run but is not of the training script."""
    return run.parent / STUDIO_FOLDER / run.name


def planned(workspace: Workspace, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A form's values with the flags that follow from the run's name and the chosen photos.

    Args:
        values: by field, and the name of the photo set as ``photos``.

    Raises:
        InputError: a name is invalid, or a path is outside the workspace.
    """
    if not values.get(PHOTOS):
        raise InputError("no photos were chosen; choose a set of photos to train on.")
    photos = workspace.photo_set(values[PHOTOS])
    for file in photos.iterdir() if photos.is_dir() else ():
        workspace.within(file)  # it may be a link
    return _inside(workspace, values) | {"output_dir": workspace.run(name), "instance_data_dir": photos}


def _inside(workspace: Workspace, values: Mapping[str, Any]) -> dict[str, Any]:
    """A form's values with absolute paths in the workspace; only the base model may be elsewhere.

    Raises:
        InputError: a path is outside the workspace.
    """
    values = {key: value for key, value in values.items() if key != PHOTOS}
    for field in flags.fields():
        path = str(values.get(field.name) or "").strip()
        if field.kind == "path" and path and not (field.name == "init_adapter" and _names_hub(workspace, path)):
            values[field.name] = workspace.within(path)
    for name in ("pretrained_model_name_or_path", "model_config"):
        model = str(values.get(name) or "").strip()
        if model and not is_miniature(model) and Path(model).expanduser().exists():
            values[name] = Path(model).expanduser().absolute()
    return values


def _names_hub(workspace: Workspace, path: str) -> bool:
    return may_be_hub_id(path) and not (workspace.root / path).exists() and not (flags.ROOT / path).exists()


def start(workspace: Workspace, name: str, values: Mapping[str, Any]) -> RunState:
    """Start a run.

    Args:
        values: see ``planned``.

    Raises:
        InputError: a value or a photo cannot be used, or there is a run of this name, whoever started it.
    """
    run, words = workspace.run(name), planned(workspace, name, values)
    with _held(run):
        _refuse_running(run)
        if (run / WEIGHTS_NAME).exists() or list_checkpoints(run):
            raise InputError(f"there is a run {name} already; choose another name, or resume that run.")
        flags.check(words)
        _launch(run, dict(values), words)
    return state(workspace, name)


def resume(workspace: Workspace, name: str) -> RunState:
    """Continue a run from its last checkpoint, or from the beginning if it has none.

    Raises:
        InputError: it is running or finished, was started elsewhere, or cannot be continued.
    """
    run = workspace.run(name)
    with _held(run):
        _refuse_running(run)
        record = _read(run)
        if record is None:
            raise InputError(
                f"the run {name} was not started on this page; continue it in a terminal, with "
                "--resume_from_checkpoint latest at the end of its command."
            )
        if (run / WEIGHTS_NAME).exists():
            raise InputError(f"the run {name} is finished; start a new one to train longer.")
        words = planned(workspace, name, record.values) | {"resume_from_checkpoint": "latest"}
        flags.check(words)
        _launch(run, record.values, words)
    return state(workspace, name)


def stop(workspace: Workspace, name: str) -> RunState:
    """Ask a run to end after its current step with a checkpoint. If it was asked before, it ends at once.

    Raises:
        InputError: it is not running.
    """
    run = workspace.run(name)
    with _held(run):
        record = _read(run)
        processes = [] if record is None else _processes({record.token})[record.token]
        if record is None or not processes:
            raise InputError(f"the run {name} is not running; there is nothing to stop.")
        _write(run, dataclasses.replace(record, stop_requested=record.stop_requested or time.time()))
        for process in reversed(processes):  # the launcher last
            with suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
    return state(workspace, name)


def state(workspace: Workspace, name: str) -> RunState:
    """What is known of a run.

    Raises:
        InputError: there is no such run.
    """
    run = workspace.run(name)
    record = _read(run)
    if record is None and not run.is_dir():
        raise InputError(f"there is no run {name}; choose another.")
    tokens = set() if record is None else {record.token}
    return _state(run, record, _processes(tokens))


def states(workspace: Workspace) -> list[RunState]:
    """What is known of all runs, the newest first."""
    names = set(workspace.run_names())
    for file in (workspace.runs / STUDIO_FOLDER).glob(f"*/{RECORD_NAME}"):
        with suppress(InputError):
            workspace.run(file.parent.name)
            names.add(file.parent.name)
    records = {name: _read(workspace.run(name)) for name in sorted(names)}
    processes = _processes({record.token for record in records.values() if record is not None})
    found = [_state(workspace.run(name), record, processes) for name, record in records.items()]
    return sorted(found, key=lambda state: -state.started)


def estimate(workspace: Workspace, values: Mapping[str, Any]) -> str:
    """What a run with these values needs of the GPU's memory: a sentence, and a table of what helps.

    Raises:
        InputError: a value cannot be used, or the base model cannot be read.
    """
    words = _inside(workspace, values)
    if is_miniature(flags.effective(words)["pretrained_model_name_or_path"]):
        return "The miniature fits any GPU, and it trains on a CPU."
    command = [sys.executable, "-m", "studio.estimate", *flags.command(words)[len(flags.LAUNCH) :]]
    result = subprocess.run(command, cwd=flags.ROOT, env=_environment(), capture_output=True, text=True, timeout=600)
    if result.returncode:
        errors = ERROR.findall(result.stderr) or result.stderr.strip().splitlines()[-1:] or ["no reason was given"]
        raise InputError(f"the memory could not be estimated: {errors[-1]}")
    return result.stdout.strip()


@contextmanager
def _held(run: Path) -> Iterator[None]:
    """Hold a run while its processes are started or stopped, against other pages and other servers.

    Raises:
        InputError: another page holds it.
    """
    folder = studio_folder(run)
    for path in (folder.parent, folder, folder / LOG_NAME):
        if path.is_symlink():
            raise InputError(f"{path} is a link, through which nothing is written; remove it.")
    try:
        with locked_folder(folder):
            yield
    except InputError as error:
        if isinstance(error.__cause__, BlockingIOError):
            raise InputError(f"the run {run.name} is being started by another page; open it there.") from error
        raise


def _refuse_running(run: Path) -> None:
    record = _read(run)
    if record is not None and _processes({record.token})[record.token]:
        raise InputError(f"the run {run.name} is running already; open it, or choose another name.")


def _launch(run: Path, values: dict[str, Any], words: Mapping[str, Any]) -> None:
    command, log = flags.command(words), studio_folder(run) / LOG_NAME
    checkpoints = list_checkpoints(run)
    first = checkpoint_step(checkpoints[-1]) if checkpoints and "resume_from_checkpoint" in words else 0
    with log.open("ab") as output:
        start, token = output.tell(), secrets.token_hex(16)
        output.write(f"$ {printable(flags.shown(command))}\n".encode())
        steps = flags.effective(words)["max_train_steps"]
        # Written first: if this server is killed now, the next one finds the processes by their token.
        _write(run, Record(values, command, token, time.time(), first, steps, start))
        output.flush()
        try:
            subprocess.Popen(
                [*LAUNCHER, *command[2:]],
                cwd=flags.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment() | {TOKEN: token},
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"the training process could not be started ({error.strerror}); try again.") from error


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(flags.ROOT), os.environ.get("PYTHONPATH")]))
    # Tqdm would write ten lines a second.
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5"}


def _processes(tokens: set[str]) -> dict[str, list[psutil.Process]]:
    """The running processes that have these tokens, the oldest first, by token."""
    found: dict[str, list[psutil.Process]] = {token: [] for token in tokens}
    for process in psutil.process_iter() if tokens else ():
        with suppress(psutil.Error, OSError):
            token = process.environ().get(TOKEN)
            if token in found and process.status() != psutil.STATUS_ZOMBIE:
                found[token].append(process)
    for processes in found.values():
        processes.sort(key=lambda process: (process.create_time(), process.pid))
    return found


def _write(run: Path, record: Record) -> None:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in record.values.items()}
    text = json.dumps(dataclasses.asdict(dataclasses.replace(record, values=values)), indent=1)
    write_text(studio_folder(run) / RECORD_NAME, text + "\n")


def _read(run: Path) -> Record | None:
    """The record of a run; None if it has none, or one that is damaged."""
    try:
        values = read_json(studio_folder(run) / RECORD_NAME)
        return Record(**values)
    except (InputError, OSError, TypeError):
        return None


def _state(run: Path, record: Record | None, processes: Mapping[str, list[psutil.Process]]) -> RunState:
    checkpoints = [checkpoint_step(path) for path in list_checkpoints(run)]
    if record is None:
        return _state_of_other(run, checkpoints)
    text = _read_log(studio_folder(run) / LOG_NAME, record.log_start)
    progress = (list(PROGRESS.finditer(text)) or [None])[-1]
    step = record.first_step if progress is None else int(progress[1])
    running = processes[record.token]
    seconds_left = None
    if running or (0 <= time.time() - record.started < FORK_SECONDS and text.count("\n") < 2):
        status: Status = "starting" if progress is None else "training"
        message = f"Training: {step} of {record.steps} steps are done."
        if progress is None:
            message = "Starting: the model is loaded and the photos are encoded."
        if record.stop_requested is not None:
            status = "stopping"
            message = "Stopping after the current step, with a checkpoint. Stop again to end at once, without one."
        elif progress is not None:
            seconds_left = _seconds_left(progress, record.first_step)
    else:
        status, message, step = _ended(run, record, text, step, checkpoints)
    return RunState(
        run.name,
        status,
        step,
        record.steps,
        seconds_left,
        message,
        flags.shown(record.command),
        _lines(text),
        record.started,
        running[0].pid if running else None,
    )


def _ended(run: Path, record: Record, text: str, step: int, checkpoints: list[int]) -> tuple[Status, str, int]:
    """The status, the message and the step of a run that has no process."""
    if (run / WEIGHTS_NAME).exists():
        return "finished", f"Finished: the adapter is saved after {record.steps} steps.", record.steps
    if checkpoints:
        kept = f"its last checkpoint is at step {checkpoints[-1]}: resume to continue."
    else:
        kept = "it has no checkpoint yet: resume to train from the beginning."
    stopped = STOPPED.findall(text)
    if stopped:
        return "stopped", f"Stopped after step {stopped[-1]}, which is saved: resume to continue.", int(stopped[-1])
    errors = ERROR.findall(text)
    if errors:
        return "failed", _sentence(errors[-1]), step
    exceptions = [line for line in EXCEPTION.findall(text) if not line.startswith("subprocess.CalledProcessError")]
    if exceptions:
        return "failed", f"Training failed ({exceptions[0][:300]}); the log says where; {kept}", step
    when = f"at step {step}" if step > record.first_step else "before its first step"
    if record.stop_requested is not None:
        return "stopped", f"Stopped {when}; {kept}", step
    return "lost", f"The training process ended without a message {when}; {kept}", step


def _state_of_other(run: Path, checkpoints: list[int]) -> RunState:
    """The state of a run that was not started here."""
    config: Any = None
    with suppress(InputError, OSError):
        config = read_json(run / CONFIG_NAME)
    config = config if isinstance(config, dict) else {}
    arguments = config.get("arguments")
    steps = arguments.get("max_train_steps") if isinstance(arguments, dict) else None
    steps = steps if isinstance(steps, int) else 0
    step = checkpoints[-1] if checkpoints else 0
    status: Status = "stopped" if checkpoints else "lost"
    message = f"This run was not started on this page, and is not finished; it has {len(checkpoints)} checkpoints."
    if (run / WEIGHTS_NAME).exists():
        status, message, step = "finished", "Finished: the adapter is saved.", steps
    command, started = config.get("command"), run.stat().st_mtime
    return RunState(
        run.name, status, step, steps, None, message, command if isinstance(command, str) else "", "", started, None
    )


def _seconds_left(progress: re.Match[str], first_step: int) -> float | None:
    """The time that the remaining steps take at the speed so far, which includes validation."""
    step, steps = int(progress[1]), int(progress[2])
    seconds = 0
    for part in progress[3].split(":"):
        seconds = 60 * seconds + int(part)
    if seconds >= SETTLED_SECONDS and step > first_step:
        return seconds * (steps - step) / (step - first_step)
    if progress[4] is None or not float(progress[4]):
        return None
    speed = float(progress[4])
    return (steps - step) * (1 / speed if progress[5] == "it/s" else speed)


def _read_log(file: Path, start: int) -> str:
    """The end of the output from ``start`` on. Of lines that were written over each other, all are kept."""
    try:
        with file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(min(size, max(start, size - TAIL_BYTES)))
            return log.read().decode(errors="replace").replace("\r", "\n")
    except OSError:
        return ""


def _lines(text: str) -> str:
    """The last lines, of each progress bar only the last one, as text that does nothing to a terminal."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    bar = re.compile(r"(.*?:) +\d+%\|")
    kept: list[str] = []
    for line in lines:
        this, last = bar.match(line), bar.match(kept[-1]) if kept else None
        if this and last and this[1] == last[1]:
            kept.pop()
        kept.append(line)
    return "\n".join(printable(line) for line in kept[-TAIL_LINES:])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
