"""``python -m eval COMMAND``."""

import argparse
import sys

from data.errors import InputError
from eval import benchmark, dreambooth, map2img, page, report, study


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Score generated pictures.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (dreambooth, benchmark, study, report, map2img, page):
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
