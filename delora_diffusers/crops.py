"""Crops of images to train on: squares, or rectangles near each image's shape (aspect-ratio buckets). No torch."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""
LONGEST_BUCKET = 4
"""The largest aspect ratio of a bucket; what is longer is cropped to it."""


@dataclasses.dataclass(frozen=True)
class View:
    """A crop of an image, or its mirror image.

    Attributes:
        image: (height, width, 3), uint8.
        companion: the same crop of the image's mask or semantic map, (height, width) or (height, width, 3), uint8; None
            if it has none.
        sizes: Stable Diffusion XL's size conditions: height and width of the whole image, top and left of the crop in
            the scaled image (mirrored if the view is), height and width of the view.
    """

    image: np.ndarray
    companion: np.ndarray | None
    sizes: tuple[int, int, int, int, int, int]


def buckets(resolution: int, step: int) -> list[Size]:
    """The sizes that images are trained at: the square, and all others of at most its area with sides in multiples of
    ``step``, each with the largest height for its width, up to an aspect ratio of ``LONGEST_BUCKET``."""
    sizes = {(resolution, resolution)}
    for width in range(step, resolution, step):
        height = resolution * resolution // width // step * step
        if height <= LONGEST_BUCKET * width:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to an image's; of two that are equally near, the larger."""

    def distance(bucket: Size) -> tuple[float, int]:
        cropped = abs(math.log(size[0] * bucket[1] / (size[1] * bucket[0])))
        return round(cropped, 9), -bucket[0] * bucket[1]

    return min(sizes, key=distance)


def scaled_size(size: Size, target: Size) -> Size:
    """The size of an image scaled so that it just covers ``target``."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def crop_boxes(size: Size, target: Size, random_offsets: Sequence[float] | None) -> list[tuple[int, int, int, int]]:
    """Crops of an image that was scaled to cover ``target``.

    Args:
        size: of the image before scaling. target: of the crops.
        random_offsets: position of each crop along the side that is too long, 0 to 1; None for one centre crop.

    Returns:
        Distinct boxes (left, top, right, bottom) in the scaled image.
    """
    width, height = scaled_size(size, target)
    boxes = []
    for offset in [0.5] if random_offsets is None else random_offsets:
        left, top = round((width - target[0]) * offset), round((height - target[1]) * offset)
        boxes.append((left, top, left + target[0], top + target[1]))
    return list(dict.fromkeys(boxes))


def views_of(
    image: Image.Image,
    target: Size,
    random_offsets: Sequence[float] | None,
    flip: bool,
    companion: Image.Image | None = None,
    resample: Image.Resampling = Image.Resampling.NEAREST,
) -> list[View]:
    """The views of an image to train on: its crops and, if ``flip``, their mirror images.

    Args:
        image: upright, RGB, of any size. target: of the views.
        random_offsets: see ``crop_boxes``.
        companion: its mask or map, of the same size, which is cropped and mirrored with it.
        resample: how the companion is scaled; maps are never blended.
    """
    size = scaled_size(image.size, target)
    scaled = image.resize(size, Image.Resampling.LANCZOS)
    beside = None if companion is None else companion.resize(size, resample)
    views = []
    for box in crop_boxes(image.size, target, random_offsets):
        sizes = (image.height, image.width, box[1], box[0], target[1], target[0])
        cropped = None if beside is None else np.asarray(beside.crop(box))
        views.append(View(np.asarray(scaled.crop(box)), cropped, sizes))
    return views + ([_mirrored(view, size[0]) for view in views] if flip else [])


def _mirrored(view: View, scaled_width: int) -> View:
    height, width, top, left, view_height, view_width = view.sizes
    sizes = (height, width, top, scaled_width - left - view_width, view_height, view_width)
    companion = None if view.companion is None else view.companion[:, ::-1]
    return View(view.image[:, ::-1], companion, sizes)
