"""Colour palettes for the classes of semantic maps."""

import functools
import re
from pathlib import Path

import numpy as np

from delora_diffusers.errors import InputError
from delora_diffusers.maps import IGNORED
from delora_diffusers.text_files import parse_json, read_text

CHANNELS = (1 << 16, 1 << 8, 1)

_ADE20K = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
"""The common colours of ADE20K's 150 scene-parsing classes; classes 6 and 48 share a colour."""


def from_hex(words: str) -> np.ndarray:
    return np.array([[int(word[i : i + 2], 16) for i in (0, 2, 4)] for word in words.split()], np.uint8)


def generated_palette(classes: int) -> np.ndarray:
    """(classes, 3) uint8: each colour is as far as possible from those before it and from black ("no class").

    A longer palette starts with the colours of a shorter one.
    """
    levels = np.linspace(0, 255, 9)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    weight = np.sqrt([2.0, 4.0, 3.0])  # the eye distinguishes greens best
    chosen: list[np.ndarray] = []
    nearest = np.linalg.norm(candidates * weight, axis=1)
    for _ in range(classes):
        chosen.append(candidates[int(nearest.argmax())])
        nearest = np.minimum(nearest, np.linalg.norm((candidates - chosen[-1]) * weight, axis=1))
    return np.round(chosen).astype(np.uint8).reshape(classes, 3)


def read_palette(text: str) -> np.ndarray:
    """The palette (classes, 3), uint8, for a value of ``--palette``.

    Args:
        text: ``ade20k``, ``generated`` (255 colours) or a file with one colour per class: a JSON list of
            ``[r, g, b]``, or lines that start with ``r g b`` or ``#rrggbb``.

    Raises:
        InputError: the file does not exist, or is not a palette.
    """
    if text == "ade20k":
        return from_hex(_ADE20K)
    if text == "generated":
        return generated_palette(IGNORED)
    file = Path(text)
    if not file.is_file():
        raise InputError(f"--palette {text} is not a file; give a palette file, ade20k or generated.")
    content = read_text(file)
    try:
        rows = parse_json(content) if content.lstrip().startswith("[") else _rows(content)
        numbers = [number for row in rows if isinstance(row, list) for number in row]
        if not all(type(number) is int for number in numbers):
            raise ValueError("it contains something other than whole numbers")
        colours = np.array(rows, dtype=int)
        if colours.ndim != 2 or colours.shape[1] != 3 or not 0 < len(colours) <= 256:
            raise ValueError(f"{colours.shape} numbers")
        if colours.min() < 0 or colours.max() > 255:
            raise ValueError(f"a channel of {colours.min() if colours.min() < 0 else colours.max()}")
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"--palette {file} is not a palette ({error}); write one `r g b` line per class.") from error
    return colours.astype(np.uint8)


def _rows(content: str) -> list[list[int]]:
    rows = []
    for line in filter(None, (line.strip() for line in content.split("\n"))):
        if match := re.match(r"#?([0-9a-fA-F]{6})\b", line):
            rows.append(from_hex(match[1])[0].tolist())
        elif match := re.match(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)(?![\s,;]*\d)", line):
            rows.append([int(number) for number in match.groups()])
        else:
            raise ValueError(f"the line {line[:40]!r}")
    return rows


@functools.lru_cache(maxsize=2)
def _classes_by_colour(palette: bytes) -> np.ndarray:
    """The class of each of the 2^24 colours; -1 for colours that are not in the palette."""
    lookup = np.full(1 << 24, -1, np.int16)
    lookup[0] = IGNORED
    keys = np.frombuffer(palette, np.uint8).reshape(-1, 3).astype(np.int64) @ CHANNELS
    lookup[keys[::-1]] = np.arange(len(keys))[::-1]  # if two classes share a colour, the first wins
    return lookup


def indices_of(colours: np.ndarray, palette: np.ndarray, what: str) -> np.ndarray:
    """Class indices (height, width), uint8, of a colour map (height, width, 3).

    Black becomes 255 ("no class") unless the palette contains it.

    Args:
        what: the map's name, for the message.

    Raises:
        InputError: a colour is not in the palette.
    """
    indices = _classes_by_colour(palette.tobytes())[colours.astype(np.int64) @ CHANNELS]
    if (indices < 0).any():
        colour = colours[indices < 0][0].tolist()
        share = float((indices < 0).mean())
        raise InputError(
            f"{what} has the colour {tuple(colour)}, which is not in the palette ({share:.1%} of its pixels are not); "
            "give the palette of this map, and save maps without lossy compression."
        )
    return indices.astype(np.uint8)
