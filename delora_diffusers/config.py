"""What an adapter is, in one small record that travels inside the adapter file."""

import dataclasses
import math

from delora_diffusers.errors import InputError

METHOD_TITLES = {
    "delora": "DeLoRA",
    "lora": "LoRA",
    "dora": "DoRA",
    "dora_fixed_magnitude": "DoRA with fixed magnitude",
    "ether": "ETHER",
    "etherplus": "ETHER+",
    "etherplus_onesided": "one-sided ETHER+",
    "oft": "OFT",
    "delora_symmetric": "symmetric multiplicative DeLoRA",
    "delora_multiplicative": "multiplicative DeLoRA",
    "full": "full fine-tuning",
}
METHOD_NAMES = tuple(METHOD_TITLES)
RANKED = ("delora", "lora", "dora", "dora_fixed_magnitude", "delora_symmetric", "delora_multiplicative")
"""Methods that have a rank."""
SPLIT = ("delora", "lora")
"""Methods whose update is a low-rank sum of its own, which the split path needs."""
STARTS = ("frozen", "zero")
WEIGHT_NORMS = ("column", "frobenius", "none")
PATHS = ("fast", "split")

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
MAP_TARGETS = (*UNET_TARGETS, "ff.net.0.proj", "ff.net.2")
"""The paper's for semantic maps: feed-forward layers too."""
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

RELATIVE_BOUND = 0.35
"""Default bound on one rank-r term's size relative to the weight, |dW|_F / |W|_F, whatever the width of the model."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """How the projections of one model are adapted.

    Args:
        method: one of ``METHOD_TITLES``; ``"delora"`` is that of Bini et al., ICLR 2025.
        rank: number of rank-1 terms r of each update.
        delora_lambda: initial boundary, the paper's lambda, the same for every matrix. None chooses it for each
            matrix by its width so that ``|dW|_F <= 0.35 |W|_F`` for each low-rank term: ``0.35 sqrt(in)`` with the
            column scale, ``0.35`` with the Frobenius scale, ``0.35 |W|_F`` without a scale. The multiplicative
            relaxations begin at ETHER+'s boundary, 1.
        start: ``"frozen"`` subtracts a frozen copy of the random start, ``"zero"`` starts from B = 0 (PEFT's).
        weight_norm: the scale c of the update: ``"column"`` (c_j = |W[:, j]|, the authors' code and PEFT),
            ``"frobenius"`` (c = |W|_F, equation 8) or ``"none"``.
        alpha: LoRA's and DoRA's alpha; None means 2 * rank, the paper's setting for its LoRA baseline.
        blocks: diagonal blocks of ETHER, ETHER+ and OFT; None for the paper's, 1, 1 and 4.
        targets: endings of the names of the ``nn.Linear`` modules to adapt, as in ``model.named_modules()``; with full
            fine-tuning ``("*",)`` is every parameter of the model.
        path: ``"fast"`` runs one product per projection with the adapted weight W'; ``"split"`` runs
            ``x W^T + (x A~^T) B~^T`` with the second term in float32, exact where W' would be rounded to the
            model's dtype.

    Raises:
        InputError: for a value outside the ones above.
    """

    method: str = "delora"
    rank: int = 16
    delora_lambda: float | None = None
    start: str = "frozen"
    weight_norm: str = "column"
    alpha: float | None = None
    blocks: int | None = None
    targets: tuple[str, ...] = UNET_TARGETS
    path: str = "fast"

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        for name, allowed in (
            ("method", METHOD_NAMES),
            ("start", STARTS),
            ("weight_norm", WEIGHT_NORMS),
            ("path", PATHS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank is {self.rank!r}; give a whole number of at least 1.")
        if self.path == "split" and self.method not in SPLIT:
            raise InputError(f"path is 'split', which {METHOD_TITLES[self.method]} does not have; use 'fast'.")
        if self.blocks is not None and (isinstance(self.blocks, bool) or self.blocks < 1):
            raise InputError(f"blocks is {self.blocks!r}; give a whole number of at least 1.")
        for name in ("delora_lambda", "alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value!r}; give a positive number.")
        if "*" in self.targets and self.method != "full":
            raise InputError(f"targets is *, but {METHOD_TITLES[self.method]} adapts linear modules; name them.")
        if not self.targets:
            raise InputError("targets is empty; name at least one module, for example to_q.")

    @property
    def number_of_blocks(self) -> int:
        """Diagonal blocks of ETHER, ETHER+ and OFT."""
        return self.blocks or (4 if self.method == "oft" else 1)

    @property
    def lora_scale(self) -> float:
        """LoRA's alpha / r."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank
