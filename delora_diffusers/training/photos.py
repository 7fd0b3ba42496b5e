"""Photos as encoded samples: each in the bucket of its shape, with its mask, its prompts and its class images."""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from delora_diffusers.crops import Size, View, buckets, crop_boxes, nearest_bucket, scaled_size, views_of
from delora_diffusers.errors import InputError
from delora_diffusers.families.loading import OpenModel
from delora_diffusers.training.batches import Bucket, Sample
from delora_diffusers.training.encoding import LatentCache, crop_offsets, encode_images

LEAST_SHOWN = 0.25
"""A view of a photo with a mask shows at least this share of what the best view shows of what the mask marks."""


class PhotoFile(Protocol):
    """A photo on disk."""

    @property
    def path(self) -> Path: ...

    def size(self) -> Size:
        """Width and height, upright."""
        ...

    def load(self) -> Image.Image:
        """The image, upright, RGB."""
        ...

    def load_mask(self) -> Image.Image | None:
        """Its mask, grey, of the same size; None if it has none."""
        ...


class Photos(Protocol):
    """Photos that share their prompts; see ``data.concepts.Concept``."""

    @property
    def photographs(self) -> Sequence[PhotoFile]: ...

    @property
    def class_prompt(self) -> str | None: ...

    @property
    def repeats(self) -> int: ...

    @property
    def weight(self) -> float: ...


def in_buckets(sizes: Sequence[Size], args: argparse.Namespace, patch_pixels: int) -> dict[Size, list[int]]:
    """The numbers of the images in each bucket, for images of these sizes: each is in one bucket per resolution.

    Args:
        patch_pixels: the sides of buckets are multiples of this too.
    """
    step = math.lcm(args.bucket_step, patch_pixels)
    found: dict[Size, list[int]] = {}
    for resolution in args.resolutions:
        choices = [(resolution, resolution)] if args.square else buckets(resolution, step)
        for number, size in enumerate(sizes):
            found.setdefault(nearest_bucket(size, choices), []).append(number)
    return found


def photo_views(photo: PhotoFile, target: Size, offsets: list[float] | None, args: argparse.Namespace) -> list[View]:
    """The views of a photo to train on, with their masks; without those that show little of what the mask marks."""
    mask = photo.load_mask()
    views = views_of(photo.load(), target, offsets, args.random_flip, mask, Image.Resampling.BOX)
    if mask is None:
        return views
    shown = [view.companion.sum(dtype=np.int64) for view in views if view.companion is not None]
    return [view for view, amount in zip(views, shown) if amount >= LEAST_SHOWN * max(shown)]


def check_masks(photos: Sequence[PhotoFile], seed: int, args: argparse.Namespace, patch_pixels: int) -> None:
    """Reject photos of which no view shows what the mask marks, if nothing else counts.

    Raises:
        InputError
    """
    if args.mask_background_weight > 0:
        return
    for target, numbers in in_buckets([photo.size() for photo in photos], args, patch_pixels).items():
        for number in numbers:
            mask = photos[number].load_mask()
            if mask is None:
                continue
            scaled = mask.resize(scaled_size(mask.size, target), Image.Resampling.BOX)
            boxes = crop_boxes(mask.size, target, crop_offsets(seed, number, not args.center_crop))
            if not any(np.asarray(scaled.crop(box)).any() for box in boxes):
                raise InputError(
                    f"no crop of {photos[number].path} contains what its mask marks; leave out --center_crop or "
                    "--square, or give --mask_background_weight 0.1."
                )


def encode_photos(
    model: OpenModel,
    photos: Sequence[PhotoFile],
    numbers: Sequence[int],
    target: Size,
    seed: int,
    args: argparse.Namespace,
    device: torch.device,
) -> LatentCache:
    """Encode the views of one size of some of the photos with the autoencoder.

    Args:
        numbers: of the photos to encode. seed: of their random crops.
    """

    def views() -> Iterator[list[View]]:
        for number in numbers:
            yield photo_views(photos[number], target, crop_offsets(seed, number, not args.center_crop), args)

    background = args.mask_background_weight if any(getattr(photo, "mask", None) for photo in photos) else None
    return encode_images(model.family, model.pipeline.vae, views(), len(numbers), device, background)


def class_image_sizes(concepts: Sequence[Photos], args: argparse.Namespace, patch_pixels: int) -> list[list[Size]]:
    """The sizes at which class images of each concept are generated, in turn: those of its photos."""
    sizes = []
    for concept in concepts:
        found = in_buckets([photo.size() for photo in concept.photographs], args, patch_pixels)
        sizes.append([size for size, numbers in found.items() for _ in numbers])
    return sizes


def encode_concepts(
    model: OpenModel,
    concepts: Sequence[Photos],
    prompts: Sequence[Sequence[str]],
    class_images: Sequence[Sequence[PhotoFile]] | None,
    seed: int,
    args: argparse.Namespace,
    device: torch.device,
) -> list[Bucket]:
    """Encode a subject's photos, and its class images if there are any.

    Args:
        prompts: for each photo of all concepts, one or several to choose from.
        class_images: of each concept, for prior preservation, else None.
        seed: of the subject.
    """
    photos = [photo for concept in concepts for photo in concept.photographs]
    owners = [number for number, concept in enumerate(concepts) for _ in concept.photographs]
    found = in_buckets([photo.size() for photo in photos], args, model.patch_pixels)
    encoded = []
    for size, numbers in found.items():
        latents = encode_photos(model, photos, numbers, size, seed, args, device)
        class_latents, ranges = None, {}
        if class_images is not None:
            used = dict.fromkeys(owners[number] for number in numbers)
            parts = {}
            for owner in used:
                sizes = [s for s, members in found.items() if any(owners[member] == owner for member in members)]
                chosen = _of_bucket(class_images[owner], size, sizes)
                parts[owner] = encode_photos(model, class_images[owner], chosen, size, seed, args, device)
            class_latents, ranges = _joined(parts)
        samples = [
            Sample(image, prompts[number], concept.class_prompt, concept.weight, ranges.get(owners[number], (0, 0)))
            for image, number in enumerate(numbers)
            for concept in [concepts[owners[number]]]
            for _ in range(concept.repeats)
        ]
        encoded.append(Bucket(samples, latents, class_latents))
    return encoded


def _of_bucket(images: Sequence[PhotoFile], size: Size, sizes: Sequence[Size]) -> list[int]:
    """The numbers of the class images for a bucket: those of its size, and of other sizes those that are nearest to its
    shape; all if there are none."""
    own = [image.size() for image in images]
    buckets_of = [whole if whole in sizes else nearest_bucket(whole, sizes) for whole in own]
    return [number for number, bucket in enumerate(buckets_of) if bucket == size] or list(range(len(images)))


def _joined(parts: dict[int, LatentCache]) -> tuple[LatentCache, dict[int, tuple[int, int]]]:
    """The latents of several concepts' class images as one, and the first and the number of each concept's images."""
    ranges, start = {}, 0
    for owner, part in parts.items():
        ranges[owner] = (start, len(part))
        start += len(part)
    caches = list(parts.values())
    return caches[0] if len(caches) == 1 else LatentCache.joined(caches), ranges
