"""What the denoiser of a DDPM predicts, and whether its noise schedule ends at pure noise."""

import inspect
from typing import Any

from delora_diffusers.errors import InputError


def set_prediction(pipeline: Any, name: str | None, prediction_type: str | None, zero_snr: bool | None) -> None:
    """Change the scheduler of a pipeline to what its denoiser was trained with, for training and for sampling.

    With a terminal SNR of zero, sampling has to begin at the last timestep, so its timesteps are ``trailing`` (Lin et
    al., WACV 2024, sections 3.1 and 3.3).

    Args:
        name: of the base model, for the message.
        prediction_type, zero_snr: None for what the scheduler says.

    Raises:
        InputError: see ``check_zero_snr``.
    """
    from diffusers import DDIMScheduler

    scheduler = pipeline.scheduler
    changes: dict[str, Any] = {}
    if prediction_type not in (None, scheduler.config.get("prediction_type", "epsilon")):
        changes["prediction_type"] = prediction_type
    if zero_snr not in (None, bool(scheduler.config.get("rescale_betas_zero_snr"))):
        changes["rescale_betas_zero_snr"] = zero_snr
        if zero_snr:
            changes["timestep_spacing"] = "trailing"
    if not changes:
        return
    kind = type(scheduler)
    if zero_snr and not has_zero_snr(kind):
        kind = DDIMScheduler
        changes["clip_sample"] = scheduler.config.get("clip_sample", False)  # DDIM's default is for pixels
    pipeline.scheduler = kind.from_config(scheduler.config, **changes)
    check_zero_snr(pipeline.scheduler, name)


def has_zero_snr(scheduler_class: type) -> bool:
    """Whether a class of schedulers can rescale its schedule to a terminal SNR of zero."""
    return "rescale_betas_zero_snr" in inspect.signature(scheduler_class.__init__).parameters


def check_zero_snr(scheduler: Any, name: str | None) -> None:
    """Reject a terminal SNR of zero with a denoiser that predicts the noise.

    At the last timestep its input is the noise that it should predict, so that the prediction says nothing about the
    image, and samplers would divide it by zero.

    Raises:
        InputError
    """
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise InputError(
            f"the base model {name} predicts epsilon, which does not work with a terminal SNR of zero; pass "
            "--prediction_type v_prediction if it was trained so, or --no-rescale_betas_zero_snr."
        )
