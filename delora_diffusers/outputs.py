"""Checks of output files and folders before the work that fills them, and the lock while it runs. Imports no torch."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from delora_diffusers.atomic import remove_parts
from delora_diffusers.errors import InputError
from delora_diffusers.locking import locked_folders
from delora_diffusers.names import CONFIG_NAME, WEIGHTS_NAME

MIN_FREE_BYTES = 256 * 2**20
"""What a training run may need for its checkpoints, at least."""


def check_writable(path: Path, flag: str) -> None:
    """Refuse an output that could not be written later.

    Raises:
        InputError
    """
    existing = next(parent for parent in _with_parents(path) if os.path.exists(parent))
    if not os.path.isdir(existing) and existing != _with_parents(path)[0]:
        raise InputError(f"{flag} {path} cannot be written: {existing} is a file; choose another folder.")
    if not os.access(existing, os.W_OK | (os.X_OK if os.path.isdir(existing) else 0)):
        raise InputError(f"{flag} {path} cannot be written: {existing} is read-only for you; choose another folder.")


def check_results_folder(folder: Path, known: Callable[[str], bool], what: str) -> None:
    """Refuse an output folder that has files, but none of those that an earlier start of this command leaves.

    Args:
        known: whether a name in the folder is that of a result. what: leaves them, for the sentence.

    Raises:
        InputError
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"--output_dir {folder} is a file; give a folder.")
    names = [name for name in os.listdir(folder) if not name.startswith(".")] if os.path.isdir(folder) else []
    if names and not any(map(known, names)):
        raise InputError(f"--output_dir {folder} contains files that are not of {what}; give a new folder.")


def check_new(path: Path, flag: str) -> None:
    """Refuse an output that exists or could not be written later.

    Raises:
        InputError
    """
    if os.path.lexists(path):
        raise InputError(f"{flag} {path} already exists; remove it, or give another name.")
    check_writable(path, flag)


def check_run_folder(folder: Path, resume_from_checkpoint: str | None) -> None:
    """Refuse the output folder of a training run if it contains another run, cannot be written or is on a full disk.

    Raises:
        InputError
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"--output_dir {folder} is a file; give a folder.")
    check_writable(folder, "--output_dir")
    contents = _contents(folder) if os.path.isdir(folder) else []
    if contents and not _is_run(contents):
        raise InputError(f"--output_dir {folder} contains files that are not of a run; give a new folder.")
    if contents and resume_from_checkpoint is None:
        raise InputError(
            f"--output_dir {folder} contains another run; give a new folder, or continue that run with "
            "--resume_from_checkpoint latest."
        )
    free = shutil.disk_usage(next(parent for parent in _with_parents(folder) if os.path.exists(parent))).free
    if free < MIN_FREE_BYTES:
        raise InputError(
            f"--output_dir {folder} is on a disk with {free / 2**20:.0f} MiB free, but a run needs at least "
            f"{MIN_FREE_BYTES / 2**20:.0f} MiB; free some space or choose another disk."
        )


def _contents(folder: Path) -> list[str]:
    """The names in a folder, without what a run that ended before its first checkpoint leaves."""
    names = [entry.name for entry in os.scandir(folder) if not (entry.name[0] == "." and entry.name.endswith(".part"))]
    return [] if set(names) <= {CONFIG_NAME, "logs"} else names


def _is_run(names: Sequence[str]) -> bool:
    """Whether a folder with these names in it is that of a training run."""
    return not {CONFIG_NAME, WEIGHTS_NAME, "logs", "class_images"}.isdisjoint(names) or any(
        name.startswith("checkpoint-") for name in names
    )


@contextmanager
def held_folders(folders: Sequence[Path], resume_from_checkpoint: str | None) -> Iterator[None]:
    """Hold the output folders of a training run until it ends, so that a second run that writes to one is refused.

    Raises:
        InputError: another run holds a folder, or has written to it since it was checked.
    """
    with held_outputs(folders):
        for folder in folders if is_first_process() else ():
            check_run_folder(folder, resume_from_checkpoint)
        yield


@contextmanager
def held_outputs(folders: Sequence[Path]) -> Iterator[None]:
    """Hold output folders and remove what killed runs left in them. Of several processes, the first holds them.

    Raises:
        InputError: another run holds a folder.
    """
    if not is_first_process():
        yield
        return
    with locked_folders(folders):
        for folder in folders:
            remove_parts(folder)
        yield


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that ``accelerate launch`` started."""
    return os.environ.get("RANK", "0") == "0"


def _with_parents(path: Path) -> list[Path]:
    absolute = Path(os.path.abspath(path))
    return [absolute, *absolute.parents]
