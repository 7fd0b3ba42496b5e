"""A saved adapter as plain low-rank factors, exact or truncated; several adapters as one.

DeLoRA's update is low-rank by construction, ``W' - W = B~ A~`` of rank r from a zero start and 2r from a frozen one,
and LoRA's is of rank r, so both are written as a plain LoRA with no loss and without the pretrained weights.
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
        """``|b a|_F``, from two k x k products."""
        b, a = self.b.double(), self.a.double()
        return math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


def module_tensors(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Tensors' names by module and by key: ``{"unet.mid...to_q": {"A": "unet.mid...to_q.delora_A", ...}}``."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        if "_" in last:
            found.setdefault(module, {})[last.partition("_")[2]] = name
    return found


def low_rank_factors(component: str, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors of every module of one component of an adapter file.

    Args:
        component: ``"unet"``, ...; the names of its tensors begin with it.
        config: the component's. tensors: all of the file's.

    Raises:
        InputError: the method's update is no low-rank sum.
    """
    if not METHODS[config.method].has_factors:
        raise InputError(
            f"the update of {METHODS[config.method].title} is not of low rank and no LoRA can hold it; use merge."
        )
    own = [name for name in tensors if name.startswith(component + ".")]
    found = {}
    for module, keys in module_tensors(own).items():
        stacked = {key: tensors[name].float()[None] for key, name in keys.items()}
        b, a = low_rank_functions(config.method).factors(stacked, config)
        found[module.removeprefix(component + ".")] = Factors(b[0], a[0])
    return found


def summed(terms: Iterable[tuple[Mapping[str, Factors], float]]) -> dict[str, Factors]:
    """``sum_i s_i (W_i' - W)`` of each module: the factors side by side, of rank ``sum_i k_i``."""
    parts: dict[str, list[Factors]] = {}
    for factors, strength in terms:
        for module, one in factors.items():
            parts.setdefault(module, []).append(Factors(one.b * strength, one.a))
    for module, some in parts.items():
        shapes = {(one.b.shape[0], one.a.shape[1]) for one in some}
        if len(shapes) > 1:
            said = " and ".join(f"{out} x {wide}" for out, wide in sorted(shapes))
            raise InputError(f"the adapters do not belong to one model: {module} is {said}.")
    return {
        module: Factors(torch.cat([one.b for one in some], dim=1), torch.cat([one.a for one in some], dim=0))
        for module, some in parts.items()
    }


def truncated(factors: Factors, rank: int | None) -> tuple[Factors, float]:
    """The best factors of a rank (Eckart, Young) and the relative error ``|b a - b' a'|_F / |b a|_F``.

    A singular value decomposition of the k x k core between the factors' QR decompositions; ``b a`` is never formed.

    Args:
        rank: None, or at least that of the factors, leaves them as they are, with error 0.
    """
    if rank is None or rank >= factors.rank:
        return factors, 0.0
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = q_b @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_a.mT
    whole = float(s.norm())
    return Factors(b.float(), a.float()), float(s[rank:].norm()) / whole if whole else 0.0


def balanced(factors: Factors) -> Factors:
    """The same product with both factors about equally large, as fp16 and bf16 need it; scaled by a power of two."""
    sizes = [float(factor.abs().max()) for factor in (factors.b, factors.a)]
    if min(sizes) <= 0 or not all(map(math.isfinite, sizes)):
        return factors
    scale = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    return Factors(factors.b * scale, factors.a / scale)


def as_peft_delora(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A, B, lambda and rank of PEFT's DeLoRA, which starts from B = 0, for the tensors of one module by key.

    A frozen start subtracts r further rank-1 terms of the same size; with -B0 for B0 they are terms like the others of
    a DeLoRA of rank 2r with twice the lambda, exactly.
    """
    a, b, rank = tensors["A"], tensors["B"], config.rank
    strength = tensors["lambda"]
    if "A0" in tensors:
        a, b = torch.cat((a, tensors["A0"])), torch.cat((b, -tensors["B0"]), dim=1)
        rank, strength = 2 * rank, 2 * strength
    return {"A": a, "B": b, "lambda": strength.reshape(1), "w_norm": tensors["w_norm"], "rank": rank}
