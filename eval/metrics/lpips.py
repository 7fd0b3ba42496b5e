"""LPIPS (Zhang et al., CVPR 2018) of many images: each goes through the network once, then pairs are compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb

SIDE = 512
"""Side length in pixels: OFT's evaluation resizes every image to 512 x 512, bilinear."""

BACKBONES = ("alex", "vgg", "squeeze")


class Perceptual:
    """The LPIPS network with torchmetrics' backbones and heads.

    Args:
        net: the backbone, one of ``BACKBONES``; OFT and ETHER report ``alex``. Its weights are torchvision's.
        device: where to run.
        side: images are resized to side x side pixels.

    Raises:
        InputError: the backbone's weights cannot be downloaded.
    """

    def __init__(self, net: str, device: torch.device | str, side: int = SIDE):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric: Any = LearnedPerceptualImagePatchSimilarity(net_type=net)  # pyright: ignore[reportArgumentType]
        except OSError as error:  # from urllib
            raise InputError(
                f"--lpips {net}: torchvision's weights cannot be downloaded ({error}); connect once, put the file into "
                f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or give --lpips none."
            ) from error
        self.network: Any = metric.net.eval().to(device)
        self.device = device
        size, bilinear = (side, side), transforms.InterpolationMode.BILINEAR
        self.transform = transforms.Compose([transforms.Resize(size, bilinear), transforms.ToTensor()])

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Per layer, features (images, channels, height, width), normalized over channels."""
        batch = torch.stack([self.transform(image) for image in images]).to(self.device) * 2 - 1  # pyright: ignore
        layers = self.network.net(self.network.scaling_layer(batch))
        return [layer * (1e-8 + layer.square().sum(dim=1, keepdim=True)).rsqrt() for layer in layers]

    @torch.inference_mode()
    def distances(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """LPIPS between all images of two sets, (images of first, images of second), from their features."""
        total: Any = 0
        for head, a, b in zip(self.network.lins, first, second):
            columns = [head((a - image).square()).mean(dim=(1, 2, 3)) for image in b.split(1)]
            total = total + torch.stack(columns, dim=1)
        return total.cpu()


@dataclasses.dataclass(frozen=True)
class LpipsScores:
    """LPIPS of one subject's images, in groups of one prompt.

    Attributes:
        to_photos: per group, the mean distance of each image to the photos, (images,), as OFT and ETHER report it.
        diversity: per group, the mean distance between its images, as DreamBooth reports it; None for a single image.
        of_others: the mean distance of each image of other subjects to the photos.
    """

    to_photos: list[Tensor]
    diversity: list[float | None]
    of_others: Tensor


def perceptual_scores(
    perceptual: Perceptual, groups: Sequence[Sequence[Path]], references: Sequence[Path], others: Sequence[Path] = ()
) -> LpipsScores:
    """LPIPS of one subject's images.

    Args:
        perceptual: the network.
        groups: the images of each prompt.
        references: photos of the subject.
        others: images of other subjects to compare with the photos.
    """
    photos = perceptual.features([load_rgb(path) for path in references])
    to_photos, diversity = [], []
    for group in groups:
        features = perceptual.features([load_rgb(path) for path in group])
        to_photos.append(perceptual.distances(features, photos).mean(dim=1))
        count = len(group)
        pairwise = perceptual.distances(features, features)
        diversity.append(None if count < 2 else float(pairwise.sum() / (count * (count - 1))))
    of_others = [perceptual.distances(perceptual.features([load_rgb(path)]), photos).mean(dim=1) for path in others]
    return LpipsScores(to_photos, diversity, torch.cat(of_others) if of_others else torch.empty(0))
