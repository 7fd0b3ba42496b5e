"""``python -m data.toybox render|subject|maps``: render images of the toy world to a folder in imagefolder layout."""

import argparse
import sys
from pathlib import Path

import torch

from data.toybox.places import PLACES
from data.toybox.render import SIZE
from data.toybox.shapes import CLASSES
from data.toybox.write import write_subject, write_world
from delora_diffusers.atomic import atomic_folder
from delora_diffusers.errors import InputError


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
    for command, count in ((render, 64), (maps, 64), (subject, 5)):
        command.add_argument("out_dir", type=Path, help="a new folder")
        command.add_argument("--count", type=int, default=count, help="number of images (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--size", type=int, default=SIZE, help="side length in pixels (default: %(default)s)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if command is not subject:
            command.add_argument("--unseen", action="store_true", help="only subjects that the family never saw")
    options = parser.parse_args(arguments)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} already exists; remove it or choose another folder.")
    for name, minimum in (("count", 1), ("size", 8)):
        if getattr(options, name) < minimum:
            sys.exit(f"error: --{name} is {getattr(options, name)}; give at least {minimum}.")
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
