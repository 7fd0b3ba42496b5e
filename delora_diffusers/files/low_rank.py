"""Saved adapters as plain low-rank factors: extracted, summed and truncated.

DeLoRA's update is low-rank by construction, ``W' - W = B~ A~`` of rank r from a zero start and 2r from a frozen one,
and LoRA's is of rank r, so both convert to a plain LoRA without loss and without the pretrained weights.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import low_rank_functions
from delora_diffusers.methods.table import METHODS


@dataclasses.dataclass(frozen=True)
class Factors:
    """``W' - W = b @ a`` of one module: b (out, k), a (k, in), float32."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def norm(self) -> float:
        """``|b a|_F``, computed from two k x k products."""
        b, a = self.b.double(), self.a.double()
        return math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


def module_tensors(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Tensor names by module and key: ``{"unet.mid...to_q": {"A": "unet.mid...to_q.delora_A", ...}}``."""
    by_module: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        if "_" in last:
            by_module.setdefault(module, {})[last.partition("_")[2]] = name
    return by_module


def low_rank_factors(component: str, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors of every module of one component of an adapter file.

    Args:
        component: ``"unet"``, ...; the names of its tensors begin with it.
        config: the component's configuration. tensors: all tensors of the file.

    Raises:
        InputError: the method's update is not low-rank.
    """
    if not METHODS[config.method].has_factors:
        raise InputError(
            f"the update of {METHODS[config.method].title} is not low-rank and cannot be stored as LoRA; use merge."
        )
    names = [name for name in tensors if name.startswith(component + ".")]
    by_module = {}
    for module, keys in module_tensors(names).items():
        stacked = {key: tensors[name].float()[None] for key, name in keys.items()}
        b, a = low_rank_functions(config.method).factors(stacked, config)
        by_module[module.removeprefix(component + ".")] = Factors(b[0], a[0])
    return by_module


def summed(terms: Iterable[tuple[Mapping[str, Factors], float]]) -> dict[str, Factors]:
    """``sum_i s_i (W_i' - W)`` of each module: the concatenated factors, of rank ``sum_i k_i``."""
    scaled: dict[str, list[Factors]] = {}
    for by_module, strength in terms:
        for module, factors in by_module.items():
            scaled.setdefault(module, []).append(Factors(factors.b * strength, factors.a))
    for module, members in scaled.items():
        shapes = {(factors.b.shape[0], factors.a.shape[1]) for factors in members}
        if len(shapes) > 1:
            sizes = " and ".join(f"{out} x {in_features}" for out, in_features in sorted(shapes))
            raise InputError(f"the adapters are for different models: {module} is {sizes}; give adapters of one model.")
        if not all(torch.isfinite(factors.b).all() and torch.isfinite(factors.a).all() for factors in members):
            raise InputError(f"the update of {module} overflows in float32; use smaller --adapter_weights.")
    return {
        module: Factors(torch.cat([f.b for f in members], dim=1), torch.cat([f.a for f in members], dim=0))
        for module, members in scaled.items()
    }


def truncated(factors: Factors, rank: int | None) -> tuple[Factors, float]:
    """The best factors of a given rank (Eckart-Young) and the relative error ``|b a - b' a'|_F / |b a|_F``.

    Computed by an SVD of the k x k core between the factors' QR decompositions; ``b a`` is never formed.

    Args:
        rank: None, or a rank of at least the factors', returns them unchanged with error 0.
    """
    if rank is None or rank >= factors.rank:
        return factors, 0.0
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = q_b @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_a.mT
    total = float(s.norm())
    return Factors(b.float(), a.float()), float(s[rank:].norm()) / total if total else 0.0


def balanced(factors: Factors) -> Factors:
    """The same product with factors of similar magnitude, for fp16 and bf16; the scale is a power of two."""
    sizes = [float(factor.abs().max()) for factor in (factors.b, factors.a)]
    if min(sizes) <= 0 or not all(map(math.isfinite, sizes)):
        return factors
    scale = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    return Factors(factors.b * scale, factors.a / scale)


def as_lora(factors: Factors, config: AdapterConfig, new: Tensor) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) of a LoRA with this update, whose rank is at most r.

    Args:
        new: a new A, whose last rows are taken if the update's rank is less than r; their columns of B are zero.
    """
    b = factors.b / config.lora_scale
    padding = b.new_zeros(len(b), config.rank - factors.rank)
    return {"A": torch.cat((factors.a, new[factors.rank :])), "B": torch.cat((b, padding), dim=1)}


def as_peft_delora(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert the tensors of one module, by key, to those of PEFT's DeLoRA, which starts from B = 0.

    A frozen start subtracts r more rank-1 terms of the same size. With -B0 in place of B0 they are ordinary terms of a
    DeLoRA of rank 2r with twice the lambda, so the conversion is exact.
    """
    a, b, rank = tensors["A"], tensors["B"], config.rank
    strength = tensors["lambda"]
    if "A0" in tensors:
        a, b = torch.cat((a, tensors["A0"])), torch.cat((b, -tensors["B0"]), dim=1)
        rank, strength = 2 * rank, 2 * strength
    return {"A": a, "B": b, "lambda": strength.reshape(1), "w_norm": tensors["w_norm"], "rank": rank}
