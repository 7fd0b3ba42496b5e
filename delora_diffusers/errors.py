"""The exception for input that the user can correct, and how text from files is shown."""

import pickle
import struct
import unicodedata
import zipfile
import zlib

from safetensors import SafetensorError

LONGEST = 1200
"""Characters of the longest error message."""


class InputError(ValueError):
    """Invalid user input; the message is one sentence that says what is wrong and how to fix it.

    The message may quote names and values from any file: control characters and line breaks in it are escaped.
    """

    def __init__(self, message: object):
        super().__init__(_shortened(printable(str(message))))


def _shortened(text: str) -> str:
    """The text without its middle if a value in it is longer than anybody reads."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def printable(text: str) -> str:
    """The text with escapes for every character that would change a terminal or start a new line.

    Those are control and format characters (colours, cursor movements, text direction), line and paragraph separators
    and lone surrogates.
    """
    if text.isprintable():  # the usual case, and much faster
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def _escaped(character: str) -> str:
    if character == "\u200d":  # joins the parts of an emoji
        return character
    return character.encode("unicode_escape").decode("ascii")


LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, zlib.error),
)
"""What the libraries that load models and datasets raise for files that are missing, damaged or of another kind."""


def reason(error: Exception, longest: int = 300) -> str:
    """What a library's error says, on one line; with its type, if the text alone would not make sense."""
    text = " ".join(str(error).split())
    if not isinstance(error, OSError | ValueError | ImportError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= longest else text[:longest] + "..."
