"""The scores as pure functions of unit features."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.metrics.protocols import IDENTIFIERS


def pair_scores(generated: Tensor, reference: Tensor) -> Tensor:
    """Mean cosine of each generated image with all reference images, (generated,).

    Their mean is the mean over all (reference, generated) pairs: DINO and CLIP-I.

    Args:
        generated: (g, width), unit rows. reference: (n, width), unit rows.
    """
    return (generated.double() @ reference.double().T).mean(dim=1)


def real_score(reference: Tensor) -> float | None:
    """Mean cosine over all pairs of different photos of a subject, the row "real images"; None for a single photo."""
    count = len(reference)
    if count < 2:
        return None
    cosines = reference.double() @ reference.double().T
    off_diagonal = ~torch.eye(count, dtype=torch.bool)
    return float(cosines[off_diagonal].mean())


def text_scores(generated: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T: cosine of each generated image and its prompt, (generated,). Both arguments are (g, width), unit rows."""
    return (generated.double() * texts.double()).sum(dim=1)


def without_identifier(prompt: str, identifiers: Sequence[str] = IDENTIFIERS) -> str:
    """The prompt without the identifier, which means nothing to CLIP: ``a sks dog`` becomes ``a dog``."""
    words = "|".join(map(re.escape, identifiers))
    return " ".join(re.sub(rf"(?<!\w)(?:{words})(?!\w)", " ", prompt).split())
