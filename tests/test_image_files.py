"""Images as cameras and people write them, in one lister and one loader."""

import io
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.photographs import find_photographs
from delora_diffusers import image_files
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import ORIENTATION, list_images, load_rgb, upright_size

SIZE = (24, 16)


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8)).convert(mode)


def exif_block(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """An EXIF block with these raw (tag, type, count, value) entries, however senseless."""
    directory, data = struct.pack("<H", len(entries)), b""
    offset = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHL", tag, kind, count)
        if len(value) <= 4:
            directory += value.ljust(4, b"\0")
        else:
            directory += struct.pack("<L", offset + len(data))
            data += value
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + directory + struct.pack("<L", 0) + data


def save_jpeg(file, exif: bytes) -> None:
    noise().save(file, format="JPEG", exif=exif)


@pytest.mark.filterwarnings("ignore")
@given(
    st.lists(
        st.tuples(
            st.sampled_from([ORIENTATION, 0x011A, 0x011B, 0x0132, 0x8769, 0x8825, 0x0100, 0x9286])
            | st.integers(0, 65535),
            st.integers(0, 15),
            st.sampled_from([0, 1, 2, 1000, 2**32 - 1]),
            st.binary(max_size=12),
        ),
        max_size=6,
    ),
)
@settings(max_examples=150)
def test_senseless_exif_never_keeps_an_image_from_loading(tmp_path_factory, entries):
    file = tmp_path_factory.getbasetemp() / "exif.jpg"
    save_jpeg(file, exif_block(entries))
    assert load_rgb(file).size == upright_size(file, "x")


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_exif_of_random_bytes(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.jpg"
    save_jpeg(file, b"Exif\0\0" + content)
    assert load_rgb(file).size == upright_size(file, "x")


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path, value):
    save_jpeg(tmp_path / "a.jpg", exif_block([(ORIENTATION, 3, 1, struct.pack("<H", value))]))
    assert load_rgb(tmp_path / "a.jpg").size == SIZE


def test_a_damaged_number_does_not_lose_the_orientation(tmp_path):
    entries = [(ORIENTATION, 3, 1, struct.pack("<H", 6)), (0x011A, 10, 1, struct.pack("<ll", -1, 0))]
    save_jpeg(tmp_path / "a.jpg", exif_block(entries))
    assert load_rgb(tmp_path / "a.jpg").size == upright_size(tmp_path / "a.jpg", "x") == SIZE[::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif", "heic"])
def test_the_size_is_that_of_the_loaded_image(tmp_path, ending, orientation):
    image_files.readable_extensions()  # registers HEIC
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / f"a.{ending}"
    image = noise()
    image.save(file, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    loaded = load_rgb(file)
    assert loaded.size == upright_size(file, "x")
    with Image.open(file) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert loaded.size == expected.size
    if ending != "heic":  # which stores images upright
        assert loaded.size == (SIZE if orientation < 5 else SIZE[::-1])
    assert np.array_equal(np.asarray(loaded), np.asarray(expected))


@pytest.mark.parametrize("value", [0, 2570, 32768, 65535])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_white_of_16_bits_is_65535_whatever_the_image_holds(tmp_path, value, ending):
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"a.{ending}")
    assert np.asarray(load_rgb(tmp_path / f"a.{ending}")).tolist()[0][0] == [round(value / 257)] * 3


def test_images_without_a_defined_white_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "int.tif")
    for name, kind in (("float.tif", "floating-point"), ("int.tif", "32-bit")):
        with pytest.raises(InputError, match=f"{name} is a {kind} image"):
            load_rgb(tmp_path / name)


def test_a_mode_that_has_no_rgb_is_refused_in_a_sentence(tmp_path):
    lab = Image.merge("LAB", [noise("L")] * 3)
    lab.save(tmp_path / "lab.tif")
    try:
        assert load_rgb(tmp_path / "lab.tif").mode == "RGB"
    except InputError as error:
        assert "lab.tif is not a readable image" in str(error)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "PA", "1", "CMYK", "L"])
def test_other_modes(tmp_path, mode):
    file = tmp_path / ("a.tif" if mode in ("CMYK", "PA") else "a.png")
    image = noise("RGBA" if mode == "PA" else "RGB").convert(mode)
    if mode == "PA":
        file = tmp_path / "a.png"
        image = noise("P")
    image.save(file, **({"transparency": 3} if mode in ("P", "PA") else {}))
    assert load_rgb(file).mode == "RGB" and load_rgb(file).size == SIZE


def test_the_first_image_of_an_animation_is_read(tmp_path):
    red, blue = Image.new("RGB", SIZE, "red"), Image.new("RGB", SIZE, "blue")
    for ending in ("gif", "webp", "png", "tif"):
        red.save(tmp_path / f"a.{ending}", save_all=True, append_images=[blue])
        assert load_rgb(tmp_path / f"a.{ending}").getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=3)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "content", [EPS, b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x20ftypheic", b"GIF89a", b"P6 9 9 255 "]
)
def test_a_file_of_another_kind_is_refused_whatever_its_name(tmp_path, monkeypatch, content):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for name in ("a.png", "a.heic"):
        (tmp_path / name).write_bytes(content)
        for read in (load_rgb, lambda file: upright_size(file, str(file))):
            with pytest.raises(InputError, match=rf"{name} is not a readable image"):
                read(tmp_path / name)


@given(st.integers(0, 600), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"]))
@settings(max_examples=120, deadline=None)
def test_damaged_files_load_or_are_refused(tmp_path_factory, position, byte, image_format):
    buffer = io.BytesIO()
    noise().save(buffer, format=image_format)
    content = bytearray(buffer.getvalue())
    content[position % len(content)] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.png"
    file.write_bytes(bytes(content) if byte % 3 else bytes(content[:position]))
    for read in (load_rgb, lambda damaged: upright_size(damaged, "x")):
        try:
            read(file)
        except InputError as error:
            assert "replace or remove it" in str(error) or "scale it down" in str(error) or "convert it" in str(error)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise().save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png has too many pixels .*; scale it down"):
        load_rgb(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore")
def test_the_lister(tmp_path, caplog):
    for name in ("b.PNG", "a.jpg", "c.JFIF", "d.avif", "e.Heic"):
        noise().save(tmp_path / name, format={"c.JFIF": "JPEG", "e.Heic": "HEIF"}.get(name))
    for name in ("._a.jpg", ".DS_Store", ".hidden.png", "notes.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "raw.NEF").write_bytes(b"x")
    (tmp_path / "drawing.svg").write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()  # without images
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    names = ["a.jpg", "b.PNG", "c.JFIF", "d.avif", "e.Heic"]
    assert [path.name for path in list_images(tmp_path)] == names
    assert [photo.path.name for photo in find_photographs(tmp_path)] == names
    assert caplog.messages == [
        f"not used: drawing.svg, raw.NEF in {tmp_path}, which cannot be read; convert them to jpg, or remove them."
    ]


def test_heic_without_its_package_is_named_with_the_remedy(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(image_files, "readable_extensions", lambda: image_files.EXTENSIONS)
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"x")
    find_photographs(tmp_path)
    (message,) = caplog.messages
    assert "not used: IMG_0001.HEIC" in message and "pip install pillow-heif" in message


@pytest.mark.parametrize("kind", ["fifo", "folder", "missing", "device"])
def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path, kind):
    file = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"a\.png is (not a file|missing)"):
        load_rgb(file)


def test_two_images_must_not_share_a_caption_file(tmp_path):
    for ending in ("png", "jpg"):
        noise().save(tmp_path / f"a.{ending}")
    assert len(find_photographs(tmp_path)) == 2
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(InputError, match=r"a\.jpg and a\.png share one caption file"):
        find_photographs(tmp_path)


def test_a_strip_is_refused(tmp_path):
    Image.new("RGB", (2000, 10)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="2000 x 10 pixels, too long and narrow"):
        find_photographs(tmp_path)


def test_images_in_subfolders_are_named(tmp_path, caplog):
    (tmp_path / "10_sks dog").mkdir()
    for name in ("a.png", "10_sks dog/b.png", "10_sks dog/c.png"):
        noise().save(tmp_path / name)
    assert len(find_photographs(tmp_path)) == 1
    assert caplog.messages == [
        f"not used: 2 images in the subfolder {tmp_path / '10_sks dog'}; move what you want to use up."
    ]
