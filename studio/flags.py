"""The flags of the training script as fields of a form, and a filled-in form as a command. Imports no torch.

Nothing is listed twice: names, types, explanations, defaults and groups are those of the script's own parser.
"""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import train_dreambooth_delora as script
from delora_diffusers.errors import InputError
from delora_diffusers.text_files import is_text
from delora_diffusers.training.config_file import parse_with_config
from delora_diffusers.training.subject_arguments import check_arguments

ROOT = Path(__file__).resolve().parent.parent
"""The repository, in which commands run."""
LAUNCH = ("accelerate", "launch", "train_dreambooth_delora.py")

BASIC = (
    "pretrained_model_name_or_path",
    "method",
    "recipe",
    "instance_prompt",
    "max_train_steps",
    "learning_rate",
    "rank",
    "resolution",
    "train_batch_size",
    "seed",
    "validation_prompt",
    "validation_steps",
    "validation_split",
)
"""What a form shows at once, in this order."""

SET_BY_STUDIO = ("output_dir", "instance_data_dir", "resume_from_checkpoint")
"""Flags that follow from the run's name and the chosen photos."""
NOT_OFFERED = (
    *SET_BY_STUDIO,
    *("help", "config", "report_to"),  # the page reads tensorboard's files
    *("concepts_list", "subjects_file"),  # files that name folders anywhere
    *("push_to_hub", "hub_model_id", "hub_token"),  # for which there is a command
)

DEFAULT_PART = re.compile(r"(?:^|; )default: [^;]*")
"""The part of a flag's help that names its default."""

Kind = Literal["text", "int", "float", "bool", "choice", "list", "path"]


@dataclasses.dataclass(frozen=True)
class Field:
    """A flag of the training script.

    Attributes:
        name: the key in a form's values. flag: as it is written in a command.
        kind: ``list`` for a flag that takes several words. A switch that can be left to the script, like
            ``--cuda_graph``, is a ``choice`` of yes and no.
        default: without a base model of its own defaults; None if it depends on other flags, which the help explains.
        group: the title of its group in the script's help.
        basic: whether a form shows it at once.
    """

    name: str
    flag: str
    help: str
    kind: Kind
    choices: tuple[str, ...] | None
    default: Any
    group: str
    basic: bool


class _Parser(argparse.ArgumentParser):
    """A parser that raises its complaint instead of printing it and ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; see train_dreambooth_delora.py --help.")


def fields() -> list[Field]:
    """The fields of a form, the basic ones first."""
    parser = script.build_parser()
    titles = {id(action): group.title or "" for group in parser._action_groups for action in group._group_actions}
    offered = {
        action.dest: _field(action, titles[id(action)]) for action in parser._actions if action.dest not in NOT_OFFERED
    }
    basic = [offered[name] for name in BASIC]
    return basic + [field for field in offered.values() if not field.basic]


def _field(action: argparse.Action, group: str) -> Field:
    choices = None if action.choices is None else tuple(map(str, action.choices))
    kind: Kind = "text"
    if isinstance(action, argparse.BooleanOptionalAction):
        kind, choices = "choice", ("yes", "no")
    elif action.nargs == 0:
        kind = "bool"
    elif action.nargs == "+":
        kind = "list"
    elif choices is not None:
        kind = "choice"
    elif action.type is Path:
        kind = "path"
    elif action.type is float:
        kind = "float"
    elif action.type is not None and getattr(action.type, "__name__", "") in ("int", "positive_int"):
        kind = "int"
    text = (action.help or "") % vars(action) if action.help else ""
    basic = action.dest in BASIC
    return Field(action.dest, action.option_strings[0], text, kind, choices, action.default, group, basic)


def without_default(text: str) -> str:
    """A flag's help for a form that shows the default in another place."""
    return DEFAULT_PART.sub("", text).removeprefix("; ")


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the parser returns without further flags for the base model and the recipe among these values."""
    given = {name: _normalized(values.get(name), None) for name in ("pretrained_model_name_or_path", "recipe")}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return vars(parse_with_config(script.build_parser(_Parser), words))


def effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the script would use for every field: what is given, and its defaults, also those that depend on other
    flags.

    Raises:
        InputError: a value is invalid.
    """
    args = _parsed(values)
    used = vars(args) | {"resolution": args.resolutions}
    return {field.name: used[field.name] for field in fields()}


def command(values: Mapping[str, Any]) -> list[str]:
    """The command that trains with these values, with the flags that differ from the defaults.

    Args:
        values: by field; None and blank text stand for the default. A list may be a text with one item per line, and a
            list of numbers a text of numbers. The flags of ``SET_BY_STUDIO`` may be among them; other keys are ignored.

    Raises:
        InputError: a value cannot be that of its flag.
    """
    # The flags on which defaults depend are compared with the parser's own defaults.
    parser, depends = script.build_parser(), ("pretrained_model_name_or_path", "recipe")
    defaults = _defaults(values) | {name: parser.get_default(name) for name in depends}
    words: list[str] = list(LAUNCH)
    for action in parser._actions:
        if action.dest in NOT_OFFERED and action.dest not in SET_BY_STUDIO:
            continue
        value = _normalized(values.get(action.dest), action)
        if value is not None and value != defaults[action.dest]:
            words += _as_words(action, value)
    return words


def shown(words: Sequence[str]) -> str:
    """A command as one line for a shell in the repository's folder, with paths inside it relative to it."""
    return shlex.join(_relative(word) for word in words)


def check(values: Mapping[str, Any]) -> None:
    """Check values as the script does before it loads anything: flags, prompts and photos.

    Raises:
        InputError: what the script would say.
    """
    args = _parsed(values)
    check_arguments(args)
    if args.instance_data_dir is not None:
        script.find_subjects(args)


def _parsed(values: Mapping[str, Any]) -> argparse.Namespace:
    return script.parse_arguments(command(values)[len(LAUNCH) :], _Parser)


def _normalized(value: Any, action: argparse.Action | None) -> Any:
    """A value as the parser returns it; None for one that is not given.

    Raises:
        InputError: it is not of the flag's kind.
    """
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        value = value.strip() or None
    if value is None or action is None:
        return value
    if isinstance(action, argparse.BooleanOptionalAction):
        value = {"yes": True, "no": False}.get(value, value) if isinstance(value, str) else value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{action.option_strings[0]} is {value!r}; choose yes or no.")
        return value
    if action.nargs == "+":
        if isinstance(value, str):
            value = value.replace(",", " ").split() if action.type is int else value.splitlines()
        items = value if isinstance(value, list | tuple) else [value]
        items = [item for item in items if item is not None and str(item).strip()]
        return [_converted(str(item).strip(), action) for item in items] or None
    if isinstance(value, float) and value.is_integer() and _field(action, "").kind == "int":
        value = int(value)  # a form's number
    return _converted(str(value), action)


def _converted(text: str, action: argparse.Action) -> Any:
    flag = action.option_strings[0]
    if not is_text(text) or "\0" in text:
        raise InputError(f"{flag} {text!r} contains characters that a command cannot have; remove them.")
    convert = action.type
    try:
        value = convert(text) if callable(convert) else text
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{flag}: {error}; give another value.") from error
    except (TypeError, ValueError) as error:
        kind = {"int": "a whole number", "float": "a number"}.get(_field(action, "").kind, "a valid value")
        raise InputError(f"{flag} {text!r} is not {kind}; give another value.") from error
    if action.choices is not None and value not in action.choices:
        raise InputError(f"{flag} {text!r} is not one of {', '.join(map(str, action.choices))}; choose one of them.")
    return value


def _as_words(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[not value]]
        return [flag] if value else []
    items = [_written(item) for item in (value if isinstance(value, list) else [value])]
    if not any(item.startswith("-") for item in items):
        return [flag, *items]
    if len(items) == 1:
        return [f"{flag}={items[0]}"]
    dashed = next(item for item in items if item.startswith("-"))
    raise InputError(f"{flag} {dashed!r} would be read as a flag; start it otherwise.")


def _written(value: Any) -> str:
    """A value that the parser reads as the same one."""
    return repr(value) if isinstance(value, float) else str(value)


def _relative(word: str) -> str:
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    return f"{flag}{equals}{path.relative_to(ROOT)}" if path.is_absolute() and path.is_relative_to(ROOT) else word
