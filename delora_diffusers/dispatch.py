"""Run one of several commands from the command line. Imports no torch."""

import argparse
import sys
from collections.abc import Mapping
from types import ModuleType

from delora_diffusers.errors import InputError


def run_command(
    prog: str, description: str, commands: Mapping[str, ModuleType], arguments: list[str] | None = None
) -> None:
    """Parse the arguments of a command and run it; bad input ends with one sentence and exit code 1.

    Args:
        commands: by name, modules with ``add_arguments(parser)`` and ``run(options)``; their docstrings are the help.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in commands.items():
        help_text = module.__doc__ or ""
        command = subparsers.add_parser(name, help=help_text.splitlines()[0], description=help_text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        sys.exit(f"error: {error}")
