"""Run one of several commands from the command line. Imports no torch."""

import argparse
import errno
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from delora_diffusers.errors import InputError, printable
from delora_diffusers.memory import ANYWHERE, is_out_of_memory, out_of_memory_sentence

INACCESSIBLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENOSPC)
"""Errors of the file system that the user can correct, wherever they occur."""


KINDS = {"int": "a whole number", "positive_int": "a whole number of at least 1", "float": "a number"}
"""What argparse calls by the name of a function."""
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as in shells."""
TERMINATED = 128 + signal.SIGTERM


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage, which is a page long.

    Attributes:
        source: where the words come from, if not from the command line; errors name it.
    """

    source: str | None = None

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **{"allow_abbrev": False} | values)  # a shortened flag would pass checks by name

    def error(self, message: str) -> NoReturn:
        where = "" if self.source is None else f"{self.source}: "
        self.exit(2, printable(f"error: {where}{sentence_of(message)}; --help lists the flags.") + "\n")


def sentence_of(message: str) -> str:
    """What argparse says of a wrong command line, in the words of the other errors and without a full stop."""
    flag, named, text = message.removeprefix("argument ").partition(": ")
    if not message.startswith("argument ") or not named:
        unknown, missing = "unrecognized arguments: ", "the following arguments are required: "
        if message.startswith(unknown + "-"):
            return f"there is no flag {message.removeprefix(unknown).split()[0]}"
        if message.startswith(missing):
            return f"{message.removeprefix(missing)} is missing"
        return message.rstrip(".")
    flag = flag.split("/")[0]
    wrong = re.fullmatch(r"invalid (\w+) value: '?(.*?)'?", text, re.DOTALL)
    if wrong:
        return f"{flag} is {wrong[2]}, not {KINDS.get(wrong[1], 'a valid value')}"
    choice = re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", text, re.DOTALL)
    if choice:
        return f"{flag} {choice[1]} does not exist; choose from {choice[2]}".replace("'", "")
    return f"{flag} {text}" if text.startswith("expected") else f"{flag}: {text}"


def run_command(
    prog: str, description: str, commands: Mapping[str, ModuleType], arguments: list[str] | None = None
) -> None:
    """Parse the command line and run the chosen command; bad input exits with a one-sentence message and code 1.

    Args:
        commands: modules by command name, with ``add_arguments(parser)`` and ``run(options)``; their docstrings are the
            help texts.
    """
    parser = Parser(prog=prog, description=description)
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
    """Exit with code 1 and one sentence for bad input and for lack of memory, and without a traceback on Ctrl-C and
    SIGTERM; other errors keep theirs."""
    try:
        with _clean_up_on_sigterm():
            yield
    except InputError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: {out_of_memory_sentence('running this command', ANYWHERE)}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in INACCESSIBLE or error.filename is None:
            raise
        sys.exit(printable(f"error: {error.filename} cannot be accessed ({error.strerror}); check the path."))


@contextmanager
def _clean_up_on_sigterm() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C, so that started processes and temporary files do not stay. Launchers send it twice,
    so only the first one counts. Only a main thread receives signals; where they are handled already, nothing changes.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("terminated; run the same command again to go on", file=sys.stderr)
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
