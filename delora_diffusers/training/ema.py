"""Averages of the weights over the steps, which are validated and saved in place of the last step's weights.

They are an exponential moving average (``--use_ema``) or that of a schedule-free optimizer (Defazio et al., NeurIPS
2024, arXiv 2405.15682), whose gradients are taken at other weights than its average. Training itself never sees them.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from delora_diffusers.adapter.tensors import Adapter


class WeightAverage:
    """The average that a run keeps of its weights. Without one, the methods do nothing.

    Args:
        parameters: all trained parameters. adapters: that have them.
        optimizer: which may have an average.
        ema_decay: the largest decay of an exponential moving average; None for none. Diffusers limits that of step t to
            ``t / (9 + t)``, so that the average forgets the start of the run.

    Attributes:
        ema: with ``state_dict`` and ``load_state_dict``, for checkpoints; None if there is none.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        adapters: Sequence[Adapter],
        optimizer: torch.optim.Optimizer,
        ema_decay: float | None = None,
    ):
        self.parameters = list(parameters)
        self.adapters = adapters
        self.optimizer = optimizer
        self.ema = None if ema_decay is None else EMAModel(self.parameters, decay=ema_decay, foreach=True)
        self.schedule_free = "train_mode" in optimizer.param_groups[0]
        self._train_mode(True)

    def update(self) -> None:
        """Include the weights after an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the weights by their average, for good: after the last step."""
        if self.ema is not None:
            # Not ema.copy_to, which hides the change from the adapters, and they would keep the old products.
            torch._foreach_copy_([*self.parameters], self.ema.shadow_params)
        elif self.schedule_free:
            self.optimizer.eval()
        else:
            return
        for adapter in self.adapters:
            adapter.constrain()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights are their average. Afterwards they are bit for bit those before, so that neither
        validation nor checkpoints have an effect on training."""
        if self.ema is None and not self.schedule_free:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([*self.parameters], trained)
            self._train_mode(True)

    def _train_mode(self, mode: bool) -> None:
        # Not optimizer.train(), which computes the weights of training from the average, up to rounding.
        if self.schedule_free:
            for group in self.optimizer.param_groups:
                group["train_mode"] = mode
