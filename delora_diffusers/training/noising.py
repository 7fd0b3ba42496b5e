"""What the denoiser is trained on: latents with noise of a random time, and what it should predict of them."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from delora_diffusers.families.loading import OpenModel
from delora_diffusers.pipelines.noise_schedule import check_flow, ddpm_schedule


class Noising(Protocol):
    """Samples the noise and the timesteps of a micro-batch."""

    def __call__(self, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Those arguments of ``denoising_losses`` by name: noisy, timesteps, target, weights, maybe huber_c.

        Args:
            latents: (batch, channels, height, width), float32, scaled.
            generator: samples noise and timesteps, on the latents' device.
        """
        ...


def noising_of(model: OpenModel, args: argparse.Namespace) -> Noising:
    """The noising that a base model was trained with, and the flags that change it.

    Raises:
        InputError: its noise schedule is not its family's.
    """
    name, scheduler = args.pretrained_model_name_or_path, model.pipeline.scheduler
    huber = None if args.loss_type == "l2" else Huber(args.huber_c, args.huber_schedule)
    if not model.family.IS_FLOW:
        schedule = ddpm_schedule(scheduler, name)
        density = density_of(args, args.weighting_scheme or "none")
        return Diffusion(schedule, args.snr_gamma, args.noise_offset, args.debiased_estimation_loss, huber, density)
    check_flow(scheduler, name)
    config, shift = scheduler.config, args.timestep_shift
    if shift is None:
        shift = 1.0 if config.get("use_dynamic_shifting") else config.shift
    return Flow(
        density_of(args, args.weighting_scheme or model.family.WEIGHTING_SCHEME),
        shift,
        model.family.PATCH,
        [config.get(name, usual) for name, usual in SHIFTS_BY_SIZE.items()],
        args.noise_offset,
        huber,
    )


@dataclasses.dataclass(frozen=True)
class Density:
    """How times t are sampled: 1 - u, where u has the density of a weighting scheme (Esser et al., ICML 2024, section
    3.1), uniform if the scheme only weights the loss.

    Attributes:
        scheme: diffusers' name. logit_mean, logit_std, mode_scale: parameters of ``logit_normal`` and ``mode``.
    """

    scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def times(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Random times, (count,), from 0, the image, to 1, the noise."""
        u = compute_density_for_timestep_sampling(
            self.scheme, count, self.logit_mean, self.logit_std, self.mode_scale, device=device, generator=generator
        )
        return 1 - u


def density_of(args: argparse.Namespace, scheme: str) -> Density:
    """The density that the flags describe."""
    return Density(
        scheme,
        0.0 if args.logit_mean is None else args.logit_mean,
        1.0 if args.logit_std is None else args.logit_std,
        1.29 if args.mode_scale is None else args.mode_scale,
    )


@dataclasses.dataclass(frozen=True)
class Huber:
    """The thresholds of a scheduled pseudo-Huber loss (Khrapov et al., arXiv 2403.16728).

    They are c, or go from 1 without noise to c: ``c^(t / T)`` for ``exponential``, and for ``snr``
    ``(1 - c) / (1 + sigma)^2 + c`` with sigma^2 = 1 / SNR. The formulas are those of diffusers' research project.

    Attributes:
        c: the smallest threshold. schedule: ``constant``, ``exponential`` or ``snr``.
    """

    c: float
    schedule: str

    def thresholds(self, times: Tensor, snr: Tensor | None = None) -> Tensor:
        """The threshold of each sample, (batch,).

        Args:
            times: t / T, (batch,), in 0 to 1. snr: (batch,), for ``snr`` only.
        """
        if self.schedule == "exponential":
            return self.c**times
        if self.schedule == "constant":
            return torch.full_like(times, self.c)
        assert snr is not None
        return (1 - self.c) / (1 + snr.rsqrt()).square() + self.c


SHIFTS_BY_SIZE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""Settings of a flow's scheduler, with those of Flux: two numbers of tokens and the log of the shift at each; it is
linear between them."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """Noising of a rectified flow: ``(1 - t) z + t noise``, of which the velocity ``noise - z`` is predicted.

    A time t of the density is shifted to ``shift t / (1 + (shift - 1) t)`` (Esser et al., ICML 2024, equation 23).

    Attributes:
        density: of times; its scheme also weights the loss by time, if it is ``sigma_sqrt`` or ``cosmap``.
        shift: a number, or ``"resolution"`` for one that grows with the number of tokens.
        patch: side of the denoiser's patches of latents. shifts_by_size: the values of ``SHIFTS_BY_SIZE``.
        noise_offset: see ``sample_noise``. huber: the loss's thresholds, if it has any.
    """

    density: Density
    shift: float | str
    patch: int
    shifts_by_size: Sequence[Any]
    noise_offset: float = 0.0
    huber: Huber | None = None

    def __call__(self, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        noise = sample_noise(latents, self.noise_offset, generator)
        times = self.times(latents, generator)
        t = times[:, None, None, None]
        # Diffusers' schedules have no time below 0.001, where the weights of sigma_sqrt would be without bound.
        weights: Tensor = compute_loss_weighting_for_sd3(self.density.scheme, times.clamp_min(1e-3))
        noisy = (1 - t) * latents + t * noise
        batch = {"noisy": noisy, "timesteps": times, "target": noise - latents, "weights": weights}
        return batch if self.huber is None else batch | {"huber_c": self.huber.thresholds(times)}

    def times(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """A random time for each latent, (batch,), in 0 to 1."""
        t = self.density.times(len(latents), generator, latents.device)
        shift = self.shift
        if isinstance(shift, str):
            tokens = latents.shape[-2] * latents.shape[-1] // self.patch**2
            shift = math.exp(calculate_shift(tokens, *self.shifts_by_size))
        return shift * t / (1 + (shift - 1) * t)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Noising of a DDPM, of which the noise or v is predicted, as the scheduler says.

    Attributes:
        scheduler: of the base model. snr_gamma, debiased: see ``loss_weights``. noise_offset: see ``sample_noise``.
        huber: the loss's thresholds, if it has any.
        density: of timesteps.
    """

    scheduler: DDPMScheduler
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    debiased: bool = False
    huber: Huber | None = None
    density: Density = Density()

    def __call__(self, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        scheduler: Any = self.scheduler
        noise = sample_noise(latents, self.noise_offset, generator)
        steps = scheduler.config.num_train_timesteps
        if self.density.scheme == "none":
            timesteps = torch.randint(0, steps, (len(latents),), generator=generator, device=latents.device)
        else:
            times = self.density.times(len(latents), generator, latents.device)
            timesteps = (times * steps).long().clamp(max=steps - 1)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        # Before the weights are computed, because add_noise moves the schedule to the device.
        noisy = scheduler.add_noise(latents, noise, timesteps)
        weights = loss_weights(scheduler, timesteps, self.snr_gamma, self.debiased)
        batch = {"noisy": noisy, "timesteps": timesteps, "target": target, "weights": weights}
        if self.huber is not None:
            batch["huber_c"] = self.huber.thresholds(timesteps / steps, snr(scheduler, timesteps))
        return batch


def sample_noise(latents: Tensor, noise_offset: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise like the latents, (batch, channels, height, width), plus a random offset per channel."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    if noise_offset:
        offset = torch.randn((*latents.shape[:2], 1, 1), generator=generator, device=latents.device)
        noise = noise + noise_offset * offset
    return noise


def snr(noise_scheduler, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)`` at each timestep, (batch,)."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod).clamp_min(1e-12)


LARGEST_SNR = 1000.0
"""Debiased estimation limits the SNR to this, as kohya's scripts do: without noise it has no bound."""


def loss_weights(noise_scheduler, timesteps: Tensor, snr_gamma: float | None, debiased: bool = False) -> Tensor:
    """Weight of each sample's error, (batch,): 1, min-SNR-gamma (Hang et al., ICCV 2023, section 3.4), or debiased
    estimation (Yu et al., arXiv 2310.08442).

    Min-SNR is ``min(SNR, gamma) / SNR`` for epsilon prediction and ``min(SNR, gamma) / (SNR + 1)`` for v-prediction.
    Debiased estimation is ``1 / sqrt(SNR)`` for epsilon prediction and, as in kohya's scripts, ``1 / (SNR + 1)`` for v.
    """
    if snr_gamma is None and not debiased:
        return torch.ones(timesteps.shape, device=timesteps.device)
    ratio = snr(noise_scheduler, timesteps)
    predicts_v = noise_scheduler.config.prediction_type == "v_prediction"
    if debiased:
        ratio = ratio.clamp(1e-12, LARGEST_SNR)
        return 1 / (ratio + 1) if predicts_v else ratio.rsqrt()
    divisor = ratio + 1 if predicts_v else ratio.clamp_min(1e-12)
    assert snr_gamma is not None
    return ratio.clamp_max(snr_gamma) / divisor
