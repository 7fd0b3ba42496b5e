"""Five photographs to try the toolkit on: views of Chelsea the cat, the CC0 picture that scikit-image ships."""

import argparse
from pathlib import Path

from PIL import Image

from data.errors import InputError

VIEWS = ((60, 0, 300), (110, 0, 300), (150, 0, 300), (120, 20, 240), (80, 40, 260))
"""Left, top and side of each square view of the 451 x 300 picture."""


def write(folder: Path, size: int = 512) -> list[Path]:
    """Write the views as PNG files of ``size`` pixels into ``folder`` and return their paths.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise InputError("the demo photographs need scikit-image; run `uv sync --group demo`.") from error
    picture = Image.fromarray(data.chelsea())
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (left, top, side) in enumerate(VIEWS):
        view = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        paths.append(folder / f"{number:02}.png")
        view.save(paths[-1])
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m data.demo_photographs", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    write(parser.parse_args().out_dir)
