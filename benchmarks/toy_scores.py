"""Scores of generated toys that protocols do not have: drift, the place that an image shows, toys that are cut off."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.miniature_runs import toybox_encoders
from data.miniature import MINI_SEGMENTER
from data.photographs import find_photographs
from data.toybox.places import PLACES, STUFF
from delora_diffusers.image_files import load_rgb
from eval.metrics.embedding import embed
from eval.metrics.encoders import device_of
from eval.metrics.generated import read_generated
from eval.metrics.peft_imagegen import drift_pairs
from eval.metrics.segmentation import Segmenter

BORDER = 0.02
"""A toy is cut off if it covers more than this share of the border's pixels."""


def place_of(text: str) -> str:
    """The place whose phrase a prompt ends with."""
    return next(name for name, place in PLACES.items() if text.endswith(place.phrases))


def drift(adapted: Path, base: Path, prompts: Sequence[str]) -> float:
    """1 - mean DINO cosine of an image and the base model's image for the same prompt and seed.

    Args:
        adapted, base: output folders of generate, with the same seeds. prompts: those to compare.
    """
    rows = ([row for row in read_generated(folder) if row[1] in prompts] for folder in (adapted, base))
    images, originals = zip(*drift_pairs(*rows))
    return 1 - float((_features(images, "dino") * _features(originals, "dino")).sum(dim=1).mean())


def dino_to_photos(images: Path, prompts: Sequence[str], references: Path) -> float:
    """Mean DINO cosine of all pairs of an image of these prompts and a photo.

    Args:
        images: output folder of generate. references: folder of photos.
    """
    generated = _features([path for path, prompt in read_generated(images) if prompt in prompts], "dino")
    photos = _features([photo.path for photo in find_photographs(references)], "dino")
    return float((generated @ photos.T).mean())


def place_shares(images: Path, kind: str, photo_place: str) -> dict[str, float]:
    """Shares of the images whose place, by mini-clip, is that of the prompt, and that of the photos.

    An image's place is that of the nearest caption among all phrases of all places.

    Args:
        images: output folder of generate. kind: class of the toy.
    """
    phrases = [(name, phrase) for name, place in PLACES.items() for phrase in place.phrases]
    texts = toybox_encoders().clip.encode_texts([f"a photo of a {kind} {phrase}" for _, phrase in phrases])
    generated = read_generated(images)
    nearest = (_features([path for path, _ in generated], "clip") @ texts.cpu().double().T).argmax(dim=1)
    places = [phrases[i][0] for i in nearest.tolist()]
    right = [place == place_of(prompt) for place, (_, prompt) in zip(places, generated)]
    return {"in_place": sum(right) / len(places), "leaked": places.count(photo_place) / len(places)}


def cut_off(files: Sequence[Path]) -> float:
    """The share of images, all of one size, in which the toy, by mini-segmenter, touches the border."""
    return float(touches_border(_segmenter()([load_rgb(file) for file in files]) >= len(STUFF)).mean())


def touches_border(toys: np.ndarray) -> np.ndarray:
    """Whether the toy touches the border, (images,), from masks (images, height, width)."""
    border = np.concatenate([toys[:, 0], toys[:, -1], toys[:, 1:-1, 0], toys[:, 1:-1, -1]], axis=1)
    return border.mean(axis=1) > BORDER


def _features(paths: Sequence[Path], encoder: str) -> Tensor:
    """Unit features, in float64."""
    return embed(paths, {encoder: toybox_encoders().by_key()[encoder]}, workers=0)[encoder].double()


@functools.cache
def _segmenter() -> Any:
    """mini-segmenter, loaded once per process."""
    return Segmenter(str(MINI_SEGMENTER), device_of(None))
