"""The state of a training run, from its record, its processes and its output. Imports no torch."""

import dataclasses
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from delora_diffusers.errors import InputError, printable
from delora_diffusers.names import CONFIG_NAME, WEIGHTS_NAME, checkpoint_step, list_checkpoints
from delora_diffusers.text_files import read_json
from studio import flags
from studio.run_records import LOG_NAME, Record, is_link, studio_folder

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

DEFAULTS_OF_LAUNCHER = re.compile(
    r"^The following values were not passed to `accelerate launch`.*\n(?:\t.*\n)*To avoid this warning .*\n?", re.M
)
"""What `accelerate launch` warns of if it is not configured, which it need not be. Flags would say the same against the
settings of those who did configure it."""


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


def state_of(run: Path, record: Record | None, processes: Mapping[str, list[psutil.Process]]) -> RunState:
    checkpoints = [checkpoint_step(path) for path in list_checkpoints(run)]
    if record is None:
        return _state_of_other(run, checkpoints)
    text = "" if is_link(run, LOG_NAME) else _read_log(studio_folder(run) / LOG_NAME, record.log_start)
    progress = (list(PROGRESS.finditer(text)) or [None])[-1]
    step = record.first_step if progress is None else int(progress[1])
    running = processes[record.token]
    seconds_left = None
    if running or (0 <= time.time() - record.started < FORK_SECONDS and text.count("\n") < 2):
        status: Status = "starting" if progress is None else "training"
        message = f"Training: {step} of {record.steps} steps are done."
        if progress is None:
            message = "Loading the model and encoding the photos."
        elif step >= int(progress[2]):
            message = "Making the last samples and saving." if _has_samples(record) else "Saving the adapter."
        if record.stop_requested is not None:
            status = "stopping"
            message = "Stopping after the current step, with a checkpoint. Stop again to end at once, without one."
        elif progress is not None and step < int(progress[2]):
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


def _has_samples(record: Record) -> bool:
    return any(word.partition("=")[0] == "--validation_prompt" for word in record.command)


def _ended(run: Path, record: Record, text: str, step: int, checkpoints: list[int]) -> tuple[Status, str, int]:
    """The status, the message and the step of a run that has no process."""
    if is_finished(run, record):
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


def is_finished(run: Path, record: Record) -> bool:
    """Whether the adapter of all steps is saved; while a finished run is prolonged, it is that of fewer."""
    return (run / WEIGHTS_NAME).exists() and (_saved_steps(run) or record.steps) >= record.steps


def _saved_steps(run: Path) -> int:
    """``--max_train_steps`` of the saved adapter; 0 if unknown."""
    steps = _arguments(run).get("max_train_steps")
    return steps if isinstance(steps, int) else 0


def _arguments(run: Path) -> dict[str, Any]:
    """The flags of the saved adapter; empty if they cannot be read."""
    arguments = _config(run).get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def _config(run: Path) -> dict[str, Any]:
    config: Any = None
    with suppress(InputError, OSError):
        config = read_json(run / CONFIG_NAME)
    return config if isinstance(config, dict) else {}


def _state_of_other(run: Path, checkpoints: list[int]) -> RunState:
    """The state of a run that was not started here."""
    steps = _saved_steps(run)
    step = checkpoints[-1] if checkpoints else 0
    status: Status = "stopped" if checkpoints else "lost"
    message = f"This run was not started on this page, and is not finished; it has {len(checkpoints)} checkpoints."
    if (run / WEIGHTS_NAME).exists():
        status, message, step = "finished", "Finished: the adapter is saved.", steps
    command, started = _config(run).get("command"), run.stat().st_mtime
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
    lines = [line.rstrip() for line in DEFAULTS_OF_LAUNCHER.sub("", text).split("\n") if line.strip()]
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
