"""Add uploaded photos to a set, with their captions and masks. No torch."""

import dataclasses
import filecmp
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import (
    CAPTION_EXTENSIONS,
    HEIF_EXTENSIONS,
    MASK_ENDINGS,
    load_rgb,
    readable_extensions,
)
from delora_diffusers.json_lines import PHOTOS, read_json_lines
from delora_diffusers.locking import locked_folder
from delora_diffusers.names import CONTACT_SHEET_NAME, METADATA_NAME
from delora_diffusers.text_files import read_text
from studio.photo_files import belongs, check_pixels, checked_caption, owner_of, text_of
from studio.uploads import Upload, copied, safe_name
from studio.workspace import Workspace

MAX_TEXT_BYTES = 2**20
"""Of a file of captions."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """The names that imported photos have in the set, and a sentence for each uploaded file that was refused."""

    files: list[str]
    refused: list[str]


def import_photos(workspace: Workspace, name: str, files: Sequence[Path]) -> Imported:
    """Add uploaded photos to a set, which is created if necessary. Nothing is overwritten: names that are taken get a
    number, unless the photo of that name is the same file.

    Args:
        files: images and zip archives of them, with captions (``01.txt`` for ``01.jpg``, or ``metadata.jsonl``) and
            masks (``01.mask.png``) beside them.

    Raises:
        InputError: the name cannot be used, or not a single photo could be imported.
    """
    folder = workspace.photo_set(name)
    with tempfile.TemporaryDirectory(prefix="delora-photos-") as temporary:
        uploads, refused = copied([Path(file) for file in files], Path(temporary))
        images, texts = [], []
        for upload in uploads:
            try:
                (images if _is_image(upload) else texts).append(upload)
            except InputError as error:
                refused.append(str(error))
        captions = _uploaded_captions(texts, images, refused)
        photos, masks = _without_masks(images, refused)
        if not photos:
            raise InputError(" ".join(refused[:5]) or "no photos were uploaded; choose images, or a zip of images.")
        written: list[Path] = []
        with locked_folder(folder, wait=True):
            try:
                names = []
                for photo in photos:
                    if _is_there(folder, photo):
                        refused.append(f"{photo.shown} was skipped, because the set already has this photo.")
                    else:
                        names.append(_add(folder, photo, captions.get(photo), masks.get(photo), written))
            except InputError:  # the disk is full
                for path in written:
                    path.unlink(missing_ok=True)
                raise
    return Imported(names, refused)


def _is_there(folder: Path, photo: Upload) -> bool:
    """Whether a set has this very file under this name."""
    earlier = folder / photo.name
    return earlier.is_file() and not earlier.is_symlink() and filecmp.cmp(earlier, photo.path, shallow=False)


def _is_image(upload: Upload) -> bool:
    """Whether an upload is a readable image; otherwise it is a text that may contain captions.

    Raises:
        InputError: it is neither.
    """
    if upload.suffix in CAPTION_EXTENSIONS or upload.name == METADATA_NAME:
        return False
    if upload.suffix in HEIF_EXTENSIONS and upload.suffix not in readable_extensions():
        raise InputError(f"{upload.shown} cannot be read; run `pip install pillow-heif`, or convert it to jpg.")
    if upload.suffix not in readable_extensions():
        raise InputError(f"{upload.shown} is not an image that is read; convert it to jpg or png.")
    try:
        check_pixels(upload.path, upload.shown)
        load_rgb(upload.path)
    except InputError as error:
        raise InputError(str(error).replace(str(upload.path), upload.shown)) from error
    return True


def _without_masks(images: Sequence[Upload], refused: list[str]) -> tuple[list[Upload], dict[Upload, Upload]]:
    """The photos among uploaded images, and the mask of each that has one."""
    photos, masks = [], {}
    for image in images:
        beside = (other for other in images if other.folder == image.folder and image.stem.endswith(MASK_ENDINGS))
        owner = next((other for other in beside if belongs(image.name, Path(other.name))), None)
        if owner is not None:
            masks.setdefault(owner, image)
        elif image.stem.endswith(MASK_ENDINGS[0]):
            refused.append(str(InputError(f"{image.shown} is a mask, and its photo is missing; upload both together.")))
        else:
            photos.append(image)
    return photos, masks


def _uploaded_captions(texts: Sequence[Upload], images: Sequence[Upload], refused: list[str]) -> dict[Upload, str]:
    """The caption of each uploaded image that has one."""
    captions: dict[Upload, str] = {}
    for upload in texts:
        try:
            if upload.path.stat().st_size > MAX_TEXT_BYTES:
                raise InputError(
                    f"{upload.shown} is larger than {MAX_TEXT_BYTES / 2**20:g} MiB; give shorter captions."
                )
            beside = [image for image in images if image.folder == upload.folder]
            if upload.name == METADATA_NAME:
                records = {r["file_name"]: text_of(r) for _, r in read_json_lines(upload.path, PHOTOS)}
                named = {safe: text for file, text in records.items() if text and (safe := safe_name(file))}
                for image in beside:
                    if image.name in named:
                        captions[image] = checked_caption(named[image.name], image.shown)
                continue
            owners = [image for image in beside if image.stem == upload.stem]
            if not owners:
                raise InputError(f"{upload.shown} was not used, because no photo has its name; rename one of them.")
            text = checked_caption(read_text(upload.path), owners[0].shown)
            captions |= {owner: text for owner in owners if text}
        except InputError as error:
            refused.append(str(InputError(str(error).replace(str(upload.path), upload.shown))))
    return captions


def _add(folder: Path, photo: Upload, caption: str | None, mask: Upload | None, written: list[Path]) -> str:
    """Copy a photo and what belongs to it to a set whose lock is held; returns its name there.

    Args:
        written: receives the files before they are written. The photo is the last.
    """
    taken = {owner_of(path.name).casefold() for path in folder.iterdir()} | {Path(CONTACT_SHEET_NAME).stem}
    number, stem = 1, photo.stem
    while stem.casefold() in taken or stem.endswith(MASK_ENDINGS):
        number += 1
        stem = f"{photo.stem}-{number}"
    target = folder / f"{stem}{photo.suffix}"
    if caption is not None:
        written.append(target.with_suffix(CAPTION_EXTENSIONS[0]))
        write_text(written[-1], caption + "\n")
    for source, path in ((mask, folder / f"{stem}{MASK_ENDINGS[0]}{mask.suffix if mask else ''}"), (photo, target)):
        if source is not None:
            written.append(path)
            with atomic_write(path) as part:
                shutil.copyfile(source.path, part)
    return target.name
