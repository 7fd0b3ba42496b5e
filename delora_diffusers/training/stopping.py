"""End a training run on SIGTERM or SIGINT after the current step, with a checkpoint."""

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from delora_diffusers.training.run_folder import command_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_SECONDS = 2.0
"""Launchers pass on a signal that a terminal or a scheduler sends to the training process as well."""
LAUNCHED = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
"""Environment variables that ``accelerate launch`` and ``torchrun`` set, whatever they are configured for."""
RESUME = "--resume_from_checkpoint"


class StopRequest:
    """Whether this process was asked to stop, by a signal or by the end of its launcher.

    Attributes:
        signal: the first signal that it, or else its launcher, received, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._received = 0.0
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """The handler of signals. The second one has the effect that it has in other programs."""
        if not self.signal:
            self.signal, self._received = number, time.monotonic()
        elif time.monotonic() - self._received > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, accelerator: Accelerator, can_ask: bool) -> int:
        """The signal to stop for after this step, on every process, or 0.

        Args:
            can_ask: whether all processes are at a step where they exchange values anyway. Several processes, which
                signals reach at different steps, agree only there, so that no other step waits for the device.
        """
        if not self.signal and self._launcher not in (None, os.getppid()):
            # Accelerate's launcher does not pass signals on to a single process.
            self.signal = signal.SIGTERM
        if accelerator.num_processes == 1:
            return self.signal
        if not can_ask:
            return 0
        gathered = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        assert isinstance(gathered, Tensor)
        return int(gathered.max())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Receive signals inside, instead of what they do otherwise. Only a process's main thread receives signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def end_stopped(accelerator: Accelerator, step: int, number: int) -> None:
    """Say how to continue, and exit with 128 and the signal's number, as a shell reports a process that it ended.

    Raises:
        SystemExit
    """
    accelerator.wait_for_everyone()  # a launcher ends the others when the first one exits
    if accelerator.is_main_process:
        words = "" if RESUME in shlex.split(command_line()) else f" {RESUME} latest"
        print(f"stopped after step {step}, which is saved; continue with: {command_line()}{words}", flush=True)
    accelerator.end_training()
    raise SystemExit(128 + number)
