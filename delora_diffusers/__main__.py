"""``python -m delora_diffusers COMMAND``."""

import argparse
import sys

from delora_diffusers.commands import export, generate, importing, info, merge
from delora_diffusers.errors import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m delora_diffusers", description="Use a trained adapter.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    modules = {"generate": generate, "merge": merge, "export": export, "import": importing, "info": info}
    for name, module in modules.items():
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
