"""Which images OFT's evaluation script compares with a subject's photos, beyond the definition of the scores."""

from pathlib import Path

from delora_diffusers.image_files import load_rgb


def is_selected_by_name(subject: str, other: str) -> bool:
    """Whether OFT's script compares the photos of ``subject`` with the images of ``other``.

    The script keeps the images of prompt N in a folder ``NAME-N`` and selects a subject's folders by ``"SUBJECT-" in
    name``. So ``dog`` selects ``backpack_dog-0`` too.
    """
    return f"{subject}-" in f"{other}-"


def is_black(path: Path) -> bool:
    """Whether every pixel of an image is black. OFT's script skips such images, which a safety checker returns.

    Raises:
        InputError: the image cannot be read.
    """
    return load_rgb(path).getbbox() is None
