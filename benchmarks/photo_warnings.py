"""How well the studio's warnings tell blurred photos and near-duplicates from others.

    python -m benchmarks.photo_warnings
    python -m benchmarks.photo_warnings photos/dog photos/mug [--resolution 512]

Each folder has photos of one subject. Without folders the photos are of twelve rendered toys, at 128 pixels.
"""

import argparse
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from data.toybox.write import SQUARE, render_with_maps, subject_scenes
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.image_files import list_images, load_rgb
from studio.photo_quality import BLURRED, NEAR_DUPLICATE, fingerprint, sharpness


def as_jpeg(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=30)
    return Image.open(content).convert("RGB")


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 30": as_jpeg,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "brightness 1.3": lambda image: image.point(lambda value: value * 1.3),
    "brightness 0.6": lambda image: image.point(lambda value: value * 0.6),
    "2% off each side": lambda image: cut(image, 0.02, 0.02, 0.98, 0.98),
    "5% off each side": lambda image: cut(image, 0.05, 0.05, 0.95, 0.95),
    "3% off one side": lambda image: cut(image, 0, 0, 0.97, 1),
    "turned by 2 degrees": lambda image: image.rotate(2, Image.Resampling.BICUBIC),
}
BLURS = (0.5, 1.0, 2.0, 3.0)
"""Standard deviations in pixels of the view."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the thresholds of the studio's warnings about photos.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of photos of one subject each; default: toys")
    parser.add_argument("--resolution", type=int, help="in pixels; default: 512, of toys 128")
    args = parser.parse_args()
    if args.folders:
        subjects = [[load_rgb(path) for path in list_images(folder)] for folder in args.folders]
    else:
        scenes = [scene for number in range(12) for scene in subject_scenes(number, 5)]
        images = [image for image, _ in render_with_maps(scenes, SQUARE, "cpu")]
        subjects = [images[start : start + 5] for start in range(0, len(images), 5)]
    resolution = args.resolution or (512 if args.folders else 128)
    photos = [photo for photos in subjects for photo in photos]
    print_differences(subjects, photos)
    print_sharpness(photos, resolution)


def print_differences(subjects: list[list[Image.Image]], photos: list[Image.Image]) -> None:
    print("| differing bits | smallest | median | largest | flagged |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, edit in EDITS.items():
        print_row(name, [differing(fingerprint(photo), fingerprint(edit(photo))) for photo in photos], NEAR_DUPLICATE)
    pairs = [pair for subject in subjects for pair in itertools.combinations(map(fingerprint, subject), 2)]
    values = sorted(differing(first, second) for first, second in pairs)
    print_row("two photos of a subject", values, NEAR_DUPLICATE)
    print(f"\nThe next smallest of two photos of a subject is {values[1]:.3f}.\n")


def differing(first: np.ndarray, second: np.ndarray) -> float:
    return float((first != second).mean())


def print_sharpness(photos: list[Image.Image], resolution: int) -> None:
    print(f"| sharpness at {resolution} pixels | smallest | median | largest | flagged |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for radius in (0.0, *BLURS):
        values = [sharpness(blurred(photo, radius, resolution), (resolution, resolution)) for photo in photos]
        print_row(f"blurred by {radius} pixels" if radius else "as they are", values, BLURRED)


def print_row(name: str, values: Sequence[float], threshold: float) -> None:
    flagged = np.mean([value < threshold for value in values])
    print(f"| {name} | {min(values):.3f} | {np.median(values):.3f} | {max(values):.3f} | {flagged:.1%} |")


def blurred(photo: Image.Image, radius: float, resolution: int) -> Image.Image:
    """A photo blurred so that it is by ``radius`` pixels in its view."""
    return photo.filter(ImageFilter.GaussianBlur(radius * min(photo.size) / resolution)) if radius else photo


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
