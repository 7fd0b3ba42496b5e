"""``python -m data.toybox render|subject|maps``: write pictures of the toy world in the imagefolder convention."""

import argparse
import colorsys
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from data.toybox.captions import IDENTIFIERS, caption
from data.toybox.places import PLACES
from data.toybox.render import SIZE, render
from data.toybox.scenes import SEMANTIC_CLASSES, Scene, photograph, training_subject, unseen_subject
from data.toybox.shapes import CLASSES

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


def written_folder(out_dir: Path, write: Callable[[Path], None]) -> None:
    """Write a new folder whole or not at all."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        write(whole)
        os.rename(whole, out_dir)


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
            written_folder(folder, write)
        except OSError:
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
        write_metadata(folder, lines)


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
    write_metadata(folder, lines)
    if maps:
        (folder / "classes.json").write_text(json.dumps(dict(enumerate(SEMANTIC_CLASSES)), indent=1) + "\n")


def write_metadata(folder: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.toybox", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    render_ = commands.add_parser("render", help="captioned pictures of many subjects")
    maps = commands.add_parser("maps", help="caption, picture and semantic map triples")
    subject = commands.add_parser("subject", help="photographs of one subject")
    subject.add_argument(
        "number", type=int, help=f"subject i is of class i modulo {len(CLASSES)}: {', '.join(CLASSES)}"
    )
    subject.add_argument("--seen", action="store_true", help="one that the miniature family was trained on")
    subject.add_argument(
        "--place", choices=list(PLACES), help="all photographs there, instead of each in another place"
    )
    subject.add_argument("--captions", action="store_true", help="name the place of each photograph in metadata.jsonl")
    for command, count in ((render_, 64), (maps, 64), (subject, 5)):
        command.add_argument("out_dir", type=Path, help="a new folder")
        command.add_argument("--count", type=int, default=count)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--size", type=int, default=SIZE, help="side of the pictures, pixels")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if command is not subject:
            command.add_argument("--unseen", action="store_true", help="only subjects that the family never saw")
    options = parser.parse_args(typed)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} exists already; remove it or name another folder.")
    for name, low in (("count", 1), ("size", 8)):
        if getattr(options, name) < low:
            sys.exit(f"error: --{name} is {getattr(options, name)}; give at least {low}.")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: --device {options.device} cannot be used ({reason}); use cpu.")
    if options.command == "subject":
        if options.number < 0:
            sys.exit(f"error: subject {options.number} does not exist; give a number from 0.")
        written_folder(options.out_dir, lambda folder: write_subject(folder, options))
    else:
        written_folder(options.out_dir, lambda folder: write_world(folder, options, options.command == "maps"))
    print(f"wrote {options.count} pictures to {options.out_dir}")


if __name__ == "__main__":
    main()
