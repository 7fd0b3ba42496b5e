"""The photos of a set and which files belong to one, by the project's conventions; how large it may be. No torch."""

from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import CAPTION_EXTENSIONS, MASK_ENDINGS, list_images, open_image, readable_extensions
from delora_diffusers.json_lines import PHOTOS, read_json_lines
from delora_diffusers.names import METADATA_NAME
from delora_diffusers.text_files import is_text
from studio.workspace import Workspace

MAX_PIXELS = 80_000_000
"""Of a photo, which takes 240 MB decoded; phones have up to 50 million, unless they are asked for more."""
LONGEST_CAPTION = 5000
"""Characters; text encoders read a few hundred at most."""


def belongs(name: str, photo: Path) -> bool:
    """Whether a file of this name can be the caption or a mask of a photo in its folder."""
    stem, suffix = Path(name).stem, Path(name).suffix.lower()
    if suffix in CAPTION_EXTENSIONS:
        return stem == photo.stem
    owners = [stem.removesuffix(ending) for ending in MASK_ENDINGS if stem.endswith(ending)]
    return suffix in readable_extensions() and any(owner in (photo.stem, photo.name) for owner in owners)


def caption_files(photo: Path) -> list[Path]:
    files = sorted(path for path in photo.parent.iterdir() if path.suffix.lower() in CAPTION_EXTENSIONS)
    return [path for path in files if path.stem == photo.stem]


def owner_of(name: str) -> str:
    """The name without its extension and the ending of a mask."""
    stem = Path(name).stem
    return next((stem.removesuffix(ending) for ending in MASK_ENDINGS if stem.endswith(ending)), stem)


def check_pixels(path: Path, name: str) -> None:
    """Refuse a photo that is too large, from its header."""
    with open_image(path) as image:
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million that are read; scale "
            "it down."
        )


def text_of(record: dict[str, Any]) -> str | None:
    """The caption in a line of ``metadata.jsonl``."""
    return record.get("text", record.get("prompt"))


def checked_caption(text: str, file: str) -> str:
    """A caption without surrounding spaces.

    Raises:
        InputError: it cannot be written as UTF-8, or is longer than any caption.
    """
    if not is_text(text):
        raise InputError(f"the caption of {file} contains characters that are no text; type it again.")
    if len(text) > LONGEST_CAPTION:
        raise InputError(f"the caption of {file} has {len(text):,} characters; give at most {LONGEST_CAPTION:,}.")
    return text.strip()


def existing_set(workspace: Workspace, name: str) -> Path:
    """The folder of a set.

    Raises:
        InputError: there is none of that name.
    """
    folder = workspace.photo_set(name)
    if not folder.is_dir():
        raise InputError(f"there is no set of photos {name!r}; choose one in the list, or add photos to create it.")
    return folder


def listed_photo(folder: Path, file: str) -> Path:
    """The path of one of the photos that a set really has; nothing that a browser sends is used as a path."""
    path = next((path for path in list_images(folder) if path.name == file), None)
    if path is None:
        raise InputError(f"{folder.name} has no photo {file!r}; load the set again.")
    return path


def photo_of(workspace: Workspace, name: str, file: str) -> Path:
    """The path of a photo of a set, which no link leads out of the workspace.

    Raises:
        InputError: there is no such photo.
    """
    path = listed_photo(existing_set(workspace, name), file)
    workspace.within(path)
    return path


def records_of(workspace: Workspace, folder: Path) -> list[dict[str, Any]]:
    """The lines of a set's ``metadata.jsonl``; none if it has no such file."""
    file = folder / METADATA_NAME
    workspace.within(file)
    return [record for _, record in read_json_lines(file, PHOTOS)] if file.is_file() else []
