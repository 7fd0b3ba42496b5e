"""Run commands of the project for the page, and show them so that they can be copied."""

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from delora_diffusers.errors import InputError, printable
from studio.player import ROOT

TAIL = 8000
"""Characters of a command's output that the page shows."""


def words_of(*words: object) -> list[str]:
    """The words of a command: ``python -m WORDS``."""
    return ["python", "-m", *map(str, words)]


def shown(*commands: Sequence[str]) -> str:
    """Commands as lines for a shell."""
    return "\n".join(shlex.join(map(str, words)) for words in commands)


def short(path: Path) -> Path:
    """A path for a command, which runs in the repository's folder: relative to it if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def run(words: Sequence[str], program: str | None = None) -> Iterator[str]:
    """Run a command and yield its output so far, twice a second at most. It ends with the page that started it.

    Args:
        program: instead of the Python that runs the page.

    Raises:
        InputError: the command fails; the message is its own.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [program or sys.executable, *words[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    output: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        output.extend(iter(lambda: process.stdout.read(1) if process.stdout else "", ""))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            reader.join(0.5)
            yield "".join(output)[-TAIL:]
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code:
        raise InputError(reason_in("".join(output), code))


def reason_in(output: str, code: int) -> str:
    """What a failed command says: the project's commands end with ``error: `` and a sentence."""
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return printable(errors[-1] if errors else lines[-1] if lines else f"the command ended with code {code}.")


def while_running(work: Callable[[], None], report: Callable[[], str], every: float = 0.5) -> Iterator[str]:
    """Do something in a thread, and yield a report of how far it is until it has ended.

    Raises:
        InputError: what ``work`` raises.
    """
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(every)
        if thread.is_alive():
            yield report()
    if failed:
        raise failed[0]
