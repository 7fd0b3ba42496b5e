"""Which noise schedules the project can train on and sample with."""

from typing import Any

from diffusers import DDPMScheduler

from delora_diffusers.errors import InputError
from delora_diffusers.families.prediction import check_zero_snr, has_zero_snr
from delora_diffusers.names import PREDICTION_TYPES


def check_ddpm(scheduler: Any, name: str | None) -> None:
    """Reject a base model whose noise schedule is not that of a DDPM (Ho et al., NeurIPS 2020), though its family's is.

    EDM and flow matching scale the UNet's input and output in other ways; training them on a DDPM's schedule would
    work without an error and give a wrong model.

    Args:
        scheduler: the pipeline's. name: of the base model, for the message.

    Raises:
        InputError
    """
    config, kind = scheduler.config, type(scheduler).__name__
    problem = None
    if kind not in DDPMScheduler._compatibles or kind.startswith("EDM"):
        problem = f"has a {kind}, whose noise schedule is not that of a DDPM"
    elif config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        problem = f"predicts {config.prediction_type!r} and not {' or '.join(PREDICTION_TYPES)}"
    elif config.get("use_flow_sigmas") or config.get("timestep_type", "discrete") != "discrete":
        problem = f"has a {kind} with flow sigmas or continuous timesteps"
    if problem is not None:
        raise InputError(f"the base model {name} {problem}; choose a base model with the usual schedule.")
    check_zero_snr(scheduler, name)


def check_samples_from_noise(kind: type, scheduler: Any, flag: str) -> None:
    """Reject a class of schedulers for a base model with a terminal SNR of zero if its schedules have none.

    Args:
        scheduler: of the base model. flag: that chose the class, for the message.

    Raises:
        InputError
    """
    if scheduler.config.get("rescale_betas_zero_snr") and not has_zero_snr(kind):
        raise InputError(
            f"{flag} does not begin at pure noise, as this base model does, whose terminal SNR is zero; use ddim, "
            "ddpm, dpm++, euler, euler-a or unipc."
        )


def check_flow(scheduler: Any, name: str | None) -> None:
    """Reject a base model whose noise schedule is not that of a rectified flow, though its family's is.

    Raises:
        InputError
    """
    kind = type(scheduler).__name__
    if not kind.startswith("FlowMatch"):
        raise InputError(
            f"the base model {name} has a {kind}, whose noise schedule is not that of a flow; choose a base model with "
            "the usual schedule."
        )


def check_steps(scheduler: Any, steps: int, flag: str) -> None:
    """Reject a number of denoising steps with which a flow's schedule divides by zero.

    Args:
        flag: that gives the number, for the message.

    Raises:
        InputError
    """
    if steps < 2 and scheduler.config.get("shift_terminal"):
        raise InputError(f"--{flag} {steps} does not work with this base model's scheduler; use at least 2.")


def ddpm_schedule(scheduler: Any, name: str | None) -> DDPMScheduler:
    """The schedule of a DDPM to train on.

    Raises:
        InputError: see ``check_ddpm``; or the schedule has settings that are not supported.
    """
    check_ddpm(scheduler, name)
    try:
        schedule: Any = DDPMScheduler.from_config(scheduler.config)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise InputError(f"the base model {name} has a noise schedule that cannot be used ({error}).") from error
    return schedule
