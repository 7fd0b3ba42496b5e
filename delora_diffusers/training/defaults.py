"""Defaults that depend on the base model, on what is trained and on ``--recipe``. Imports no torch."""

import argparse
from typing import TYPE_CHECKING, Any

from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import check_prompt_chunks
from delora_diffusers.methods.config import EVERYTHING
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import is_miniature
from delora_diffusers.training.optimizer_flags import with_optimizer_defaults

if TYPE_CHECKING:
    from delora_diffusers.families.family import Family

MINIATURE_DEFAULTS: dict[str, Any] = {
    "resolution": [128],
    "bucket_step": 16,
    "train_batch_size": 4,
    "max_train_steps": 300,
    "validation_steps": 100,
    "guidance_scale": 4.0,
}
"""Defaults of the included miniature that differ from Stable Diffusion 1.5's; see docs/miniature.md for the search."""


DENSITIES = ("none", "logit_normal", "mode")
"""The ``--weighting_scheme`` that only sample times, which DDPMs can use too."""


RECIPES: dict[str, float | None] = {"default": None, "paper": 0.35}
"""DeLoRA's relative bound by ``--recipe``; None is ``methods.config.RELATIVE_BOUND``. The paper (Bini et al., ICLR
2025) prints no initial boundary for images; 0.35 was the default before. Rank, targets and, on real models, learning
rates are the paper's in both."""

MINIATURE_RATE = 1e-2
"""DeLoRA's learning rate on the included miniature, half of the paper's; see docs/miniature.md."""

MAP_BOUND = RECIPES["paper"]
"""DeLoRA's relative bound for semantic maps; the smaller one was found on subjects."""


def with_defaults(args: argparse.Namespace, maps: bool = False) -> argparse.Namespace:
    """Fill in what the recipe, the optimizer and the method set where nothing was given; returns new arguments.

    Args:
        maps: whether the defaults are those for semantic maps.
    """
    args = argparse.Namespace(**vars(args))
    args.resolutions = sorted(set(args.resolution))
    args.resolution = args.resolutions[-1]
    args.gradient_checkpointing = args.gradient_checkpointing or args.offload
    rate = METHODS[args.method].default_rate(maps)
    if args.method == "delora" and not maps and is_miniature(args.pretrained_model_name_or_path):
        rate = MINIATURE_RATE
    args = with_optimizer_defaults(args, rate)
    if args.method == "delora" and args.relative_bound is None and not (args.delora_lambda or args.init_adapter):
        args.relative_bound = MAP_BOUND if maps else RECIPES[args.recipe]
    if args.targets is None and args.method == "full":
        args.targets = [EVERYTHING]
    return args


def with_family_defaults(args: argparse.Namespace, family: "Family") -> argparse.Namespace:
    """Fill in the defaults of the base model's family where nothing was given; returns new arguments.

    Raises:
        InputError: a flag does not apply to the family.
    """
    name = args.pretrained_model_name_or_path
    kind = "a flow model" if family.IS_FLOW else "a DDPM"
    if not family.IS_FLOW and args.weighting_scheme not in (None, *DENSITIES):
        raise InputError(
            f"--weighting_scheme {args.weighting_scheme} does not apply to {name}, which is {kind}; use one of "
            f"{', '.join(DENSITIES)}."
        )
    diffusion_only, flow_only = ("snr_gamma", "debiased_estimation_loss"), ("timestep_shift",)
    for flag in diffusion_only if family.IS_FLOW else flow_only:
        if getattr(args, flag) not in (None, False):
            raise InputError(f"--{flag} does not apply to {name}, which is {kind}; leave it out.")
    if getattr(args, "train_text_encoder", False) and not family.TRAINABLE_ENCODERS:
        raise InputError(f"--train_text_encoder trains CLIP, which {name} does not have; leave it out.")
    if getattr(args, "subjects_file", None) is not None and family.DENOISER != "unet":
        raise InputError(
            f"--subjects_file trains several subjects at once only on a UNet, which {name} does not have; train them "
            "one after another."
        )
    check_prompt_chunks(family, name, args.max_prompt_chunks)
    args = argparse.Namespace(**vars(args))
    scheme = args.weighting_scheme or (family.WEIGHTING_SCHEME if family.IS_FLOW else None)
    for flag, user in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode")):
        if getattr(args, flag) is not None and scheme != user:
            raise InputError(f"--{flag} belongs to --weighting_scheme {user}, which is not used; leave out --{flag}.")
    if args.loss_type != "l2":
        if family.IS_FLOW and args.huber_schedule == "snr":
            raise InputError(f"--huber_schedule snr does not apply to {name}, which is {kind}; use exponential.")
        args.huber_c = 0.1 if args.huber_c is None else args.huber_c
        args.huber_schedule = args.huber_schedule or ("exponential" if family.IS_FLOW else "snr")
    args.targets = args.targets or list(family.TARGETS)
    args.guidance_scale = family.GUIDANCE_SCALE if args.guidance_scale is None else args.guidance_scale
    args.weighting_scheme = scheme
    return args
