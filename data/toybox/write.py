"""Write images of the toy world in imagefolder layout: photos of one subject, or captioned images of many."""

import argparse
import colorsys
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.toybox.captions import IDENTIFIERS, caption
from data.toybox.places import PLACES, STUFF
from data.toybox.render import SIZE, render
from data.toybox.scenes import SEMANTIC_CLASSES, Scene, photograph, training_subject, unseen_subject
from delora_diffusers.atomic import atomic_folder
from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import write_json_lines
from delora_diffusers.names import METADATA_NAME

BATCH = 32

Shapes = Sequence[tuple[int, int]]
"""(width, height) of images in pixels; image i has shape i modulo their number."""

SQUARE: Shapes = ((SIZE, SIZE),)


def palette() -> list[int]:
    """Colours of the semantic classes for palette PNGs: 256 RGB triples, flattened."""
    colours = [
        colorsys.hsv_to_rgb((i * 0.618034) % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.3 * (i % 3) / 2)
        for i in range(len(SEMANTIC_CLASSES))
    ]
    flat = [round(255 * channel) for colour in colours for channel in colour]
    return flat + [0] * (768 - len(flat))


def render_with_maps(scenes: list[Scene], shapes: Shapes, device: str) -> Iterator[tuple[Image.Image, Image.Image]]:
    """(image, semantic map with a palette) of each scene, with a progress bar."""
    colours, batch = palette(), BATCH * len(shapes)
    with tqdm(total=len(scenes), desc="rendering", disable=None) as progress:
        for first in range(0, len(scenes), batch):
            chunk = scenes[first : first + batch]
            columns = [render(chunk[i :: len(shapes)], shape, device) for i, shape in enumerate(shapes[: len(chunk)])]
            for index in range(len(chunk)):
                images, maps = columns[index % len(shapes)]
                row = index // len(shapes)
                semantic = Image.fromarray(maps[row].cpu().numpy(), mode="P")
                semantic.putpalette(colours)
                yield Image.fromarray(images[row].permute(1, 2, 0).cpu().numpy()), semantic
                progress.update()


def toy_mask(semantic: Image.Image) -> Image.Image:
    """The mask of the toy in a semantic map: 8-bit grey, 255 on the toy and 0 elsewhere."""
    return Image.fromarray(np.where(np.asarray(semantic) >= len(STUFF), 255, 0).astype(np.uint8))


def subject_scenes(number: int, count: int, seen: bool = False, seed: int = 0, place: str | None = None) -> list[Scene]:
    """``count`` photos of subject number ``number``, all in ``place``, or in as many different places as possible."""
    subject = (training_subject if seen else unseen_subject)(number)
    order = np.random.default_rng((seed, number, 3)).permutation(len(PLACES))
    places = [place or list(PLACES)[order[i % len(PLACES)]] for i in range(count)]
    return [photograph(subject, seed, i, name) for i, name in enumerate(places)]


def write_unseen_subject(
    folder: Path,
    number: int = 0,
    count: int = 5,
    place: str | None = None,
    shapes: Shapes = SQUARE,
    masks: bool = False,
) -> str:
    """Write photos of an unseen subject to ``folder``, unless it exists.

    Args:
        place: see ``subject_scenes``. shapes, masks: see ``write_photos``.

    Returns:
        The subject's class.
    """
    scenes = subject_scenes(number, count, place=place)
    write_once(folder, lambda temporary: write_photos(temporary, scenes, shapes, masks, "cpu"))
    return scenes[0].subject.kind


def write_photos(folder: Path, scenes: list[Scene], shapes: Shapes, masks: bool, device: str) -> None:
    """Write ``00.png``, ``01.png``, ... and, if ``masks``, the mask of the toy in each as ``00.mask.png``, ..."""
    for index, (image, semantic) in enumerate(render_with_maps(scenes, shapes, device)):
        image.save(folder / f"{index:02}.png")
        if masks:
            toy_mask(semantic).save(folder / f"{index:02}.mask.png")


def write_map_pairs(folder: Path, count: int, seed: int = 0, unseen: bool = False) -> None:
    """Write captions, images and maps of ``count`` different subjects to ``folder``, unless it exists."""
    options = argparse.Namespace(count=count, seed=seed, unseen=unseen, shapes=SQUARE, device="cpu")
    write_once(folder, lambda temporary: write_world(temporary, options, maps=True))


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, completely or not at all, unless it exists."""
    if not folder.exists():
        try:
            with atomic_folder(folder) as temporary:
                write(temporary)
        except InputError:
            if not folder.exists():  # otherwise another process of this run wrote it first
                raise


def world_scenes(count: int, seed: int, unseen: bool = False) -> list[Scene]:
    """Scenes of ``count`` different subjects in random places."""
    subject = unseen_subject if unseen else training_subject
    return [photograph(subject(seed * 1_000_003 + i), seed, i) for i in range(count)]


def write_subject(folder: Path, options: argparse.Namespace) -> None:
    """Write photos of one subject, with masks if ``options.masks`` and with captions if ``options.captions``."""
    scenes = subject_scenes(options.number, options.count, options.seen, options.seed, options.place)
    write_photos(folder, scenes, options.shapes, options.masks, options.device)
    if options.captions:
        text = f"a photo of {IDENTIFIERS[0]} {scenes[0].subject.kind}"
        lines = [
            {"file_name": f"{i:02}.png", "text": f"{text} {PLACES[scene.view.place].phrases[0]}"}
            for i, scene in enumerate(scenes)
        ]
        write_json_lines(folder / METADATA_NAME, lines)


def write_world(folder: Path, options: argparse.Namespace, maps: bool) -> None:
    """Write captioned images of many subjects, with their semantic maps if ``maps``."""
    scenes = world_scenes(options.count, options.seed, options.unseen)
    lines = []
    for index, (image, semantic) in enumerate(render_with_maps(scenes, options.shapes, options.device)):
        scene, name = scenes[index], f"{index:05}.png"
        image.save(folder / name)
        line = {"file_name": name, "text": caption(scene, np.random.default_rng((options.seed, index, 11)))}
        if maps:
            (folder / "maps").mkdir(exist_ok=True)
            semantic.save(folder / "maps" / name)
            line["map"] = f"maps/{name}"
        subject = scene.subject
        line |= {"class": subject.kind, "colours": list(subject.colours), "pattern": subject.pattern}
        lines.append(line | {"place": scene.view.place})
    write_json_lines(folder / METADATA_NAME, lines)
    if maps:
        (folder / "classes.json").write_text(json.dumps(dict(enumerate(SEMANTIC_CLASSES)), indent=1) + "\n")
