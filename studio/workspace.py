"""The one folder that the studio reads and writes: names that come from a browser become paths inside it. No torch."""

import dataclasses
import re
from pathlib import Path

from delora_diffusers.errors import InputError

NAME = re.compile(r"\w(?:[\w .+-]*[\w+-])?")
"""Letters and digits of any script, and a few signs that no shell, file system or HTML page takes for its own. A name
starts with a letter, digit or underscore, so that it is neither hidden nor a flag, and does not end with a dot or
space, which Windows drops."""
LONGEST_NAME = 100
"""Bytes; file systems allow 255, of which files that are written atomically need some more."""
RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
"""Names of devices on Windows, with any extension."""
FIRST_SET = "toy"
"""The photos that are there at the first start."""


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The studio's folder. Creating an instance creates the folder and its three parts.

    Attributes:
        root: absolute, with symbolic links resolved.

    Raises:
        InputError: the folder cannot be created, or one of its parts is a link that leaves it.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser().resolve())
        for folder in (self.photos, self.runs, self.outputs):
            self.within(folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{folder} cannot be created ({error.strerror}); choose another workspace.") from error

    @property
    def photos(self) -> Path:
        """One folder per set of photos."""
        return self.root / "photos"

    @property
    def runs(self) -> Path:
        """The output folders of training runs."""
        return self.root / "runs"

    @property
    def outputs(self) -> Path:
        """Generated images, comparisons and exports."""
        return self.root / "outputs"

    def photo_set(self, name: str) -> Path:
        """The folder of a set of photos, which need not exist.

        Raises:
            InputError: the name is not the name of a folder in the workspace; see ``checked_name``.
        """
        return self._named(self.photos, name)

    def run(self, name: str) -> Path:
        """The output folder of a training run; see ``photo_set``."""
        return self._named(self.runs, name)

    def output(self, name: str) -> Path:
        """A folder for generated images; see ``photo_set``."""
        return self._named(self.outputs, name)

    def within(self, path: str | Path) -> Path:
        """A path with symbolic links resolved, which need not exist.

        Args:
            path: absolute, or relative to the workspace.

        Raises:
            InputError: it is outside the workspace.
        """
        try:
            resolved = (self.root / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL
            raise InputError(f"{path} is not a path ({error}); choose a file in the workspace.") from error
        if not resolved.is_relative_to(self.root):
            raise InputError(f"{path} is outside the workspace {self.root}; copy it there.")
        return resolved

    def photo_sets(self) -> list[str]:
        """The names of the sets of photos, sorted."""
        return self._folders(self.photos)

    def run_names(self) -> list[str]:
        """The names of the training runs, sorted."""
        return self._folders(self.runs)

    def output_names(self) -> list[str]:
        """The names of the folders among the outputs, sorted."""
        return self._folders(self.outputs)

    def _named(self, parent: Path, name: str) -> Path:
        path = parent / checked_name(name)
        self.within(path)
        return path

    def _folders(self, parent: Path) -> list[str]:
        return sorted(path.name for path in parent.iterdir() if path.is_dir() and self._is_listed(path))

    def _is_listed(self, path: Path) -> bool:
        try:
            return self._named(path.parent, path.name) == path
        except InputError:
            return False


def checked_name(name: str) -> str:
    """The name, if it can be that of a folder everywhere: one visible part of a path.

    Raises:
        InputError
    """
    if RESERVED.fullmatch(name):
        raise InputError(f"the name {name!r} cannot be used, because Windows reserves it; choose another.")
    if not NAME.fullmatch(name):
        raise InputError(
            f"the name {name!r} cannot be used; take letters, digits, spaces and . _ - + only, with a letter or digit "
            "at the start and the end."
        )
    if len(name.encode()) > LONGEST_NAME:
        raise InputError(f"the name {name!r} is longer than {LONGEST_NAME} bytes; shorten it.")
    return name


def open_workspace(root: Path) -> Workspace:
    """Open or create a workspace. One without any photos gets five of a rendered toy, without captions.

    Raises:
        InputError: see ``Workspace``.
    """
    workspace = Workspace(root)
    if not workspace.photo_sets():
        from data.toybox.write import write_unseen_subject  # imports torch

        write_unseen_subject(workspace.photo_set(FIRST_SET))
    return workspace
