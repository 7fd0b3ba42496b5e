"""Text files as people write them: captions, prompts, JSON and YAML. Imports no torch.

Every text file that the project did not write itself is read here. It must be UTF-8, with or without a byte-order mark,
and its lines may end as on any system. Line separators inside a line, such as U+2028, are part of the text.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from delora_diffusers.errors import InputError


def read_text(file: Path) -> str:
    r"""The contents of a UTF-8 file without its byte-order mark, with ``\n`` as line ends.

    Raises:
        InputError: the file cannot be read or is not UTF-8; the message gives the first byte that is not.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist; check the path.") from error
    except OSError as error:
        raise InputError(f"{file} could not be read ({error.strerror}); check its permissions.") from error
    text = decode(content, str(file))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, name: str) -> str:
    """Decode UTF-8.

    Args:
        name: how the error message refers to the file.

    Raises:
        InputError: it is another encoding.
    """
    try:
        text = content.decode("utf-8-sig")
        position, problem = text.find("\0"), "byte 0x00"
        if position < 0:
            return text
        position = len(text[:position].encode())
    except UnicodeDecodeError as error:
        position, problem = error.start, f"byte 0x{content[error.start]:02x}"
    halves = content[0:64:2], content[1:64:2]  # in UTF-16 one byte of each Latin letter is 0, and the other is not
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff") or (any(map(any, halves)) and not all(map(any, halves)))
    looks_like = " and looks like UTF-16" if is_utf16 else ""
    raise InputError(f"{name} is not UTF-8 text ({problem} at position {position}){looks_like}; save it as UTF-8.")


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; JSON and command lines may contain NUL and half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def read_lines(file: Path) -> list[tuple[int, str]]:
    """(line number, text) of every line that is not blank, without surrounding spaces.

    Raises:
        InputError: see ``read_text``.
    """
    lines = ((number, line.strip()) for number, line in enumerate(read_text(file).split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply to be one of the project's files, or gives a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{repeated!r} is given twice")
    return entries


def read_json(file: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        return parse_json(read_text(file))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); fix or replace it.") from error


def read_yaml(file: Path) -> Any:
    """The contents of a YAML file, in which every scalar is the text as it was typed; only null is None.

    Nothing is converted: ``no`` is a choice and not a boolean, ``2026-01-02`` and ``010`` are no date and no octal
    number. Whoever asks for a value converts it; see ``as_bool``.

    Raises:
        InputError: the file cannot be read or is not YAML, or a key is given twice.
    """
    try:
        return yaml.load(read_text(file), Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{file} is not valid YAML ({line}{error.problem}); fix it.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML ({' '.join(str(error).split())}); fix it.") from error
    except InputError:
        raise
    # All but the first: values of an explicit tag, such as !!int x.
    except (RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"{file} is not valid YAML ({problem}); fix it.") from error


class _TextLoader(yaml.SafeLoader):
    """Reads scalars as text. Rejects a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))])
}

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def as_bool(value: Any) -> bool | None:
    """A YAML value as a boolean, quoted or not; None if it is none."""
    return _BOOLEANS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def as_int(value: Any) -> int | None:
    """A YAML value as a whole number in decimal notation; None if it is none."""
    if isinstance(value, str):
        digits = value.removeprefix("-").removeprefix("+")
        return int(value) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
