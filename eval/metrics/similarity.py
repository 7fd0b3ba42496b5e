"""The DINO similarity of images to a subject's photos, for a training script that keeps its best adapter."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from eval.metrics.encoders import DinoEncoder
from eval.metrics.protocols import DELORA, PROTOCOLS
from eval.metrics.scores import pair_scores


class DinoSimilarity:
    """The mean cosine of DINO features over all pairs of an image and a photo.

    Args:
        photos: the subject's. name: of the model, see ``DinoEncoder``; None for that of the ``delora`` protocol.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, photos: Sequence[Image.Image], name: str | None, device: torch.device | str):
        norm_eps = DELORA.dino_norm_eps if name in (None, DELORA.dino) else None
        self.encoder = DinoEncoder(name or DELORA.dino, DELORA.dino_transform, device, norm_eps=norm_eps)
        self.references = self._features(photos)

    def __call__(self, images: Sequence[Image.Image]) -> float:
        """The similarity of these images."""
        return float(pair_scores(self._features(images), self.references).mean())

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        views = torch.stack([self.encoder.view(image) for image in images])
        return torch.cat([self.encoder.encode(batch).cpu() for batch in views.split(16)])


MINIATURE_DINO = PROTOCOLS["toybox"].dino
"""The model for images of the included miniature."""
