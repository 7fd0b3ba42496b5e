"""Grids of labelled pictures."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], size: int = 256, title: str = "") -> Image.Image:
    """One picture with a row for each label.

    Args:
        rows: (label, pictures) for each row; labels are wrapped above their row.
        size: side of each cell, pixels.
        title: a line above everything.

    Returns:
        RGB picture.
    """
    gap, font = 8, ImageFont.load_default(16)
    columns = max(len(pictures) for _, pictures in rows)
    width = max(columns * (size + gap) + gap, 320)
    wrapped = [textwrap.wrap(label, max(16, width // 9)) or [""] for label, _ in rows]
    heights = [len(lines) * 20 + gap // 2 + size + gap for lines in wrapped]
    top = 32 if title else gap
    grid = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    if title:
        draw.text((gap, 7), title, "black", font)
    for (_, pictures), lines, height in zip(rows, wrapped, heights):
        for number, line in enumerate(lines):
            draw.text((gap, top + number * 20), line, "#333", font)
        for column, picture in enumerate(pictures):
            cell = picture.convert("RGB")
            cell.thumbnail((size, size), Image.Resampling.LANCZOS)
            if max(cell.size) < size:
                scale = size // max(cell.size)
                cell = cell.resize((cell.width * scale, cell.height * scale), Image.Resampling.NEAREST)
            left = gap + column * (size + gap) + (size - cell.width) // 2
            grid.paste(cell, (left, top + height - size - gap + (size - cell.height) // 2))
        top += height
    return grid
