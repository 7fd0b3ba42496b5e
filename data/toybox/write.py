"""Write images of the toy world in the imagefolder convention: photos of one subject, or many subjects with maps."""

import argparse
import colorsys
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.toybox.captions import IDENTIFIERS, caption
from data.toybox.places import PLACES
from data.toybox.render import SIZE, render
from data.toybox.scenes import SEMANTIC_CLASSES, Scene, photograph, training_subject, unseen_subject
from delora_diffusers.atomic import atomic_folder
from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import write_json_lines
from delora_diffusers.names import METADATA_NAME

BATCH = 32


def palette() -> list[int]:
    """Colours of the semantic classes for palette PNGs, 256 triples in a row."""
    colours = [
        colorsys.hsv_to_rgb((i * 0.618034) % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.3 * (i % 3) / 2)
        for i in range(len(SEMANTIC_CLASSES))
    ]
    flat = [round(255 * channel) for colour in colours for channel in colour]
    return flat + [0] * (768 - len(flat))


def pictures_of(scenes: list[Scene], size: int, device: str) -> Iterator[tuple[Image.Image, Image.Image]]:
    """(picture, semantic map with a palette) of each scene, with a progress bar."""
    colours = palette()
    with tqdm(total=len(scenes), desc="rendering", disable=None) as progress:
        for first in range(0, len(scenes), BATCH):
            pictures, maps = render(scenes[first : first + BATCH], size, device)
            for picture, labels in zip(pictures.permute(0, 2, 3, 1).cpu().numpy(), maps.cpu().numpy()):
                semantic = Image.fromarray(labels, mode="P")
                semantic.putpalette(colours)
                yield Image.fromarray(picture), semantic
                progress.update()


def subject_scenes(number: int, count: int, seen: bool = False, seed: int = 0, place: str | None = None) -> list[Scene]:
    """``count`` photographs of subject number ``number``, in as many different places as there are."""
    subject = (training_subject if seen else unseen_subject)(number)
    order = np.random.default_rng((seed, number, 3)).permutation(len(PLACES))
    places = [place or list(PLACES)[order[i % len(PLACES)]] for i in range(count)]
    return [photograph(subject, seed, i, name) for i, name in enumerate(places)]


def write_unseen_subject(folder: Path, number: int = 0, count: int = 5) -> str:
    """Photographs of an unseen subject, written to ``folder`` unless they are there; returns its class."""
    scenes = subject_scenes(number, count)

    def write(whole: Path) -> None:
        for index, (picture, _) in enumerate(pictures_of(scenes, SIZE, "cpu")):
            picture.save(whole / f"{index:02}.png")

    write_once(folder, write)
    return scenes[0].subject.kind


def write_map_pairs(folder: Path, count: int, seed: int = 0, unseen: bool = False) -> None:
    """Caption, picture and map of ``count`` different subjects, written to ``folder`` unless it is there."""
    options = argparse.Namespace(count=count, seed=seed, unseen=unseen, size=SIZE, device="cpu")
    write_once(folder, lambda whole: write_world(whole, options, maps=True))


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole unless it is there."""
    if not folder.exists():
        try:
            with atomic_folder(folder) as temporary:
                write(temporary)
        except InputError:
            if not folder.exists():  # another process of this run was quicker
                raise


def world_scenes(count: int, seed: int, unseen: bool = False) -> list[Scene]:
    """Pictures of ``count`` different subjects anywhere."""
    subject = unseen_subject if unseen else training_subject
    return [photograph(subject(seed * 1_000_003 + i), seed, i) for i in range(count)]


def write_subject(folder: Path, options: argparse.Namespace) -> None:
    scenes = subject_scenes(options.number, options.count, options.seen, options.seed, options.place)
    for index, (picture, _) in enumerate(pictures_of(scenes, options.size, options.device)):
        picture.save(folder / f"{index:02}.png")
    if options.captions:
        text = f"a photo of {IDENTIFIERS[0]} {scenes[0].subject.kind}"
        lines = [
            {"file_name": f"{i:02}.png", "text": f"{text} {PLACES[scene.view.place].phrases[0]}"}
            for i, scene in enumerate(scenes)
        ]
        write_json_lines(folder / METADATA_NAME, lines)


def write_world(folder: Path, options: argparse.Namespace, maps: bool) -> None:
    scenes = world_scenes(options.count, options.seed, options.unseen)
    lines = []
    for index, (picture, semantic) in enumerate(pictures_of(scenes, options.size, options.device)):
        scene, name = scenes[index], f"{index:05}.png"
        picture.save(folder / name)
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
