"""The configuration of an adapter, which is stored in the adapter file. Imports no torch."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS

STARTS = ("frozen", "zero")
WEIGHT_NORMS = ("column", "frobenius", "none")
PATHS = ("auto", "fast", "lean", "split")
SPLIT_DTYPES = ("float32", "model")

EVERYTHING = "*"
"""The target that selects every parameter of the model."""
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
MAP_TARGETS = (*UNET_TARGETS, "ff.net.0.proj")
"""Training on semantic maps also adapts the input projection of the feed-forward blocks, as OFT's control code does."""
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

MAX_TARGETS = 10_000
MAX_NUMBER = 1e30
"""The largest setting; float32 cannot store much more."""

RELATIVE_BOUND = 0.25
"""Default bound on |dW|_F / |W|_F at any model width; twice that with a frozen start, which subtracts a product."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """How the projections of one model are adapted.

    Args:
        method: a key of ``methods.table.METHODS``; ``"delora"`` is the method of Bini et al., ICLR 2025.
        rank: number r of rank-1 terms in each update.
        delora_lambda: initial boundary (the paper's lambda), the same for every matrix. None derives it from
            ``relative_bound``. The multiplicative relaxations start at ETHER+'s boundary, 1.
        relative_bound: DeLoRA's initial boundary b relative to each matrix, ``|dW|_F <= b |W|_F`` for each low-rank
            product: lambda is ``b sqrt(in)`` with the column scale, ``b`` with the Frobenius scale, ``b |W|_F`` without
            a scale. None is ``RELATIVE_BOUND``.
        start: ``"frozen"`` subtracts a frozen copy of the random start, ``"zero"`` starts from B = 0, as PEFT does.
        weight_norm: the scale c of the update: ``"column"`` (c_j = |W[:, j]|, the authors' code and PEFT),
            ``"frobenius"`` (c = |W|_F, equation 8) or ``"none"``.
        alpha: LoRA's and DoRA's alpha; None means 2 * rank, the paper's setting for its LoRA baseline.
        blocks: number of diagonal blocks in ETHER, ETHER+ and OFT; None means the papers' 1, 1 and 4.
        coft_eps: OFT's constraint (COFT) on each of the n blocks Q of size s: ``|Q|_F <= coft_eps s^2 / sqrt(n)``.
            OFT's scripts use 6e-5. None for no constraint.
        targets: suffixes of the names of the ``nn.Linear`` modules to adapt, as in ``model.named_modules()``; with full
            fine-tuning, ``("*",)`` selects every parameter of the model.
        path: ``"fast"`` computes the adapted weights W' of the whole model once per step, and one product per
            projection; ``"lean"`` computes W' of a projection each time it is used, so that none is kept for the
            backward; ``"split"`` computes ``x W^T + (x A~^T) B~^T``, so that the update is not rounded to the model's
            dtype as part of W'. ``"auto"`` is fast for small models, lean for large ones and split if the model is
            quantized; see ``adapter.paths``.
        split_dtype: ``"float32"`` computes the second term of the split path in float32, ``"model"`` in the model's
            dtype, which is faster. None is float32, or the model's dtype if the model is quantized.

    Raises:
        InputError: a value is invalid.
    """

    method: str = "delora"
    rank: int = 16
    delora_lambda: float | None = None
    relative_bound: float | None = None
    start: str = "frozen"
    weight_norm: str = "column"
    alpha: float | None = None
    blocks: int | None = None
    coft_eps: float | None = None
    targets: tuple[str, ...] = UNET_TARGETS
    path: str = "auto"
    split_dtype: str | None = None

    def __post_init__(self):
        if isinstance(self.targets, str) or not isinstance(self.targets, Sequence):
            raise InputError(f"targets is {self.targets!r}; give a list of module names, for example to_q.")
        if len(self.targets) > MAX_TARGETS:
            raise InputError(
                f"targets has {len(self.targets)} names, more than {MAX_TARGETS}; give endings such as to_q."
            )
        object.__setattr__(self, "targets", tuple(self.targets))
        unnamed = [target for target in self.targets if not isinstance(target, str) or not target]
        if unnamed:
            raise InputError(f"targets contains {unnamed[0]!r}; give module names, for example to_q.")
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("start", STARTS),
            ("weight_norm", WEIGHT_NORMS),
            ("path", PATHS),
            *([("split_dtype", SPLIT_DTYPES)] if self.split_dtype is not None else []),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        method = METHODS[self.method]
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank is {self.rank!r}; give a positive integer.")
        if self.path in ("lean", "split") and not method.has_factors:
            raise InputError(f"path is {self.path!r}, which {method.title} does not support; use 'fast' or 'auto'.")
        if self.split_dtype is not None and self.path not in ("auto", "split"):
            raise InputError(f"split_dtype is {self.split_dtype!r}, but path is {self.path!r}; leave out one of them.")
        if self.blocks is not None and (not isinstance(self.blocks, int) or self.blocks is True or self.blocks < 1):
            raise InputError(f"blocks is {self.blocks!r}; give a positive integer.")
        for name in ("delora_lambda", "relative_bound", "alpha", "coft_eps"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise InputError(f"{name} is {value!r}; give a positive number.")
        if self.relative_bound is not None and self.method != "delora":
            raise InputError(f"relative_bound belongs to the method delora, not {self.method}; leave it out.")
        if self.relative_bound is not None and self.delora_lambda is not None:
            raise InputError("relative_bound and delora_lambda both set the boundary; give only one of them.")
        if self.coft_eps is not None and self.method != "oft":
            raise InputError(f"coft_eps is {self.coft_eps}, but {method.title} has no such constraint; leave it out.")
        if EVERYTHING in self.targets and self.method != "full":
            raise InputError(f"targets is *, but {method.title} adapts linear modules only; list them.")
        if not self.targets:
            raise InputError("targets is empty; give at least one module name, for example to_q.")

    def as_recorded(self) -> dict[str, Any]:
        """The settings as an adapter file contains them, without unset ones that older versions do not know.

        Nor does the file have the relative bound: it has the boundaries themselves.
        """
        values = dataclasses.asdict(self)
        del values["relative_bound"]
        unset = {"coft_eps": None, "split_dtype": None, "path": "auto"}
        return {name: value for name, value in values.items() if name not in unset or value != unset[name]}

    @property
    def number_of_blocks(self) -> int:
        """The number of diagonal blocks in ETHER, ETHER+ and OFT."""
        return self.blocks or (4 if self.method == "oft" else 1)

    @property
    def lora_scale(self) -> float:
        """LoRA's alpha / r."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


def _is_positive(value: Any) -> bool:
    """Whether a setting, which may come from any file, is a positive number that a float can store."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= MAX_NUMBER and math.isfinite(value)
