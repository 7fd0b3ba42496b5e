"""What hurts training in a photo, or a set of them: blur, and photos that are nearly the same. No torch.

Both thresholds were measured on 62 photos of the DreamBooth dataset, 96 frames of CamVid and 40 rendered toys, and on
edited copies of them: ``python -m benchmarks.photo_warnings FOLDER ...`` repeats it on other photos.
"""

import numpy as np
from PIL import Image

from delora_diffusers.crops import Size, scaled_size

HASH_SIDE = 12
"""Cells along a side of the grid that is compared."""
NEAR_DUPLICATE = 0.25
"""Share of differing bits below which two photos are nearly the same. Of a photo and a copy it is at most 0.20 after
JPEG of quality 30, halving its size, darkening, cutting 2% off every side, shifting by 3% or rotating by 2 degrees.
Of two photos of one subject it is at least 0.32, apart from two frames of a burst (0.19)."""
BLURRED = 0.06
"""Sharpness below which a photo is blurred. At 512 and 128 pixels, sharp photos have at least 0.117 and toys 0.25;
after a Gaussian blur of 2 to 2.6 pixels there, at most 0.052."""
TILES = 4
"""Tiles along a side of a photo. The sharpest counts: a blurred background is no fault."""


def fingerprint(image: Image.Image) -> np.ndarray:
    """A perceptual hash, (2 * HASH_SIDE ** 2,) booleans: whether each cell of a coarse grid is brighter than its left
    neighbour, and than its upper one (dHash, in both directions)."""
    grey = image.convert("L")
    rows = np.asarray(grey.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), np.int16)
    columns = np.asarray(grey.resize((HASH_SIDE, HASH_SIDE + 1), Image.Resampling.BOX), np.int16)
    return np.concatenate([(np.diff(rows, axis=1) > 0).ravel(), (np.diff(columns, axis=0) > 0).ravel()])


def are_near_duplicates(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two photos with these fingerprints are nearly the same."""
    return float((first != second).mean()) < NEAR_DUPLICATE


def sharpness(image: Image.Image, view: Size) -> float:
    """Variance of the Laplacian in the sharpest tile, over the variance of the brightness.

    It is taken at the size the photo is trained at, where blur that scaling down removes does not count; a photo that
    is smaller keeps its size, since enlarging it would look like blur.

    Args:
        image: upright, RGB. view: the size that training scales it to cover.
    """
    size = scaled_size(image.size, view)
    scaled = image.resize(size, Image.Resampling.LANCZOS) if size[0] < image.width else image
    grey = np.pad(np.asarray(scaled.convert("L"), np.float32), 1, "edge")
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    laplacian = 4 * grey[1:-1, 1:-1] - neighbours
    tiles = [tile for row in np.array_split(laplacian, TILES) for tile in np.array_split(row, TILES, axis=1)]
    contrast = max(float(grey.var()), 1.0)  # a blank image has none
    return max(float(tile.var()) for tile in tiles if tile.size) / contrast
