"""Run one of several commands from the command line. Imports no torch."""

import argparse
import sys
from collections.abc import Mapping
from types import ModuleType

from delora_diffusers.errors import InputError


def run_command(
    prog: str, description: str, commands: Mapping[str, ModuleType], arguments: list[str] | None = None
) -> None:
    """Parse the command line and run the chosen command; bad input exits with a one-sentence message and code 1.

    Args:
        commands: modules by command name, with ``add_arguments(parser)`` and ``run(options)``; their docstrings are the
            help texts.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in commands.items():
        help_text = module.__doc__ or ""
        subparser = subparsers.add_parser(name, help=help_text.splitlines()[0], description=help_text)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        sys.exit(f"error: {error}")
