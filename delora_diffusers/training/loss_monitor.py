"""The running loss of each subject, and the first step at which it was not finite."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.names import list_checkpoints


class LossMonitor:
    """Accumulates losses on the device, so that no step waits for the device to report them."""

    def __init__(self, device: torch.device, subjects: int = 1):
        self.sum = torch.zeros(subjects, device=device)
        self.count = 0
        self.first_bad_step = torch.full((subjects,), -1, device=device, dtype=torch.long)

    def add(self, losses: Tensor, step: int) -> None:
        """Add the losses (subjects,) of one micro-batch."""
        self.sum += losses
        self.count += 1
        newly_bad = ~torch.isfinite(losses) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(newly_bad, step + 1, self.first_bad_step)

    def check(self, accelerator: Accelerator, output_dir: Path) -> dict[int, int]:
        """The subjects whose loss was not finite on some process, each with the first such step.

        Raises:
            InputError: no subject's loss is finite; the message gives the step and the last good checkpoint.
        """
        gathered = accelerator.gather(self.first_bad_step)
        assert isinstance(gathered, Tensor)
        steps = gathered.view(-1, len(self.first_bad_step)).amax(dim=0).tolist()
        bad = {subject: int(step) for subject, step in enumerate(steps) if step >= 0}
        if len(bad) == len(steps):
            checkpoints = list_checkpoints(output_dir)
            remedy = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
            raise InputError(
                f"the loss was not finite at step {min(bad.values())}; {remedy}; lower --learning_rate or use bf16."
            )
        return bad

    def mean_loss(self, accelerator: Accelerator, output_dir: Path) -> float:
        """Mean loss since the last call, over all processes and all subjects whose loss is finite."""

        bad = self.check(accelerator, output_dir)
        means = accelerator.reduce(self.sum / max(self.count, 1), "mean")
        assert isinstance(means, Tensor)
        finite = [mean for subject, mean in enumerate(means.tolist()) if subject not in bad]
        self.sum.zero_()
        self.count = 0
        return sum(finite) / len(finite)
