"""The denoising objective: the weighted squared error of what the denoiser predicts."""

import dataclasses
from typing import Any

from torch import Tensor

from delora_diffusers.adapter.control import Control
from delora_diffusers.families.family import Family
from delora_diffusers.pipelines.conditions import belongs_to_text_encoder, conditions


def denoising_losses(
    family: Family,
    denoiser: Any,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    weights: Tensor,
    subjects: int = 1,
    **conditions: Tensor,
) -> Tensor:
    """Weighted squared error of the denoiser's prediction, (subjects,), float32; deterministic.

    Args:
        noisy, target: (batch, channels, height, width), float32.
        timesteps, weights: (batch,); see ``noising.Noising``.
        subjects: number of subjects in the batch, with equally many samples each, ordered by subject.
        conditions: (batch, ...) each, as the family's ``predict`` takes them.
    """
    dtype = denoiser.dtype
    floating = {n: tensor.to(dtype) if tensor.is_floating_point() else tensor for n, tensor in conditions.items()}
    prediction = family.predict(denoiser, noisy.to(dtype), timesteps, **floating)
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (errors * weights).view(subjects, -1).mean(dim=1)


@dataclasses.dataclass(frozen=True)
class Losses:
    """Computes the losses of a micro-batch from its tensors, given by name.

    Attributes:
        family: of the base model. denoiser: with its adapter. subjects: number of subjects trained at once.
        pipeline: has the text encoders if any are trained; the batch then has what ``conditions.conditions`` takes.
        control: the control signal, which receives the batch's maps.
    """

    family: Family
    denoiser: Any
    subjects: int = 1
    pipeline: Any = None
    control: Control | None = None

    def __call__(self, **batch: Tensor) -> Tensor:
        """The loss of each subject, (subjects,), float32."""

        if self.control is not None:
            self.control.see(batch.pop("maps"))
        if self.pipeline is not None:
            encoded = {name: batch.pop(name) for name in list(batch) if belongs_to_text_encoder(name)}
            batch |= conditions(self.pipeline, encoded, self.denoiser.config)
        return denoising_losses(self.family, self.denoiser, **batch, subjects=self.subjects)
