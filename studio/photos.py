"""Sets of photos in the workspace: captions, masks and previews; what adds and inspects photos is found here too."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from data.photographs import Masks
from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import (
    CAPTION_EXTENSIONS,
    MASK_ENDINGS,
    list_images,
    load_mask,
    load_rgb,
    mask_beside,
    upright_size,
)
from delora_diffusers.json_lines import write_json_lines
from delora_diffusers.locking import locked_folder
from delora_diffusers.names import METADATA_NAME
from studio.photo_files import (
    belongs,
    caption_files,
    check_pixels,
    checked_caption,
    existing_set,
    listed_photo,
    photo_of,
    records_of,
    text_of,
)
from studio.photo_import import Imported as Imported
from studio.photo_import import import_photos as import_photos
from studio.photo_inspection import Box
from studio.photo_inspection import PhotoInfo as PhotoInfo
from studio.photo_inspection import SetInfo as SetInfo
from studio.photo_inspection import inspect_set as inspect_set
from studio.uploads import copied
from studio.workspace import Workspace

REMOVED = ".removed"
"""The folder of the workspace to which removed photos are moved; nothing in it is shown or served."""


def save_caption(workspace: Workspace, name: str, file: str, text: str) -> None:
    """Write a photo's caption where training reads it: in ``metadata.jsonl`` if that has one, else in a text file
    beside the photo. An empty caption is removed, so that ``--instance_prompt`` is used.

    Raises:
        InputError: there is no such photo, or the text cannot be written as UTF-8.
    """
    path, folder = photo_of(workspace, name, file), workspace.photo_set(name)
    text = checked_caption(text, file)
    with locked_folder(folder, wait=True):
        records = records_of(workspace, folder)
        record = next((r for r in records if r["file_name"] == file and text_of(r) is not None), None)
        text_files = caption_files(path)
        if text and record is None:
            file_of_text = text_files.pop(0) if text_files else path.with_suffix(CAPTION_EXTENSIONS[0])
            write_text(file_of_text, text + "\n")
        if record is not None:
            record.pop("prompt", None)
            record["text"] = text or None
            write_json_lines(folder / METADATA_NAME, records)
        for other in text_files if record is None or not text else []:  # training would read it too
            other.unlink()


def save_mask(workspace: Workspace, name: str, file: str, image: Path) -> None:
    """Write a photo's mask beside it, in place of one that is there.

    Args:
        image: white where the subject is and black elsewhere, or with an alpha channel that is; of the photo's shape.

    Raises:
        InputError: there is no such photo, or the image is not a mask for it.
    """
    path, folder = photo_of(workspace, name, file), workspace.photo_set(name)
    check_pixels(path, file)
    with tempfile.TemporaryDirectory(prefix="delora-mask-") as temporary:
        uploads, refused = copied([Path(image)], Path(temporary))
        if not uploads:
            raise InputError(refused[0] if refused else f"{image.name} is not a mask; choose an image.")
        try:
            check_pixels(uploads[0].path, uploads[0].shown)
            mask = load_mask(uploads[0].path, upright_size(path, file))
        except InputError as error:
            raise InputError(str(error).replace(str(uploads[0].path), uploads[0].shown)) from error
        with locked_folder(folder, wait=True):
            earlier = mask_beside(path)
            target = path.with_name(f"{path.stem}{MASK_ENDINGS[0]}.png")
            with atomic_write(target) as part:
                mask.save(part, format="PNG")
            if earlier is not None and earlier.name != target.name:
                earlier.unlink()


def remove_photo(workspace: Workspace, name: str, file: str) -> None:
    """Move a photo with its caption and its mask to a hidden folder, from which ``restore_photo`` brings them back.

    Raises:
        InputError: there is no such photo.
    """
    folder = existing_set(workspace, name)
    with locked_folder(folder, wait=True):
        path = listed_photo(folder, file)
        records = records_of(workspace, folder)
        kept = [record for record in records if record["file_name"] != file]
        shared = any(other.stem == path.stem and other != path for other in list_images(folder))
        beside = [] if shared else [entry for entry in folder.iterdir() if belongs(entry.name, path)]
        removed = _removed(workspace, name) / str(time.time_ns())
        removed.mkdir(parents=True)
        lines = [record for record in records if record["file_name"] == file]
        if lines:
            write_json_lines(removed / METADATA_NAME, lines)
        for moved in (path, *(other for other in beside if not other.is_dir())):
            shutil.move(moved, removed / moved.name)
        if lines:
            write_json_lines(folder / METADATA_NAME, kept)


def has_removed(workspace: Workspace, name: str) -> bool:
    """Whether ``restore_photo`` has something to restore."""
    folder = _removed(workspace, name)
    return folder.is_dir() and any(folder.iterdir())


def restore_photo(workspace: Workspace, name: str) -> str:
    """Bring back what the last ``remove_photo`` removed from a set; returns the name of the photo.

    Raises:
        InputError: nothing was removed, or the set has other files of these names now.
    """
    if not has_removed(workspace, name):
        raise InputError(f"nothing was removed from {name}; there is nothing to restore.")
    folder = workspace.photo_set(name)
    with locked_folder(folder, wait=True):
        removed = max(_removed(workspace, name).iterdir(), key=lambda path: path.name)
        lines = records_of(workspace, removed)
        files = [path for path in removed.iterdir() if path.name != METADATA_NAME]
        taken = [path.name for path in files if os.path.lexists(folder / path.name)]
        if taken:
            raise InputError(f"{name} has another {min(taken)} now; remove it first, then restore the earlier one.")
        photo = next((path.name for path in list_images(removed)), "the photo")
        for path in files:
            shutil.move(path, folder / path.name)
        if lines:
            write_json_lines(folder / METADATA_NAME, [*records_of(workspace, folder), *lines])
        shutil.rmtree(removed)
    return photo


def _removed(workspace: Workspace, name: str) -> Path:
    """Where removed photos of a set are, one folder for each removal."""
    folder = workspace.root / REMOVED / workspace.photo_set(name).name
    workspace.within(folder)
    return folder


def preview(workspace: Workspace, name: str, file: str, side: int = 384, crop: Box | None = None) -> Image.Image:
    """A small image of a photo, with what is outside the crop darkened and its mask outlined.

    Args:
        side: the longer one, in pixels. crop: see ``PhotoInfo``; None for the whole photo.

    Raises:
        InputError: there is no such photo, or it cannot be read.
    """
    path = photo_of(workspace, name, file)
    check_pixels(path, file)
    photo = load_rgb(path)
    small = photo.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    if crop is not None:
        scale = (small.width / photo.width, small.height / photo.height) * 2
        limits = (small.width, small.height) * 2
        edges = (min(max(0, round(edge * factor)), limit) for edge, factor, limit in zip(crop, scale, limits))
        left, top, right, bottom = edges
        if left >= right or top >= bottom:
            raise InputError(f"the crop {crop} of {file} is empty; load the set again.")
        shown = Image.new("L", small.size, 90)
        shown.paste(255, (left, top, right, bottom))
        small = Image.composite(small, Image.new("RGB", small.size), shown)
    mask = None
    with suppress(InputError):  # the warnings say what is wrong with it
        if (mask_file := _mask_file(workspace, path)) is not None:
            mask = load_mask(mask_file, photo.size, alpha=mask_file == path).resize(small.size, Image.Resampling.BOX)
    if mask is not None:
        marked = Image.fromarray(np.where(np.asarray(mask) >= 128, 255, 0).astype(np.uint8))
        line = ImageChops.difference(marked.filter(ImageFilter.MaxFilter(5)), marked)
        small.paste((255, 64, 160), None, line)
    return small


def _mask_file(workspace: Workspace, photo: Path) -> Path | None:
    """The file that has a photo's mask.

    Raises:
        InputError: there are two, or it is outside the workspace.
    """
    mask = Masks(use=True).of(photo)
    if mask is not None:
        workspace.within(mask)
        check_pixels(mask, mask.name)
    return mask
