"""The denoising objective: the weighted error of what the denoiser predicts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.adapter.attach import attachment
from delora_diffusers.adapter.control import Control
from delora_diffusers.families.family import Family
from delora_diffusers.pipelines.conditions import belongs_to_text_encoder, conditions

PRESERVED = "preserved"
"""The tensor of a batch that lists its rows for output preservation, (rows,)."""
BASE = "base/"
"""Prefix of the conditions that these rows have in the base model, if they are not those of the batch."""
OF_THE_LOSS = ("weights", "pixel_weights", "huber_c")
"""The tensors of a batch that the prediction does not depend on."""


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
    pixel_weights: Tensor | None = None,
    loss_type: str = "l2",
    huber_c: Tensor | None = None,
    **conditions: Tensor,
) -> Tensor:
    """Weighted error of the denoiser's prediction, (subjects,), float32; deterministic.

    Args:
        noisy, target: (batch, channels, height, width), float32.
        timesteps, weights: (batch,); see ``noising.Noising``.
        subjects: number of subjects in the batch, with equally many samples each, ordered by subject.
        pixel_weights: (batch, 1, height, width), of each latent's error.
        loss_type, huber_c: see ``errors``.
        conditions: (batch, ...) each, as the family's ``predict`` takes them.
    """
    prediction = predict(family, denoiser, noisy, timesteps, conditions)
    elementwise = errors(prediction, target, loss_type, huber_c)
    if pixel_weights is not None:
        elementwise = elementwise * pixel_weights
    return (elementwise.flatten(1).mean(dim=1) * weights).view(subjects, -1).mean(dim=1)


def predict(
    family: Family, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """The denoiser's prediction, (batch, channels, height, width), float32, computed in its dtype."""
    dtype = denoiser.dtype
    floating = {n: tensor.to(dtype) if tensor.is_floating_point() else tensor for n, tensor in conditions.items()}
    return family.predict(denoiser, noisy.to(dtype), timesteps, **floating).float()


@torch.no_grad()
def base_predictions(
    family: Family,
    denoiser: Any,
    rows: Tensor,
    base_conditions: Mapping[str, Tensor],
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """The target with the base model's own prediction in some rows, for output preservation.

    Args:
        rows: (rows,), their numbers.
        base_conditions: of these rows in the base model, as far as they differ from their conditions in the batch.
    """
    of_rows = {name: tensor.index_select(0, rows) for name, tensor in conditions.items()} | dict(base_conditions)
    with attachment(denoiser).adapter.disabled():
        prediction = predict(family, denoiser, noisy.index_select(0, rows), timesteps.index_select(0, rows), of_rows)
    return target.index_copy(0, rows, prediction.to(target.dtype))


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
        if PRESERVED in batch:
            rows = batch.pop(PRESERVED)
            base = {name.removeprefix(BASE): batch.pop(name) for name in list(batch) if name.startswith(BASE)}
            inputs = {name: tensor for name, tensor in batch.items() if name not in OF_THE_LOSS}
            batch["target"] = base_predictions(self.family, self.denoiser, rows, base, **inputs)
        return denoising_losses(self.family, self.denoiser, **batch, subjects=self.subjects, loss_type=self.loss_type)
