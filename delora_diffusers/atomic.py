"""Write files and folders completely or not at all. Imports no torch.

Both are written under a temporary name, ``.NAME.PID.part``, and renamed. What a killed process left behind under such a
name is removed by the next one that writes the same file or folder.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from delora_diffusers.errors import InputError

PARTS = (".*.part", "**/.*.part")
"""Patterns of the temporary names."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; moved to ``path`` on success, removed on failure.

    The file gets the permissions of any new file, whatever the function that writes it sets.

    Raises:
        InputError: the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, permissions)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    finally:
        _remove(temporary)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill; renamed to ``path`` on success, removed on failure.

    Raises:
        InputError: the disk is full, the parent folder is not writable, or ``path`` was created in the meantime.
    """
    path = Path(os.path.abspath(path))
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        _remove(temporary)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file as UTF-8, completely or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left in a folder to which nothing else is writing."""
    for pattern in PARTS:
        for part in list(folder.glob(pattern)):
            _remove(part)


def _not_written(path: Path, error: Exception) -> InputError:
    full = isinstance(error, SafetensorError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space or choose another folder" if full else "choose another folder"
    return InputError(f"{path} could not be written ({error}); {remedy}.")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of this path whose processes no longer run."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.part")
    for entry in os.scandir(path.parent):
        match = pattern.fullmatch(entry.name)
        if match and (int(match[1]) == os.getpid() or not _runs(int(match[1]))):
            _remove(Path(entry.path))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _remove(path: Path) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.unlink()
