"""What hurts training in a photo, or a set of them: blur, and photos that are nearly the same. No torch.

Both thresholds come from ``python -m benchmarks.photo_warnings [FOLDER ...]`` on 60 rendered toys, 62 photos of 12
subjects of the DreamBooth dataset and 128 frames of CamVid, and on edited copies of them.
"""

import numpy as np
from PIL import Image

from delora_diffusers.crops import Size, scaled_size

HASH_SIDE = 12
"""Cells along a side of the grid that is compared."""
NEAR_DUPLICATE = 0.25
"""Share of differing bits below which two photos are nearly the same. Of a photo and a copy of it, it is at most 0.21
after JPEG of quality 30, halving the size, darkening, cutting 2% off each side or 3% off one, or turning by 2 degrees.
Of two photos of one subject it is at least 0.30, apart from two frames of one burst (0.19)."""
BLURRED = 0.06
"""Sharpness below which a photo is blurred. Photos have at least 0.117 at 512 pixels and 0.24 at 128; after a Gaussian
blur of 2 pixels there, 97 to 100% have less than this, and after one of half a pixel 0 to 3%."""
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
