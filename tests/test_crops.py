"""Crops and aspect-ratio buckets."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from delora_diffusers.crops import LONGEST_BUCKET, buckets, crop_boxes, nearest_bucket, scaled_size, views_of

SIDES = st.integers(1, 4000)
RESOLUTIONS = st.sampled_from([64, 72, 128, 512, 768, 1000, 1024])
STEPS = st.sampled_from([8, 16, 24, 64, 128])


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 10, x * 0 + 40], -1).astype(np.uint8))


@given(RESOLUTIONS, STEPS)
def test_buckets_have_the_area_of_the_square(resolution, step):
    sizes = buckets(resolution, step)
    assert (resolution, resolution) in sizes and {(h, w) for w, h in sizes} == set(sizes)
    for width, height in set(sizes) - {(resolution, resolution)}:
        assert width % step == height % step == 0
        assert width * height <= resolution**2 < max(width, height) * (min(width, height) + step) * 4
        assert max(width, height) <= LONGEST_BUCKET * min(width, height)
        # The longer side is as long as the area allows.
        assert min(width, height) * (max(width, height) + step) > resolution**2


def test_buckets_of_stable_diffusion():
    """Those of sides up to 4 to 1 at 512 pixels, by hand: 512 * 512 / 448 = 585, of which 576 is a multiple of 64."""
    wide = [(1024, 256), (768, 320), (640, 384), (576, 448)]
    assert buckets(512, 64) == sorted([*wide, (512, 512), *((h, w) for w, h in wide)])


@given(SIDES, SIDES, RESOLUTIONS, STEPS)
def test_each_image_is_in_the_bucket_nearest_to_its_shape(width, height, resolution, step):
    sizes = buckets(resolution, step)
    bucket = nearest_bucket((width, height), sizes)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(size[0] / size[1]))

    assert bucket in sizes and distance(bucket) <= min(map(distance, sizes)) + 1e-6


@given(SIDES, SIDES, RESOLUTIONS, STEPS, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_no_image_is_cut_by_more_than_the_rest(width, height, resolution, step, offsets):
    """One side is kept whole, and the other loses what it has more than the bucket's shape, up to a pixel."""
    target = nearest_bucket((width, height), buckets(resolution, step))
    scaled = scaled_size((width, height), target)
    assert any(side == wanted for side, wanted in zip(scaled, target))
    assert scaled[0] >= target[0] and scaled[1] >= target[1]
    kept = target[0] * target[1] / (scaled[0] * scaled[1])
    of_shape = math.exp(-abs(math.log(width * target[1] / (height * target[0]))))
    assert kept == pytest.approx(of_shape, abs=1 / min(target))
    for left, top, right, bottom in (*crop_boxes((width, height), target, offsets), *crop_boxes(scaled, target, None)):
        assert (right - left, bottom - top) == target
        assert left >= 0 and top >= 0 and right <= scaled[0] and bottom <= scaled[1]


@given(SIDES, SIDES, st.sampled_from([8, 64, 512]))
def test_a_square_crop_keeps_the_short_side(width, height, side):
    assert min(scaled_size((width, height), (side, side))) == side


@given(st.sampled_from([64, 128, 512, 1024]), st.integers(1, 40))
def test_square_images_are_trained_square(resolution, side):
    assume(side * 64 >= 1)
    assert nearest_bucket((side * 64, side * 64), buckets(resolution, 64)) == (resolution, resolution)


@given(st.integers(8, 90), st.integers(8, 90), st.lists(st.floats(0, 1), min_size=1, max_size=3), st.booleans())
def test_a_mask_never_parts_from_its_image(width, height, offsets, flip):
    """The image is its own mask, so they must show the same pixels in every view."""
    image = gradient(width, height)
    views = views_of(image, (24, 16), offsets, flip, image, Image.Resampling.LANCZOS)
    assert len(views) >= (2 if flip else 1)
    for view in views:
        assert view.image.shape == (16, 24, 3) and np.array_equal(view.image, view.companion)
    if flip:
        half = len(views) // 2
        for plain, mirrored in zip(views[:half], views[half:]):
            assert np.array_equal(plain.image, mirrored.image[:, ::-1])


def test_views():
    views = views_of(gradient(40, 24), (24, 24), [0.0, 1.0], flip=True)
    assert len(views) == 4 and all(view.image.shape == (24, 24, 3) for view in views)
    assert views[0].image[..., 0].mean() < views[1].image[..., 0].mean()
    assert len(views_of(gradient(24, 24), (24, 24), [0.1, 0.7], flip=False)) == 1
    assert len(views_of(gradient(80, 48), (40, 24), [0.1, 0.7], flip=False)) == 1
