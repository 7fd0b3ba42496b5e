"""The Frechet distance between two sets of pictures, on the features of an encoder; FID where that is Inception's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from delora_diffusers.errors import InputError


class _Given(nn.Module):
    """Passes features through to torchmetrics, which asks for their number."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of features (pictures, width), by torchmetrics, in float64.

    Raises:
        InputError: fewer than two pictures on a side.
    """
    if min(len(real), len(generated)) < 2:
        raise InputError(f"a Frechet distance needs two pictures a side, not {len(real)} and {len(generated)}.")
    from torchmetrics.image.fid import FrechetInceptionDistance

    # All features are here already: nothing is to be gathered from other processes.
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


class Inception:
    """The pooled 2,048 features of the Inception v3 that FID is defined with (torch-fidelity's, by torchmetrics).

    Args:
        weights: file of its weights, or None to let the library fetch them.
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
        except Exception as error:  # whatever the network and torch's reader raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the Inception weights {weights or ''} could not be loaded ({reason}); give --inception_weights the "
                "file pt_inception-2015-12-05-6726825d.pth of torch-fidelity, or use --frechet_features dino."
            ) from error
        self.device = device

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features (pictures, 2048), float32 on the CPU, of RGB pictures of one size."""
        batch = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        return self.model(batch.to(self.device)).float().cpu()
