"""Run one of several commands from the command line. Imports no torch."""

import argparse
import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from delora_diffusers.errors import InputError, printable
from delora_diffusers.memory import ANYWHERE, is_out_of_memory, out_of_memory_sentence

INACCESSIBLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENOSPC)
"""Errors of the file system that the user can correct, wherever they occur."""


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
    with exit_on_bad_input():
        options.run(options)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Exit with code 1 and one sentence for bad input and for lack of memory; other errors keep their traceback."""
    try:
        yield
    except InputError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: {out_of_memory_sentence('running this command', ANYWHERE)}")
    except OSError as error:
        if error.errno not in INACCESSIBLE or error.filename is None:
            raise
        sys.exit(printable(f"error: {error.filename} cannot be accessed ({error.strerror}); check the path."))
