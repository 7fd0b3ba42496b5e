"""The denoising objective: the weighted error of what the denoiser predicts."""

import dataclasses
from typing import Any

from torch import Tensor

from delora_diffusers.adapter.control import Control
from delora_diffusers.families.family import Family
from delora_diffusers.pipelines.conditions import belongs_to_text_encoder, conditions


def errors(prediction: Tensor, target: Tensor, loss_type: str = "l2", huber_c: Tensor | None = None) -> Tensor:
    """The error of each element, (batch, channels, height, width), float32.

    ``l2`` is the squared error e^2. ``huber`` is pseudo-Huber, ``2 c (sqrt(e^2 + c^2) - c)``: close to e^2 below the
    threshold c, and linear above. ``smooth_l1`` is that divided by c, close to 2 |e| above (Khrapov et al., arXiv
    2403.16728; the factors are those of diffusers' and kohya's scripts).

    Args:
        prediction, target: (batch, channels, height, width).
        huber_c: the thresholds, (batch,); not for ``l2``.
    """
    squared = (prediction.float() - target.float()).square()
    if loss_type == "l2":
        return squared
    assert huber_c is not None
    c = huber_c.view(-1, *[1] * (squared.ndim - 1))
    smooth = 2 * squared / ((squared + c.square()).sqrt() + c)  # 2 (sqrt(e^2 + c^2) - c) without cancellation
    return c * smooth if loss_type == "huber" else smooth


def denoising_losses(
    family: Family,
    denoiser: Any,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    weights: Tensor,
    subjects: int = 1,
    loss_type: str = "l2",
    huber_c: Tensor | None = None,
    **conditions: Tensor,
) -> Tensor:
    """Weighted error of the denoiser's prediction, (subjects,), float32; deterministic.

    Args:
        noisy, target: (batch, channels, height, width), float32.
        timesteps, weights: (batch,); see ``noising.Noising``.
        subjects: number of subjects in the batch, with equally many samples each, ordered by subject.
        loss_type, huber_c: see ``errors``.
        conditions: (batch, ...) each, as the family's ``predict`` takes them.
    """
    dtype = denoiser.dtype
    floating = {n: tensor.to(dtype) if tensor.is_floating_point() else tensor for n, tensor in conditions.items()}
    prediction = family.predict(denoiser, noisy.to(dtype), timesteps, **floating)
    means = errors(prediction, target, loss_type, huber_c).flatten(1).mean(dim=1)
    return (means * weights).view(subjects, -1).mean(dim=1)


@dataclasses.dataclass(frozen=True)
class Losses:
    """Computes the losses of a micro-batch from its tensors, given by name.

    Attributes:
        family: of the base model. denoiser: with its adapter. subjects: number of subjects trained at once.
        pipeline: has the text encoders if any are trained; the batch then has what ``conditions.conditions`` takes.
        control: the control signal, which receives the batch's maps. loss_type: see ``errors``.
    """

    family: Family
    denoiser: Any
    subjects: int = 1
    pipeline: Any = None
    control: Control | None = None
    loss_type: str = "l2"

    def __call__(self, **batch: Tensor) -> Tensor:
        """The loss of each subject, (subjects,), float32."""

        if self.control is not None:
            self.control.see(batch.pop("maps"))
        if self.pipeline is not None:
            encoded = {name: batch.pop(name) for name in list(batch) if belongs_to_text_encoder(name)}
            batch |= conditions(self.pipeline, encoded, self.denoiser.config)
        return denoising_losses(self.family, self.denoiser, **batch, subjects=self.subjects, loss_type=self.loss_type)
