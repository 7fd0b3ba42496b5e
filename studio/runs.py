"""Training runs in processes of their own, which outlive the page and its server. Imports no torch."""

import dataclasses
import errno
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
from typing import Any

import psutil

from delora_diffusers.errors import InputError, printable
from delora_diffusers.locking import locked_folder
from delora_diffusers.names import WEIGHTS_NAME, checkpoint_step, is_miniature, list_checkpoints, may_be_hub_id
from studio import flags
from studio.run_records import (
    LOG_NAME,
    RECORD_NAME,
    STUDIO_FOLDER,
    TOKEN,
    Record,
    processes_of,
    read_record,
    studio_folder,
    write_record,
)
from studio.run_states import ERROR, RunState, is_finished, state_of
from studio.workspace import Workspace

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
"""What ``accelerate launch`` runs, of the environment that this process is in."""
PHOTOS = "photos"
"""The key of the photo set's name among a form's values."""


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
            other = "" if (run / WEIGHTS_NAME).exists() else ", or resume that run"
            raise InputError(
                f"there is a run {name} already; choose another name, such as {free_name(workspace, name)}{other}."
            )
        flags.check(words)
        _launch(run, dict(values), words)
    return state(workspace, name)


def resume(workspace: Workspace, name: str, steps: int | None = None) -> RunState:
    """Continue a run from its last checkpoint, or from the beginning if it has none.

    Args:
        steps: how many it takes in all from now on, more than before; None for as many as before. A finished run can
            only be prolonged.

    Raises:
        InputError: it is running, is finished and not prolonged, was started elsewhere, or cannot be continued.
    """
    run = workspace.run(name)
    with _held(run):
        _refuse_running(run)
        record = read_record(run)
        if record is None:
            raise InputError(
                f"the run {name} was not started on this page; continue it in a terminal, with "
                "--resume_from_checkpoint latest at the end of its command."
            )
        if steps is not None and steps <= record.steps:
            raise InputError(f"the run {name} has {record.steps} steps; give a later one, or leave the field empty.")
        finished = is_finished(run, record)
        if finished and steps is None:
            raise InputError(f"the run {name} is finished; to train it for longer, resume up to a later step.")
        if finished and not list_checkpoints(run):
            raise InputError(f"the run {name} has no checkpoint to continue from; start a new one with more steps.")
        values = record.values if steps is None else record.values | {"max_train_steps": str(steps)}
        words = planned(workspace, name, values) | {"resume_from_checkpoint": "latest"}
        flags.check(words)
        _launch(run, values, words)
    return state(workspace, name)


def stop(workspace: Workspace, name: str) -> RunState:
    """Ask a run to end after its current step with a checkpoint. If it was asked before, it ends at once.

    Raises:
        InputError: it is not running.
    """
    run = workspace.run(name)
    with _held(run):
        record = read_record(run)
        processes = [] if record is None else processes_of({record.token})[record.token]
        if record is None or not processes:
            raise InputError(f"the run {name} is not running; there is nothing to stop.")
        write_record(run, dataclasses.replace(record, stop_requested=record.stop_requested or time.time()))
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
    record = read_record(run)
    if record is None and not run.is_dir():
        raise InputError(f"there is no run {name}; choose another.")
    tokens = set() if record is None else {record.token}
    return state_of(run, record, processes_of(tokens))


def states(workspace: Workspace) -> list[RunState]:
    """What is known of all runs, the newest first."""
    records = {name: read_record(workspace.run(name)) for name in sorted(_names(workspace))}
    processes = processes_of({record.token for record in records.values() if record is not None})
    found = [state_of(workspace.run(name), record, processes) for name, record in records.items()]
    return sorted(found, key=lambda state: -state.started)


def free_name(workspace: Workspace, name: str) -> str:
    """The name, or with the next number after it, as in dog-2, if there is a run of this name."""
    taken, number = _names(workspace), 2
    if name not in taken:
        return name
    stem = re.sub(r"-\d+$", "", name) or name
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


def _names(workspace: Workspace) -> set[str]:
    """The names of all runs, also of those that have no folder yet."""
    names = set(workspace.run_names())
    for file in (workspace.runs / STUDIO_FOLDER).glob(f"*/{RECORD_NAME}"):
        with suppress(InputError):
            workspace.run(file.parent.name)
            names.add(file.parent.name)
    return names


def form_values(workspace: Workspace, name: str) -> dict[str, Any]:
    """The values of the form that a run was started with.

    Raises:
        InputError: it was started elsewhere.
    """
    record = read_record(workspace.run(name))
    if record is None:
        raise InputError(f"the run {name} was not started on this page, which does not know its settings.")
    return record.values


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
    record = read_record(run)
    if record is not None and processes_of({record.token})[record.token]:
        raise InputError(f"the run {run.name} is running already; open it, or choose another name.")


def _launch(run: Path, values: dict[str, Any], words: Mapping[str, Any]) -> None:
    command, log = flags.command(words), studio_folder(run) / LOG_NAME
    checkpoints = list_checkpoints(run)
    first = checkpoint_step(checkpoints[-1]) if checkpoints and "resume_from_checkpoint" in words else 0
    earlier = read_record(run)
    with log.open("ab") as output:
        start, token = output.tell(), secrets.token_hex(16)
        output.write(f"$ {printable(flags.shown(command))}\n".encode())
        steps = flags.effective(words)["max_train_steps"]
        # Written first: if this server is killed now, the next one finds the processes by their token.
        write_record(run, Record(values, command, token, time.time(), first, steps, start))
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
            if earlier is None:
                (studio_folder(run) / RECORD_NAME).unlink()
            else:
                write_record(run, earlier)
            if error.errno == errno.E2BIG:
                raise InputError("a prompt is too long to be part of a command; shorten it.") from error
            raise InputError(f"the training process could not be started ({error.strerror}); try again.") from error


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(flags.ROOT), os.environ.get("PYTHONPATH")]))
    # Tqdm would write ten lines a second.
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5"}
