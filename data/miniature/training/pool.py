"""The images that the family is trained on: rendered once, then kept on the device."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from data.toybox.captions import caption
from data.toybox.render import render
from data.toybox.scenes import photograph, training_subject

CAPTIONS = 3
STRANGE_WORDS = 0.04
"""Share of the captions with a made-up word, so that the family learns to ignore unknown words."""


@dataclasses.dataclass
class Pool:
    """Photos of subjects that are not held out.

    Attributes:
        images: (subjects, photos, 3, size, size) uint8.
        maps: (subjects, photos, size, size) uint8.
        captions: ``CAPTIONS`` captions per photo, subject by subject.
    """

    images: Tensor
    maps: Tensor
    captions: list[list[str]]


def render_pool(folder: Path, subjects: int, photographs: int, seed: int, device: str, batch: int = 512) -> None:
    """Render that many photos of each of the first ``subjects`` training subjects and write them to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes, captions = [], []
    for number in range(subjects):
        subject = training_subject(number)
        for index in range(photographs):
            scene = photograph(subject, seed * 1_000_003 + number, index)
            random = np.random.default_rng((seed, number, index, 11))
            scenes.append(scene)
            captions.append([with_strange_word(caption(scene, random), random) for _ in range(CAPTIONS)])
    images, maps = [], []
    # Sorted by class, so that each batch contains few classes.
    order = sorted(range(len(scenes)), key=lambda i: (scenes[i].subject.kind, scenes[i].view.place))
    for first in tqdm(range(0, len(order), batch), desc="rendering", mininterval=5):
        batch_scenes = [scenes[i] for i in order[first : first + batch]]
        batch_images, batch_maps = render(batch_scenes, device=device, batch_size=batch // 2)
        images.append(batch_images.cpu())
        maps.append(batch_maps.cpu())
    original_order = torch.tensor(order).argsort()
    shape = (subjects, photographs)
    tensors = {
        "pictures": torch.cat(images)[original_order].unflatten(0, shape),
        "maps": torch.cat(maps)[original_order].unflatten(0, shape),
    }
    save_file(tensors, folder / "pool.safetensors.part")
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "pool.safetensors.part").replace(folder / "pool.safetensors")


def with_strange_word(text: str, random: np.random.Generator) -> str:
    """The text, sometimes with a made-up word at a random position."""
    if random.uniform() >= STRANGE_WORDS:
        return text
    letters = [chr(97 + i) for i in random.integers(26, size=random.integers(2, 9))]
    if random.uniform() < 0.2:
        letters = [chr(random.integers(0x80, 0x3000)) for _ in letters]
    pieces = text.split()
    pieces.insert(random.integers(len(pieces) + 1), "".join(letters))
    return " ".join(pieces)


def load_pool(folder: Path, device: str) -> Pool:
    tensors = load_file(folder / "pool.safetensors", device=device)
    return Pool(tensors["pictures"], tensors["maps"], json.loads((folder / "captions.json").read_text()))


def as_input(images: Tensor) -> Tensor:
    """uint8 images as floats from -1 to 1."""
    return images.float() / 127.5 - 1
