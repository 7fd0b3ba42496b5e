"""The Frechet distance between two sets of images in the feature space of an encoder; with Inception it is the FID."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from delora_diffusers.errors import LOADING_ERRORS, InputError


class _Precomputed(nn.Module):
    """Stands in for torchmetrics' encoder and passes features through unchanged."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of features (images, width), in float64.

    Raises:
        InputError: there are fewer than two real or two generated images.
    """
    if min(len(real), len(generated)) < 2:
        raise InputError(
            f"the Frechet distance needs two images on each side, not {len(real)} real and {len(generated)} generated."
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    # The features of all processes have been gathered already.
    metric = FrechetInceptionDistance(feature=_Precomputed(real.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


class Inception:
    """The 2,048 pooled features of the Inception v3 that defines the FID (torch-fidelity's, through torchmetrics).

    Args:
        weights: file of its weights; None downloads them.
        device: where to run.

    Raises:
        InputError: the weights cannot be loaded.
    """

    def __init__(self, weights: Path | None, device: torch.device | str):
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.model: Any = NoTrainInceptionV3(
                "inception-v3-compat",
                ["2048"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            ).to(device)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the Inception weights {weights or ''} could not be loaded ({reason}); give --inception_weights the "
                "file pt_inception-2015-12-05-6726825d.pth of torch-fidelity, or use --frechet_features dino."
            ) from error
        self.device = device

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (images, 2048), float32 on the CPU, of RGB images of one size."""
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        return self.model(batch.to(self.device)).float().cpu()
