"""What training will make of the photos of a set, and what hurts. No torch."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.photographs import MAX_ASPECT_RATIO
from delora_diffusers.crops import LONGEST_BUCKET, Size, buckets, crop_boxes, nearest_bucket, scaled_size
from delora_diffusers.errors import InputError, printable
from delora_diffusers.image_files import (
    HEIF_EXTENSIONS,
    UNREAD_EXTENSIONS,
    has_alpha,
    list_images,
    load_mask,
    load_rgb,
    mask_beside,
    read_caption,
    readable_extensions,
    upright_size,
)
from delora_diffusers.names import METADATA_NAME
from delora_diffusers.text_files import is_text
from studio.photo_files import belongs, check_pixels, existing_set, records_of, text_of
from studio.photo_quality import BLURRED, are_near_duplicates, fingerprint, sharpness
from studio.workspace import Workspace

FEW_PHOTOS = 3
LEAST_SHOWN = 0.5
"""A view that shows less of its photo's area is worth a warning."""
LARGEST_SIDE = 8192
"""Larger resolutions are refused, since the list of buckets grows with them."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@dataclasses.dataclass(frozen=True)
class PhotoInfo:
    """A photo as training will read it.

    Attributes:
        file: its name in the folder of the set.
        width, height: upright; 0 if it cannot be read.
        view: width and height at which it is trained.
        crop: the part of the upright photo that the view shows. Without ``--center_crop`` training uses 16 random
            positions of it along the side that is too long; this one is in the centre.
        caption: None without one, so that ``--instance_prompt`` is used.
        mask: the name of the file that has its mask, which is the photo itself if it has an alpha channel. Used with
            ``--use_masks``.
        warnings: sentences about what hurts.
        problem: why it cannot be trained on, or None. Training refuses the whole set then.
    """

    file: str
    width: int = 0
    height: int = 0
    view: Size = (0, 0)
    crop: Box = (0, 0, 0, 0)
    caption: str | None = None
    mask: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class SetInfo:
    """The photos of a set, sorted by name, and sentences about the set as a whole."""

    name: str
    photos: list[PhotoInfo]
    warnings: list[str]


def inspect_set(workspace: Workspace, name: str, resolution: int, square: bool, bucket_step: int) -> SetInfo:
    """What training will make of a set of photos, and what hurts.

    Args:
        resolution, square, bucket_step: the flags of the training script. The least common multiple of its
            ``bucket_step`` and the base model's ``patch_pixels`` is what counts, if that is another.

    Raises:
        InputError: there is no such set, its ``metadata.jsonl`` cannot be read, or training refuses the flags.
    """
    for flag, side in (("resolution", resolution), ("bucket_step", bucket_step)):
        if side % 8 or not 8 <= side <= LARGEST_SIDE:
            raise InputError(f"--{flag} {side} is not a multiple of 8 from 8 to {LARGEST_SIDE:,}; choose another.")
    folder = existing_set(workspace, name)
    views = [(resolution, resolution)] if square else buckets(resolution, bucket_step)
    captions = {record["file_name"]: text_of(record) for record in records_of(workspace, folder)}
    outside = _links_outside(workspace, folder)
    photos = []
    fingerprints: list[tuple[str, np.ndarray]] = []
    for path in list_images(folder):
        if not is_text(path.name):  # it could not even be sent to a browser
            continue
        try:
            for link in outside:
                if link == path.name or belongs(link, path):
                    raise InputError(f"{link} is a link to a file outside the workspace; replace it with a copy.")
            photo, own = _inspect(path, captions.get(path.name), views)
            twin = next((other for other, earlier in fingerprints if are_near_duplicates(earlier, own)), None)
            if twin is not None:
                photo.warnings.append(
                    f"{path.name} is nearly the same photo as {twin}; keep one of them, or the adapter learns their "
                    "scene along with the subject."
                )
            fingerprints.append((path.name, own))
            photos.append(dataclasses.replace(photo, warnings=[printable(text) for text in photo.warnings]))
        except InputError as error:
            problem = str(error).replace(f"{folder}/", "")
            photos.append(PhotoInfo(path.name, caption=captions.get(path.name), problem=problem))
    return SetInfo(name, photos, [printable(text) for text in _set_warnings(folder, name, photos, captions)])


def _links_outside(workspace: Workspace, folder: Path) -> list[str]:
    links = []
    for entry in folder.iterdir():
        if entry.is_symlink():
            try:
                workspace.within(entry)
            except InputError:
                links.append(entry.name)
    return links


def _inspect(path: Path, caption: str | None, views: Sequence[Size]) -> tuple[PhotoInfo, np.ndarray]:
    """What training will make of one photo, and what hurts about it; and the photo's fingerprint.

    Raises:
        InputError: it cannot be trained on.
    """
    check_pixels(path, path.name)
    size = width, height = upright_size(path, path.name)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise InputError(f"{path.name} is {width} x {height} pixels, too long and narrow to train on; remove it.")
    view = nearest_bucket(size, views)
    crop = _crop(size, view)
    warnings = []
    scaled = scaled_size(size, view)
    enlarged = max(view[0] / width, view[1] / height)
    if enlarged > 1:
        warnings.append(
            f"{path.name} is {width} x {height} pixels, and is enlarged {enlarged:.1f}x to train at {view[0]} x "
            f"{view[1]}; use a larger photo, or a lower resolution."
        )
    shown = view[0] * view[1] / (scaled[0] * scaled[1])
    if max(size) > LONGEST_BUCKET * min(size) or shown < LEAST_SHOWN:
        remedy = "crop it around the subject" if len(views) > 1 else "crop it, or do not train square"
        warnings.append(
            f"{path.name} is {width} x {height} pixels, of which training shows {shown:.0%} at a time; {remedy}."
        )
    measured = _measured(path, view)
    if measured.sharpness < BLURRED:
        warnings.append(f"{path.name} looks blurred; use a sharper photo, or the adapter learns the blur.")
    mask = None
    try:
        mask_file = mask_beside(path) or (path if measured.has_alpha else None)
        if mask_file is not None:
            mask = mask_file.name
            warnings += _mask_warnings(path, mask_file, size)
    except InputError as error:
        warnings.append(str(error).replace(f"{path.parent}/", ""))
    caption = read_caption(path) if caption is None else caption
    return PhotoInfo(path.name, width, height, view, crop, caption, mask, warnings), measured.fingerprint


def _mask_warnings(photo: Path, mask: Path, size: Size) -> list[str]:
    check_pixels(mask, mask.name)
    width, height = upright_size(mask, mask.name)
    load_mask(mask, size, alpha=mask == photo)  # raises what training would
    if (width, height) == size:
        return []
    return [
        f"the mask {mask.name} is {width} x {height} pixels, and is scaled to the {size[0]} x {size[1]} of "
        f"{photo.name}; give one of that size for an exact edge."
    ]


def _crop(size: Size, view: Size) -> Box:
    """The centre crop for a view in the pixels of the photo before scaling."""
    scaled = scaled_size(size, view)
    left, top, right, bottom = crop_boxes(size, view, None)[0]
    across, down = size[0] / scaled[0], size[1] / scaled[1]
    return round(left * across), round(top * down), round(right * across), round(bottom * down)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What takes decoding a photo to know."""

    fingerprint: np.ndarray
    sharpness: float
    has_alpha: bool


def _measured(path: Path, view: Size) -> Measured:
    """Decode a photo and measure it; the result is kept until the file changes."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path.name} could not be read ({error.strerror}); load the set again.") from error
    return _measure(path, view, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@functools.lru_cache(maxsize=4096)
def _measure(path: Path, view: Size, version: tuple[int, ...]) -> Measured:
    image = load_rgb(path)
    return Measured(fingerprint(image), sharpness(image, view), has_alpha(path))


def _set_warnings(folder: Path, name: str, photos: Sequence[PhotoInfo], captions: dict[str, str | None]) -> list[str]:
    warnings = []
    usable = [photo for photo in photos if photo.problem is None]
    if len(usable) < FEW_PHOTOS:
        count = "no photos" if not usable else "1 photo" if len(usable) == 1 else f"{len(usable)} photos"
        warnings.append(
            f"{name} has {count} to train on, which is too few; three to six work best, from different sides and in "
            "different places."
        )
    if len(usable) < len(photos):
        first, *others = [photo for photo in photos if photo.problem is not None]
        also = f" {', '.join(photo.file for photo in others)} cannot be used either." if others else ""
        warnings.append(f"Training will not start: {first.problem}{also}")
    warnings += [
        f"the name of {path.name} is not UTF-8; rename the file."
        for path in list_images(folder)
        if not is_text(path.name)
    ]
    read = readable_extensions()
    unread = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (*UNREAD_EXTENSIONS, *HEIF_EXTENSIONS) and path.suffix.lower() not in read
    ]
    if unread:
        warnings.append(f"{', '.join(unread[:5])} cannot be read and are not used; convert them to jpg or png.")
    if missing := sorted(captions.keys() - {photo.file for photo in photos}):
        warnings.append(f"{METADATA_NAME} lists {missing[0]}, which {name} does not have; fix one of them.")
    stems: dict[str, str] = {}
    for photo in photos:
        if photo.caption is not None and captions.get(photo.file) is None:
            other = stems.setdefault(Path(photo.file).stem, photo.file)
            if other != photo.file:
                warnings.append(f"{other} and {photo.file} share one caption file; rename one of them.")
    return warnings
