"""``python -m data.toybox render|subject|maps``: render images of the toy world to a folder in imagefolder layout."""

import argparse
import sys
from pathlib import Path

import torch

from data.toybox.places import PLACES
from data.toybox.render import SIZE
from data.toybox.shapes import CLASSES
from data.toybox.write import SQUARE, write_subject, write_world
from delora_diffusers.atomic import atomic_folder
from delora_diffusers.errors import InputError

SMALLEST = 8
"""Shorter side of an image in pixels."""

LONGEST = 4
"""Longer side relative to the shorter one; beyond it some rays would never reach a place's backdrop."""


def shape(text: str) -> tuple[int, int]:
    """(width, height) from WIDTHxHEIGHT."""
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write it as WIDTHxHEIGHT, for example 160x96")
    return int(width), int(height)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.toybox", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    render = commands.add_parser("render", help="captioned images of many subjects")
    maps = commands.add_parser("maps", help="triples of a caption, an image and a semantic map")
    subject = commands.add_parser("subject", help="photos of one subject")
    subject.add_argument(
        "number", type=int, help=f"subject i is of class i modulo {len(CLASSES)}: {', '.join(CLASSES)}"
    )
    subject.add_argument("--seen", action="store_true", help="a subject that the miniature family was trained on")
    subject.add_argument("--place", choices=list(PLACES), help="place of all photos; by default, they differ")
    subject.add_argument(
        "--captions", action="store_true", help="write captions that mention each photo's place to metadata.jsonl"
    )
    subject.add_argument(
        "--masks", action="store_true", help="also write NAME.mask.png for each photo: 255 on the toy, 0 elsewhere"
    )
    for command, count in ((render, 64), (maps, 64), (subject, 5)):
        command.add_argument("out_dir", type=Path, help="a new folder")
        command.add_argument("--count", type=int, default=count, help="number of images (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0)
        sizes = command.add_mutually_exclusive_group()
        sizes.add_argument("--size", type=int, help=f"side length of square images in pixels (default: {SIZE})")
        sizes.add_argument(
            "--shapes",
            type=shape,
            nargs="+",
            metavar="WxH",
            help="shapes that the images take turns to have, for example 128x128 160x96 96x160; a longer side shows "
            "more of the scene",
        )
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if command is not subject:
            command.add_argument("--unseen", action="store_true", help="only subjects that the family never saw")
    options = parser.parse_args(arguments)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} already exists; remove it or choose another folder.")
    if options.count < 1:
        sys.exit(f"error: --count is {options.count}; give at least 1.")
    if options.size is not None:
        if options.size < SMALLEST:
            sys.exit(f"error: --size is {options.size}; give at least {SMALLEST}.")
        options.shapes = [(options.size, options.size)]
    for width, height in options.shapes or ():
        if min(width, height) < SMALLEST:
            sys.exit(f"error: --shapes {width}x{height} is too small; give sides of at least {SMALLEST} pixels.")
        if max(width, height) > LONGEST * min(width, height):
            sys.exit(f"error: --shapes {width}x{height} is too long; give at most {LONGEST} times the shorter side.")
    options.shapes = options.shapes or SQUARE
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: --device {options.device} cannot be used ({reason}); use cpu.")
    if options.command == "subject" and options.number < 0:
        sys.exit(f"error: subject {options.number} does not exist; give a number of at least 0.")
    try:
        with atomic_folder(options.out_dir) as folder:
            if options.command == "subject":
                write_subject(folder, options)
            else:
                write_world(folder, options, options.command == "maps")
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.count} images to {options.out_dir}")


if __name__ == "__main__":
    main()
