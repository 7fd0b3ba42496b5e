"""A folder of photos: which images it contains, their captions and their masks."""

import dataclasses
import logging
from pathlib import Path

from PIL import Image

from delora_diffusers.errors import InputError, printable
from delora_diffusers.image_files import (
    has_alpha,
    list_images,
    load_mask,
    load_rgb,
    mask_beside,
    read_caption,
    readable_extensions,
    upright_size,
    warn_of_unread_images,
)
from delora_diffusers.json_lines import PHOTOS, read_json_lines
from delora_diffusers.names import METADATA_NAME

logger = logging.getLogger(__name__)

MAX_ASPECT_RATIO = 16
"""Scaling the short side of a narrower image to the resolution would make it enormous."""


MOST_NAMED = 5
"""Photos that a message names."""


@dataclasses.dataclass(frozen=True)
class Masks:
    """Whether and where photos have masks, which weight the loss.

    Attributes:
        use: masks beside the photos, and alpha channels. folder: has masks with the names of the photos instead.
        required: whether at least one photo must have a mask. warn: whether to log masks that are not used.
    """

    use: bool = False
    folder: Path | None = None
    required: bool = True
    warn: bool = True

    def of(self, photo: Path) -> Path | None:
        """The file that has a photo's mask, which is the photo itself if it has an alpha channel; None if there is
        none."""
        if not self.use:
            return None
        if self.folder is not None:
            return mask_beside(self.folder / photo.name, alone=True)
        return mask_beside(photo) or (photo if has_alpha(photo) else None)


NO_MASKS = Masks(warn=False)
"""For scores, which use none."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image of a folder, with its caption and the file of its mask if it has them."""

    path: Path
    caption: str | None = None
    mask: Path | None = None

    def load(self) -> Image.Image:
        """The image, turned upright, as RGB."""
        return load_rgb(self.path)

    def load_mask(self) -> Image.Image | None:
        """Its mask, of the same size, from 0 for the background to 255; None if it has none.

        Raises:
            InputError: the mask cannot be read, has another shape than the photo, or is 0 everywhere.
        """
        return None if self.mask is None else load_mask(self.mask, self.size(), alpha=self.mask == self.path)

    def size(self) -> tuple[int, int]:
        """(width, height) upright, without decoding."""
        return upright_size(self.path, str(self.path))


def find_photographs(folder: str | Path, masks: Masks = Masks()) -> list[Photo]:
    """The images of a folder, sorted by name. Each is decoded once to check that it is readable, and so is its mask.

    Captions come from ``metadata.jsonl`` (``file_name`` and ``text``, the imagefolder convention) or from a ``.txt``
    file of the same name beside the image.

    Raises:
        InputError: the folder does not exist or has no images, an image cannot be read, or ``metadata.jsonl`` is
            invalid; or masks are asked for, and there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that contains the photos.")
    paths = list_images(folder)
    warn_of_unread_images(folder)
    if not paths:
        raise InputError(f"{folder} contains no image ({', '.join(readable_extensions())}); put the photos there.")
    captions = _read_metadata(folder / METADATA_NAME)
    unknown = sorted(captions.keys() - {path.name for path in paths})
    if unknown:
        raise InputError(f"{folder / METADATA_NAME} lists {unknown[0]}, which is not in the folder; fix one of them.")
    check_mask_folder(masks.folder, folder)
    photos = []
    for path in paths:
        width, height = load_rgb(path).size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise InputError(f"{path} is {width} x {height} pixels, too long and narrow for a square crop; remove it.")
        caption = captions.get(path.name)
        photos.append(Photo(path, read_caption(path) if caption is None else caption, masks.of(path)))
        photos[-1].load_mask()
    with_file: dict[str, Path] = {}
    for photo in photos:
        if photo.caption is not None and captions.get(photo.path.name) is None:
            other = with_file.setdefault(photo.path.stem, photo.path)
            if other != photo.path:
                raise InputError(f"{other} and {photo.path.name} share one caption file; rename one of them.")
    _check_masks(folder, photos, masks)
    return photos


def check_mask_folder(mask_folder: Path | None, folder: Path) -> None:
    """Reject a folder of masks that is none.

    Raises:
        InputError
    """
    if mask_folder is None:
        return
    if not mask_folder.is_dir():
        raise InputError(f"--mask_data_dir {mask_folder} is not a folder; give the folder that contains the masks.")
    if mask_folder.resolve() == folder.resolve():
        raise InputError(
            f"--mask_data_dir {mask_folder} is the folder of the photos; leave it out, and give --use_masks for masks "
            "beside them."
        )


def _check_masks(folder: Path, photos: list[Photo], masks: Masks) -> None:
    """Refuse masks that are asked for and missing; log photos without a mask, and masks that are not used."""
    if not masks.use:
        unused = sum(mask_beside(photo.path) is not None for photo in photos)
        if unused and masks.warn:
            masks_of = "1 mask" if unused == 1 else f"{unused} masks"
            logger.warning(printable(f"not used: {masks_of} in {folder}; give --use_masks to weight the loss."))
        return
    bare = [photo.path.name for photo in photos if photo.mask is None]
    if len(bare) == len(photos) and masks.required:
        where = f"{folder} has no mask" if masks.folder is None else f"--mask_data_dir {masks.folder} has no mask"
        example = f"{photos[0].path.stem}{'.mask' if masks.folder is None else ''}.png"
        raise InputError(f"{where} for the photos in {folder}; add for example {example}.")
    if bare:
        others = f" and {len(bare) - MOST_NAMED} others" if len(bare) > MOST_NAMED else ""
        names = ", ".join(bare[:MOST_NAMED]) + others
        logger.warning(printable(f"no mask for {names} in {folder}: the loss on all of them counts."))


def _read_metadata(file: Path) -> dict[str, str | None]:
    if not file.is_file():
        return {}
    captions = {}
    for number, record in read_json_lines(file, PHOTOS):
        if record["file_name"] in captions:
            raise InputError(f"{file} line {number} lists {record['file_name']} again; give one caption for each.")
        if "text" not in record and "prompt" not in record:
            raise InputError(f"{file} line {number} is not a record like {PHOTOS.example} (it has no text); fix it.")
        captions[record["file_name"]] = record.get("text", record.get("prompt"))
    return captions
