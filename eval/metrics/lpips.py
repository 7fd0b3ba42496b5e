"""LPIPS (Zhang et al., CVPR 2018) of many pictures: each goes through the network once, then pairs are compared."""

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
"""Pixels; OFT's evaluation scales every picture to 512 x 512, bilinear."""

NETS = ("alex", "vgg", "squeeze")


class Perceptual:
    """LPIPS by torchmetrics' networks and heads.

    Args:
        net: the backbone, one of ``NETS``; OFT and ETHER report ``alex``. Its weights come from torchvision.
        device: where to run.
        side: pictures are scaled to side x side, pixels.

    Raises:
        InputError: the backbone's weights cannot be had.
    """

    def __init__(self, net: str, device: torch.device | str, side: int = SIDE):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric: Any = LearnedPerceptualImagePatchSimilarity(net_type=net)  # pyright: ignore[reportArgumentType]
        except OSError as error:  # urllib's
            raise InputError(
                f"--lpips {net}: torchvision's weights cannot be had ({error}); connect once, put the file into "
                f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or give --lpips none."
            ) from error
        self.network: Any = metric.net.eval().to(device)
        self.device = device
        size, bilinear = (side, side), transforms.InterpolationMode.BILINEAR
        self.transform = transforms.Compose([transforms.Resize(size, bilinear), transforms.ToTensor()])

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Of each layer, features (pictures, channels, height, width) of norm 1 at every place."""
        batch = torch.stack([self.transform(picture) for picture in pictures]).to(self.device) * 2 - 1  # pyright: ignore
        layers = self.network.net(self.network.scaling_layer(batch))
        return [layer * (1e-8 + layer.square().sum(dim=1, keepdim=True)).rsqrt() for layer in layers]

    @torch.inference_mode()
    def distances(self, some: list[Tensor], others: list[Tensor]) -> Tensor:
        """LPIPS of every picture of the one with every picture of the other, (some, others), from their features."""
        total: Any = 0
        for head, a, b in zip(self.network.lins, some, others):
            rows = [head((a - one).square()).mean(dim=(1, 2, 3)) for one in b.split(1)]
            total = total + torch.stack(rows, dim=1)
        return total.cpu()


def perceptual_scores(
    perceptual: Perceptual, groups: Sequence[Sequence[Path]], references: Sequence[Path]
) -> tuple[list[Tensor], list[float | None]]:
    """LPIPS of one subject's pictures.

    Args:
        perceptual: the network.
        groups: pictures of the same prompt, a group for each prompt.
        references: the subject's photographs.

    Returns:
        For each group the mean distance of every picture to the photographs, (pictures,), as OFT and ETHER report it;
        and for each group the mean distance of its pictures to one another, DreamBooth's diversity (None for one).
    """
    photographs = perceptual.features([load_rgb(path) for path in references])
    likeness, diversity = [], []
    for group in groups:
        features = perceptual.features([load_rgb(path) for path in group])
        likeness.append(perceptual.distances(features, photographs).mean(dim=1))
        count = len(group)
        among = perceptual.distances(features, features)
        diversity.append(None if count < 2 else float(among.sum() / (count * (count - 1))))
    return likeness, diversity
