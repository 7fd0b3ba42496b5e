"""Grids of labelled images."""

import dataclasses
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 256
"""Side length of a cell in pixels."""
GAP = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything in a grid is.

    Attributes:
        size: (width, height) of the grid. lines: of each row's label. tops: of each row's label, in pixels.
        images: top of each row's images, in pixels.
    """

    size: tuple[int, int]
    lines: list[list[str]]
    tops: list[int]
    images: list[int]


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], size: int = CELL, title: str = "") -> Image.Image:
    """One image with a row for each label.

    Args:
        rows: (label, images) for each row; a label is wrapped and printed above its row.
        size: side length of each cell in pixels.
        title: a line at the top.

    Returns:
        RGB image.
    """
    font = ImageFont.load_default(16)
    layout = _layout([label for label, _ in rows], max(len(images) for _, images in rows), size, title)
    grid = Image.new("RGB", layout.size, "white")
    draw = ImageDraw.Draw(grid)
    if title:
        draw.text((GAP, 7), title, "black", font)
    for (_, images), lines, label_top, top in zip(rows, layout.lines, layout.tops, layout.images):
        for number, line in enumerate(lines):
            draw.text((GAP, label_top + number * 20), line, "#333", font)
        for column, image in enumerate(images):
            cell = image.convert("RGB")
            cell.thumbnail((size, size), Image.Resampling.LANCZOS)
            if max(cell.size) < size:
                scale = size // max(cell.size)
                cell = cell.resize((cell.width * scale, cell.height * scale), Image.Resampling.NEAREST)
            grid.paste(cell, _corner(cell.size, column, top, size))
    return grid


def images_of_grid(
    grid: Image.Image, labels: Sequence[str], columns: int, image_size: tuple[int, int], title: str = ""
) -> list[list[Image.Image]] | None:
    """The images of each row of a grid with cells of the default size; those larger than a cell are scaled to it.

    Args:
        labels: of all rows. columns: images in each. image_size: their (width, height) before they were scaled.

    Returns:
        None if the grid is not one of these labels and images.
    """
    layout = _layout(labels, columns, CELL, title)
    if grid.size != layout.size:
        return None
    thumbnail = Image.new("1", image_size)
    thumbnail.thumbnail((CELL, CELL))
    scale = max(1, CELL // max(thumbnail.size))
    shown = (thumbnail.width * scale, thumbnail.height * scale)
    rows = []
    for top in layout.images:
        corners = [_corner(shown, column, top, CELL) for column in range(columns)]
        cells = [grid.crop((left, upper, left + shown[0], upper + shown[1])) for left, upper in corners]
        rows.append([cell.resize(thumbnail.size, Image.Resampling.NEAREST) for cell in cells])
    return rows


def _layout(labels: Sequence[str], columns: int, size: int, title: str) -> Layout:
    width = max(columns * (size + GAP) + GAP, 320)
    lines = [textwrap.wrap(label, max(16, width // 9)) or [""] for label in labels]
    tops, images, top = [], [], 32 if title else GAP
    for wrapped in lines:
        tops.append(top)
        images.append(top + len(wrapped) * 20 + GAP // 2)
        top = images[-1] + size + GAP
    return Layout((width, top), lines, tops, images)


def _corner(image: tuple[int, int], column: int, top: int, size: int) -> tuple[int, int]:
    """The upper left corner of an image in the middle of its cell."""
    return GAP + column * (size + GAP) + (size - image[0]) // 2, top + (size - image[1]) // 2
