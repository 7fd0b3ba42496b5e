"""``python -m delora_diffusers COMMAND``."""

import argparse
import sys

from delora_diffusers.commands import generate, info, merge
from delora_diffusers.errors import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m delora_diffusers", description="Use a trained adapter.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (generate, merge, info):
        name = module.__name__.split(".")[-1]
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0], description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
