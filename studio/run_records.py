"""What the studio writes down about a run, and which processes are the run's. Imports no torch.

A run is ``runs/NAME`` of the workspace, the output folder of the training script. What the studio knows of it beyond
that is in ``runs/.studio/NAME``: ``run.json`` and the output of its processes, ``log.txt``.

A run's processes are recognized by a random token in their environment, which they inherit from each other. A process
that has got the number of an earlier one does not have it, and a training process is found when its launcher is gone.
"""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.text_files import read_json

STUDIO_FOLDER = ".studio"
RECORD_NAME, LOG_NAME = "run.json", "log.txt"
TOKEN = "DELORA_STUDIO_RUN"
"""The environment variable of a run's processes."""


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


def is_link(run: Path, name: str) -> bool:
    """Whether a link leads from one of the studio's files of a run to another place."""
    path = studio_folder(run) / name
    return path.resolve() != run.parent.resolve() / STUDIO_FOLDER / run.name / name


def processes_of(tokens: set[str]) -> dict[str, list[psutil.Process]]:
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


def write_record(run: Path, record: Record) -> None:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in record.values.items()}
    text = json.dumps(dataclasses.asdict(dataclasses.replace(record, values=values)), indent=1)
    write_text(studio_folder(run) / RECORD_NAME, text + "\n")


def read_record(run: Path) -> Record | None:
    """The record of a run; None if it has none, or one that is damaged."""
    if is_link(run, RECORD_NAME):
        return None
    try:
        values = read_json(studio_folder(run) / RECORD_NAME)
        return Record(**values)
    except (InputError, OSError, TypeError):
        return None
