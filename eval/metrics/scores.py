"""The scores as pure functions of unit features."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.metrics.protocols import IDENTIFIERS


def pair_scores(generated: Tensor, reference: Tensor) -> Tensor:
    """Mean cosine of each generated picture with all reference pictures, (generated,).

    The mean of it is the mean over all (reference, generated) pairs: DINO and CLIP-I.

    Args:
        generated: (g, width), unit rows. reference: (n, width), unit rows.
    """
    return (generated.double() @ reference.double().T).mean(dim=1)


def real_score(reference: Tensor) -> float | None:
    """Mean cosine of different reference pictures of one subject, the real-images row; None for one picture."""
    count = len(reference)
    if count < 2:
        return None
    cosines = reference.double() @ reference.double().T
    off_diagonal = ~torch.eye(count, dtype=torch.bool)
    return float(cosines[off_diagonal].mean())


def text_scores(generated: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each generated picture with its prompt, (generated,): CLIP-T. Both (g, width), unit rows."""
    return (generated.double() * texts.double()).sum(dim=1)


def without_identifier(prompt: str, identifiers: Sequence[str] = IDENTIFIERS) -> str:
    """The prompt without the subject's rare token, which a CLIP knows nothing of: ``a sks dog`` is ``a dog``."""
    words = "|".join(map(re.escape, identifiers))
    return " ".join(re.sub(rf"(?<!\w)(?:{words})(?!\w)", " ", prompt).split())
