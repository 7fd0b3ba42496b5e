"""Photos of every file format, their captions."""

import json

import numpy as np
import pytest
from PIL import Image

from data.photographs import find_photographs
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 10, x * 0 + 40], -1).astype(np.uint8))


def test_images_are_turned_upright(tmp_path):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise for display
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "turned.png")), np.asarray(upright))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    if mode == "I;16":
        Image.fromarray((np.mgrid[:24, :40][1] * 1600).astype(np.uint16)).save(path)
    else:
        gradient().convert(mode).save(path)
    image = load_rgb(path)
    assert image.mode == "RGB" and image.size == (40, 24)
    assert np.asarray(image).std() > 10


def test_transparency_becomes_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(load_rgb(tmp_path / "clear.png")).min() == 255


def test_captions(tmp_path):
    for name in ("a.png", "b.png", "c.PNG"):
        gradient().save(tmp_path / name, format="PNG")
    (tmp_path / "b.txt").write_text("beside\n")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "listed"}) + "\n\n")
    assert [(p.path.name, p.caption) for p in find_photographs(tmp_path)] == [
        ("a.png", "listed"),
        ("b.png", "beside"),
        ("c.PNG", None),
    ]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "z.png", "text": "?"}\n')
    with pytest.raises(InputError, match=r"lists z.png, which is not in the folder"):
        find_photographs(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("no json\n")
    with pytest.raises(InputError, match="metadata.jsonl line 1"):
        find_photographs(tmp_path)
