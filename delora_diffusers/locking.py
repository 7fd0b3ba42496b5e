"""Let one run at a time write to a folder. Imports no torch.

The folder itself is locked, so no lock file is left behind, and the lock ends with the process, however that ends.
"""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from delora_diffusers.errors import InputError, printable

if sys.platform != "win32":
    import fcntl

WITHOUT_LOCKS = (errno.ENOLCK, errno.EBADF, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""Errors of file systems that cannot lock folders, such as some network drives; runs there are not protected."""


@contextmanager
def locked_folder(folder: Path, wait: bool = False) -> Iterator[int | None]:
    """Hold a folder, which is created if necessary, and removed afterwards if it is still empty.

    Args:
        wait: until the other run ends, instead of refusing.

    Yields:
        The descriptor that holds the lock, which a child process may inherit; None if the file system has no locks.

    Raises:
        InputError: another run holds the folder, or it cannot be created.
    """
    created = not folder.is_dir()
    descriptor = _lock(folder, wait)
    try:
        yield descriptor
    finally:
        if created:
            with suppress(OSError):  # it contains something, or is gone
                folder.rmdir()
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def locked_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Hold several folders; see ``locked_folder``."""
    with ExitStack() as stack:
        for folder in dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders):
            stack.enter_context(locked_folder(folder))
        yield


def _lock(folder: Path, wait: bool) -> int | None:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if sys.platform == "win32":
                return None
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # the run that had created the folder has just removed it
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                os.close(descriptor)
                raise InputError(
                    f"another run is writing to {folder}; wait until it ends, or give another folder."
                ) from error
            print(printable(f"waiting for another command that is running in {folder}"), file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            os.close(descriptor)
            if error.errno in WITHOUT_LOCKS:
                return None
            raise
        if os.path.isdir(folder) and os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)  # of a folder that was removed before it was locked
