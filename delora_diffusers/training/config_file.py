"""``--config FILE.yaml``: a file with the flags of a training script as keys."""

import argparse
import sys
from pathlib import Path
from typing import Any

from delora_diffusers.dispatch import Parser
from delora_diffusers.errors import InputError
from delora_diffusers.names import is_miniature
from delora_diffusers.text_files import as_bool, is_text, read_yaml
from delora_diffusers.training.defaults import MINIATURE_DEFAULTS


def parse_with_config(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, miniature: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Parse the values of ``--config`` as if they were given as flags, then the flags, which override them.

    Args:
        miniature: further defaults for the included base model; they override ``MINIATURE_DEFAULTS``.

    Raises:
        InputError: the file is missing, is not a mapping, or has a key that is not a flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    broken = next((word for word in argv if not is_text(word)), None)
    if broken is not None:
        raise InputError(f"the argument {broken!r} is not UTF-8; set the terminal's encoding, or use --config.")
    file = parser.parse_known_args(argv)[0].config
    argv = ([] if file is None else _read_config(parser, file)) + argv
    parsed = parser.parse_known_args(argv)[0]
    if is_miniature(parsed.pretrained_model_name_or_path):
        parser.set_defaults(**(MINIATURE_DEFAULTS | (miniature or {})))
    args = parser.parse_args(argv)
    if args.init_adapter is None:
        return args
    from delora_diffusers.training.init_adapter import with_settings_of_adapter  # imports torch

    return with_settings_of_adapter(args, _given(parser, argv))


def _given(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The names of the flags that were given, also with the value that is their default."""
    unset = object()
    args = parser.parse_args(argv, argparse.Namespace(**{action.dest: unset for action in parser._actions}))
    return {name for name, value in vars(args).items() if value is not unset}


def _read_config(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The contents of a YAML file as command line arguments."""
    if not file.is_file():
        raise InputError(f"{file} is not a file; give --config a YAML file.")
    values = read_yaml(file)
    if values is None:
        return []
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a mapping of flags to values; write lines like `rank: 16`.")
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    argv: list[str] = []
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            what = "cannot be set in a file" if key in ("config", "help") else "is not a flag"
            raise InputError(f"{file} sets {key!r}, which {what}; see --help for the flags.")
        argv += _as_arguments(file, actions[key], value)
    if isinstance(parser, Parser):
        parser.source = str(file)
        parser.parse_known_args(argv)  # so that an error names the file
        parser.source = None
    return argv


def _as_arguments(file: Path, action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0:
        switch = as_bool(value)
        if switch is None:
            raise InputError(f"{file} sets {action.dest} to {value!r}; write true or false.")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[not switch]]
        return [flag] if switch else []
    several = action.nargs == "+"
    items = value if isinstance(value, list) and several else [value]
    for item in items:
        if item is None or isinstance(item, list | dict):
            raise InputError(f"{file} sets {action.dest} to {value!r}; give {'values' if several else 'one value'}.")
    if not several:
        return [f"{flag}={value}"]
    dashed = next((item for item in items if str(item).startswith("-") and not _is_number(str(item))), None)
    if dashed is not None:
        raise InputError(f"{file} sets {action.dest} to {dashed!r}, which would be read as a flag; start it otherwise.")
    return [flag, *map(str, items)] if items else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
