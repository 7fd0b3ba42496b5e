"""Generate images for the page in a process that keeps the model, so that a change of strength takes one image's time.

The process is ``studio.player_worker``; this module imports no torch.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from delora_diffusers.errors import InputError

IDLE_SECONDS = 600.0
"""After so long without a command the process ends and its memory is free."""
ROOT = Path(__file__).resolve().parent.parent
"""The repository, in which commands run."""


BY_BUTTON = "Stopped by the button Stop."
FOR_TRAINING = "Stopped, because a training run started and needs the memory."


class StoppedError(Exception):
    """The images were not generated, because ``close`` was called meanwhile; the message is its reason."""


class Player:
    """Runs one ``generate`` command at a time, whichever page it comes from, in a process that starts when needed."""

    def __init__(self, idle_seconds: float = IDLE_SECONDS):
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._reason = ""
        self._process: subprocess.Popen[str] | None = None

    def generate(self, words: list[str]) -> None:
        """Run ``python -m delora_diffusers generate WORDS``.

        Raises:
            InputError: what the command itself would say, or the process was killed.
            StoppedError
        """
        with self._lock:
            for attempt in range(2):
                process = self._started()
                try:
                    assert process.stdin is not None and process.stdout is not None
                    process.stdin.write(json.dumps(words) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                except (BrokenPipeError, ValueError):
                    line = ""
                if line:
                    error = json.loads(line)["error"]
                    if error is not None:
                        raise InputError(error)
                    return
                code = process.wait()
                if process is not self._process:
                    raise StoppedError(self._reason)
                # It may have ended, idle, in the moment in which the command was sent; that is no fault.
                if code or attempt:
                    raise InputError(_ended(code))

    def close(self, reason: str = FOR_TRAINING) -> None:
        """End the process, also while it generates; the next command starts a new one.

        Args:
            reason: a sentence for whoever waits for images.
        """
        self._reason = reason
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    @property
    def pid(self) -> int | None:
        """The process, if it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def _started(self) -> subprocess.Popen[str]:
        process = self._process
        if process is None or process.poll() is not None:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "studio.player_worker", str(self._idle_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                cwd=ROOT,  # as any command of the page
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # an interrupt in the terminal is for the server, with which this ends
            )
        return process


def _ended(code: int) -> str:
    if code == -9:
        return (
            "the generating process was killed, perhaps by the system for lack of memory; press Generate to start it "
            "again."
        )
    return f"the generating process ended with code {code}; the terminal of the page shows why, press Generate again."
