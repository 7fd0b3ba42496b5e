"""The denoising objective: add noise to latents, predict it, weight the squared error."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.adapter.control import Control
from delora_diffusers.families.table import Family
from delora_diffusers.pipelines.conditions import encode_tokens, text_encoders


def snr(noise_scheduler, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)`` at each timestep, (batch,)."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod).clamp_min(1e-12)


def loss_weights(noise_scheduler, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
    """Weight of each sample's squared error, (batch,): 1, or min-SNR-gamma (Hang et al., ICCV 2023, section 3.4).

    Min-SNR is ``min(SNR, gamma) / SNR`` for epsilon prediction and ``min(SNR, gamma) / (SNR + 1)`` for v-prediction.
    """
    if snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    ratio = snr(noise_scheduler, timesteps)
    divisor = ratio + 1 if noise_scheduler.config.prediction_type == "v_prediction" else ratio.clamp_min(1e-12)
    return ratio.clamp_max(snr_gamma) / divisor


def sample_noise(latents: Tensor, noise_offset: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise like the latents, (batch, channels, height, width), plus a random offset per channel."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    if noise_offset:
        offset = torch.randn((*latents.shape[:2], 1, 1), generator=generator, device=latents.device)
        noise = noise + noise_offset * offset
    return noise


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
    """``--noise_offset`` and ``--snr_gamma``."""

    noise_offset: float = 0.0
    snr_gamma: float | None = None


def noised(
    noise_scheduler,
    latents: Tensor,
    generator: torch.Generator,
    settings: NoiseSettings = NoiseSettings(),
    sample_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sample the noise and timesteps of a micro-batch; returns those arguments of ``denoising_losses`` by name.

    Args:
        latents: (batch, channels, height, width), float32, scaled.
        generator: samples noise and timesteps, on the latents' device.
        sample_weights: (batch,), for prior preservation; None for equal weights.
    """
    noise = sample_noise(latents, settings.noise_offset, generator)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(latents),), generator=generator, device=latents.device)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    # Before the weights are computed, because add_noise moves the schedule to the device.
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    weights = loss_weights(noise_scheduler, timesteps, settings.snr_gamma)
    if sample_weights is not None:
        weights = weights * sample_weights
    return {"noisy": noisy, "timesteps": timesteps, "target": target, "weights": weights}


def denoising_losses(
    family: Family,
    unet,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    weights: Tensor,
    subjects: int = 1,
    **conditions: Tensor,
) -> Tensor:
    """Weighted squared error of the UNet's prediction, (subjects,), float32; deterministic.

    Args:
        unet: predicts epsilon or v, according to ``noise_scheduler.config.prediction_type``.
        noisy, target: (batch, channels, height, width), float32.
        timesteps, weights: (batch,).
        subjects: number of subjects in the batch, with equally many samples each, ordered by subject.
        conditions: (batch, ...) each, as the family's ``predict`` takes them.
    """
    dtype = unet.dtype
    floating = {n: tensor.to(dtype) if tensor.is_floating_point() else tensor for n, tensor in conditions.items()}
    prediction = family.predict(unet, noisy.to(dtype), timesteps, **floating)
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (errors * weights).view(subjects, -1).mean(dim=1)


@dataclasses.dataclass(frozen=True)
class Losses:
    """Computes the losses of a micro-batch from its tensors, given by name.

    Attributes:
        family: of the base model. unet: with its adapter. subjects: number of subjects trained at once.
        pipeline: has the text encoders if they are trained; the batch then contains tokens instead of embeddings.
        control: the control signal, which receives the batch's maps.
    """

    family: Family
    unet: torch.nn.Module
    subjects: int = 1
    pipeline: Any = None
    control: Control | None = None

    def __call__(self, **batch: Tensor) -> Tensor:
        """The loss of each subject, (subjects,), float32."""

        if self.control is not None:
            self.control.see(batch.pop("maps"))
        if self.pipeline is not None:
            batch |= encode_tokens(self.pipeline, {name: batch.pop(name) for name in text_encoders(self.pipeline)})
        return denoising_losses(self.family, self.unet, **batch, subjects=self.subjects)
