"""The settings that ``benchmarks.beyond_lora`` tries, and the finalists among them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from delora_diffusers.methods.table import METHODS

REFERENCE = "reference"
Points = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Try:
    """A change of a common setting: the paper's rate with cosine decay, and a relative bound of 0.2.

    Attributes:
        train: flags of the training script. rate: multiple of the method's default learning rate.
        boundary: schedule of the boundary, as (share of training, factor).
    """

    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "delora"
    rate: float = 1.0
    boundary: Points = ()

    def flags(self) -> dict[str, Any]:
        base = {"method": self.method, "learning_rate": METHODS[self.method].learning_rate * self.rate}
        return base | COMMON | ({"relative_bound": 0.2} if self.method == "delora" else {}) | dict(self.train)


COMMON = {"lr_scheduler": "cosine"}
FIXED = {"lambda_learning_rate": 1e-12}
NO_START = {"start": "zero", **FIXED}
GROWS: Points = ((0, 0.01), (0.6, 1), (1, 1))
SHRINKS: Points = ((0, 1), (1, 0.5))
MIDDLE = {"weighting_scheme": "logit_normal", "logit_std": 0.5}
"""Timesteps near the middle of the schedule."""
UPPER_ATTENTION = tuple((block, layer) for block in (0, 1) for layer in range(3))
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
NO_KEYS = {"targets": ["to_q", "to_v", "to_out.0"]}
SELF, CROSS = ({"targets": [f"attn{k}.{name}" for name in PROJECTIONS]} for k in (1, 2))
UPPER = {
    "targets": [
        f"up_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn{k}.{name}"
        for block, layer in UPPER_ATTENTION
        for k in (1, 2)
        for name in PROJECTIONS
    ]
}


def lora(rate: float = 1.0, **train: Any) -> Try:
    return Try(train, "lora", rate)


TRIES: dict[str, Try] = {
    REFERENCE: Try(),
    # the boundary and the rate; the first two are the miniature's default and the earlier one
    "bound 0.25, constant rate x1/2": Try({"lr_scheduler": "constant", "relative_bound": 0.25}, rate=0.5),
    "bound 0.35, constant rate x1/2": Try({"lr_scheduler": "constant", "relative_bound": 0.35}, rate=0.5),
    "bound 0.25": Try({"relative_bound": 0.25}),
    "bound 0.25, linear decay": Try({"relative_bound": 0.25, "lr_scheduler": "linear"}),
    "bound 0.1": Try({"relative_bound": 0.1}),
    "bound 0.15": Try({"relative_bound": 0.15}),
    "bound 0.3": Try({"relative_bound": 0.3}),
    "bound 0.45": Try({"relative_bound": 0.45}),
    "rate x1/4": Try(rate=0.25),
    "rate x4": Try(rate=4.0),
    "constant rate": Try({"lr_scheduler": "constant"}),
    "constant rate x1/4": Try({"lr_scheduler": "constant"}, rate=0.25),
    "warm-up, then constant": Try({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 60}),
    "100 steps": Try({"max_train_steps": 100}),
    "900 steps": Try({"max_train_steps": 900}),
    # lambda
    "lambda fixed": Try(FIXED),
    "lambda's rate x10": Try({"lambda_learning_rate": 1e-2}),
    "lambda's rate x30, bound 0.05": Try({"lambda_learning_rate": 3e-2, "relative_bound": 0.05}),
    "boundary grows": Try(FIXED, boundary=GROWS),
    "boundary shrinks by half": Try({**FIXED, "relative_bound": 0.3}, boundary=SHRINKS),
    "B = 0, boundary grows": Try(NO_START, boundary=GROWS),
    # scale, start, rank
    "Frobenius scale": Try({"weight_norm": "frobenius"}),
    "zero start": Try({"start": "zero"}),
    "rank 4": Try({"rank": 4}),
    "rank 64": Try({"rank": 64}),
    # optimization and loss
    "EMA 0.99, constant rate, bound 0.25": Try(
        {"use_ema": True, "ema_decay": 0.99, "lr_scheduler": "constant", "relative_bound": 0.25}
    ),
    "EMA 0.99, constant rate": Try({"use_ema": True, "ema_decay": 0.99, "lr_scheduler": "constant"}),
    "no weight decay": Try({"adam_weight_decay": 0}),
    "weight decay 1": Try({"adam_weight_decay": 1}),
    "min-SNR": Try({"snr_gamma": 5}),
    "min-SNR, bound 0.45": Try({"snr_gamma": 5, "relative_bound": 0.45}),
    "min-SNR, bound 0.25, constant rate x1/2": Try(
        {"snr_gamma": 5, "relative_bound": 0.25, "lr_scheduler": "constant"}, rate=0.5
    ),
    "debiased": Try({"debiased_estimation_loss": True}),
    "logit-normal timesteps": Try({"weighting_scheme": "logit_normal"}),
    "middle timesteps": Try(MIDDLE),
    "middle timesteps, bound 0.15": Try({**MIDDLE, "relative_bound": 0.15}),
    "middle timesteps, bound 0.3": Try({**MIDDLE, "relative_bound": 0.3}),
    "middle timesteps, bound 0.25, constant rate x1/2": Try(
        {**MIDDLE, "relative_bound": 0.25, "lr_scheduler": "constant"}, rate=0.5
    ),
    "middle timesteps, B = 0, boundary grows": Try({**MIDDLE, **NO_START}, boundary=GROWS),
    "middle timesteps, lambda's rate x30, bound 0.05": Try(
        {**MIDDLE, "lambda_learning_rate": 3e-2, "relative_bound": 0.05}
    ),
    "middle timesteps, 900 steps": Try({**MIDDLE, "max_train_steps": 900}),
    "logit-normal timesteps, bound 0.3": Try({"weighting_scheme": "logit_normal", "relative_bound": 0.3}),
    "logit-normal timesteps, deviation 1.5, bound 0.25": Try(
        {"weighting_scheme": "logit_normal", "logit_std": 1.5, "relative_bound": 0.25}
    ),
    "logit-normal timesteps, constant rate": Try({"weighting_scheme": "logit_normal", "lr_scheduler": "constant"}),
    "logit-normal timesteps, constant rate, bound 0.25": Try(
        {"weighting_scheme": "logit_normal", "lr_scheduler": "constant", "relative_bound": 0.25}
    ),
    "output preservation 0.1": Try({"with_output_preservation": True, "output_preservation_weight": 0.1}),
    "caption dropout 0.1": Try({"caption_dropout": 0.1}),
    # targets
    "no keys": Try(NO_KEYS),
    "upper blocks": Try(UPPER),
    "self-attention": Try(SELF),
    "cross-attention": Try(CROSS),
    # LoRA
    "LoRA": lora(),
    "LoRA, rate x2": lora(2.0),
    "LoRA, rate x4": lora(4.0),
    "LoRA, 900 steps": lora(max_train_steps=900),
    "LoRA, rank 4": lora(rank=4),
    "LoRA, rank 64": lora(rank=64),
    "LoRA, EMA 0.99, constant rate": lora(use_ema=True, ema_decay=0.99, lr_scheduler="constant"),
    "LoRA, min-SNR, rate x4": lora(4.0, snr_gamma=5),
    "LoRA, middle timesteps": lora(**MIDDLE),
    "LoRA, middle timesteps, rate x2": lora(2.0, **MIDDLE),
    "LoRA, middle timesteps, rate x4": lora(4.0, **MIDDLE),
    "LoRA, upper blocks, rate x2": lora(2.0, **UPPER),
}
FINALISTS = (
    REFERENCE,
    "bound 0.3",
    "constant rate",
    "bound 0.25, constant rate x1/2",
    "min-SNR, bound 0.25, constant rate x1/2",
    "middle timesteps",
    "middle timesteps, bound 0.3",
    "middle timesteps, bound 0.25, constant rate x1/2",
    "middle timesteps, B = 0, boundary grows",
    "LoRA",
    "LoRA, rate x4",
    "LoRA, min-SNR, rate x4",
    "LoRA, middle timesteps, rate x2",
    "LoRA, middle timesteps, rate x4",
)
