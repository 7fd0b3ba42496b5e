"""Grids of labelled images."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], size: int = 256, title: str = "") -> Image.Image:
    """One image with a row for each label.

    Args:
        rows: (label, images) for each row; a label is wrapped and printed above its row.
        size: side length of each cell in pixels.
        title: a line at the top.

    Returns:
        RGB image.
    """
    gap, font = 8, ImageFont.load_default(16)
    columns = max(len(images) for _, images in rows)
    width = max(columns * (size + gap) + gap, 320)
    wrapped = [textwrap.wrap(label, max(16, width // 9)) or [""] for label, _ in rows]
    heights = [len(lines) * 20 + gap // 2 + size + gap for lines in wrapped]
    top = 32 if title else gap
    grid = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    if title:
        draw.text((gap, 7), title, "black", font)
    for (_, images), lines, height in zip(rows, wrapped, heights):
        for number, line in enumerate(lines):
            draw.text((gap, top + number * 20), line, "#333", font)
        for column, image in enumerate(images):
            cell = image.convert("RGB")
            cell.thumbnail((size, size), Image.Resampling.LANCZOS)
            if max(cell.size) < size:
                scale = size // max(cell.size)
                cell = cell.resize((cell.width * scale, cell.height * scale), Image.Resampling.NEAREST)
            left = gap + column * (size + gap) + (size - cell.width) // 2
            grid.paste(cell, (left, top + height - size - gap + (size - cell.height) // 2))
        top += height
    return grid
