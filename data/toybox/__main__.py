"""``python -m data.toybox render|subject|maps``: write images of the toy world in the imagefolder convention."""

import argparse
import sys
from pathlib import Path

import torch

from data.toybox.places import PLACES
from data.toybox.render import SIZE
from data.toybox.shapes import CLASSES
from data.toybox.write import write_subject, write_world
from delora_diffusers.atomic import atomic_folder


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
        with atomic_folder(options.out_dir) as folder:
            write_subject(folder, options)
    else:
        with atomic_folder(options.out_dir) as folder:
            write_world(folder, options, options.command == "maps")
    print(f"wrote {options.count} pictures to {options.out_dir}")


if __name__ == "__main__":
    main()
