"""Sets of photos: what training will make of them, what hurts, and what is written beside them."""

import argparse
import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, ImageFilter

from data.photographs import Masks, Photo, find_photographs
from data.toybox.write import render_with_maps, subject_scenes
from delora_diffusers.errors import InputError
from delora_diffusers.training.photos import in_buckets, photo_views
from studio.photo_quality import BLURRED, are_near_duplicates, fingerprint, sharpness
from studio.photos import (
    import_photos,
    inspect_set,
    preview,
    remove_photo,
    restore_photo,
    save_caption,
    save_mask,
)
from studio.workspace import Workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "studio")


@pytest.fixture(scope="session")
def toys() -> list[Image.Image]:
    """Photos of a toy in different places."""
    return [image for image, _ in render_with_maps(subject_scenes(0, 10), ((128, 128),), "cpu")]


def write(workspace: Workspace, images: list[Image.Image], name: str = "dog") -> Path:
    folder = workspace.photo_set(name)
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
    return folder


def inspect(workspace: Workspace, name: str = "dog", resolution: int = 64, square: bool = False):
    return inspect_set(workspace, name, resolution, square, 16)


def pattern(width: int, height: int) -> Image.Image:
    """An image in which every pixel tells where it is."""
    y, x = np.mgrid[:height, :width]
    checks = (x // 3 + y // 3) % 2 * 90
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, checks], -1).astype(np.uint8))


SHAPES = st.integers(20, 400)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, SHAPES, st.sampled_from([32, 64, 128]), st.booleans(), st.sampled_from([None, 6, 8]))
def test_views_and_crops_are_those_of_the_trainer(tmp_path_factory, width, height, resolution, square, turn):
    """Compared with what the training script itself does with the same file."""
    if max(width, height) > 16 * min(width, height):
        return
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    workspace.photo_set("dog").mkdir()
    path = workspace.photo_set("dog") / "00.png"
    image, exif = pattern(width, height), Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    image.save(path, exif=exif)
    photo = Photo(path)
    args = argparse.Namespace(
        bucket_step=16, resolutions=[resolution], square=square, random_flip=False, center_crop=True
    )
    ((view, _),) = in_buckets([photo.size()], args, 8).items()
    (trained,) = photo_views(photo, view, None, args)

    (info,) = inspect(workspace, resolution=resolution, square=square).photos
    assert (info.width, info.height) == photo.size() and info.view == view and info.problem is None
    cropped = photo.load().crop(info.crop).resize(view, Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(cropped, np.float32) - trained.image)[..., :2]
    pixel = 255 / min(info.crop[2] - info.crop[0], info.crop[3] - info.crop[1])
    assert difference.mean() < pixel  # by at most half a pixel at each edge
    left, top, right, bottom = info.crop
    assert 0 <= left < right <= info.width and 0 <= top < bottom <= info.height


def test_captions_and_masks_are_those_that_training_reads(workspace, toys):
    folder = write(workspace, toys[:5])
    (folder / "00.txt").write_text("a photo of sks toy\n")
    (folder / "01.caption").write_text("another")
    Image.new("L", (128, 128), 255).save(folder / "00.mask.png")
    translucent = toys[2].convert("RGBA")
    translucent.putalpha(Image.new("L", (128, 128), 100))
    translucent.save(folder / "02.png")
    infos = inspect(workspace).photos
    read = find_photographs(folder, Masks(use=True))
    assert [(i.file, i.caption, i.mask) for i in infos] == [
        (p.path.name, p.caption, p.mask and p.mask.name) for p in read
    ]
    assert [i.mask for i in infos] == ["00.mask.png", None, "02.png", None, None]


def test_toys_have_nothing_to_warn_of(workspace, toys):
    write(workspace, toys)
    info = inspect(workspace, resolution=128)
    assert info.warnings == [] and [photo.warnings for photo in info.photos] == [[]] * 10


def test_too_few_photos(workspace, toys):
    write(workspace, toys[:2])
    assert "dog has 2 photos" in inspect(workspace).warnings[0]
    remove_photo(workspace, "dog", "00.png")
    remove_photo(workspace, "dog", "01.png")
    assert "dog has no photos" in inspect(workspace).warnings[0]


def test_photos_that_are_enlarged_are_named_with_the_factor(workspace):
    write(workspace, [pattern(256, 128), pattern(512, 512)])
    small, large = inspect(workspace, resolution=256).photos
    assert any(text.startswith("00.png is 256 x 128 pixels, and is enlarged 1.4x") for text in small.warnings)
    assert not any("enlarged" in text for text in large.warnings)


def test_long_and_narrow_photos(workspace):
    write(workspace, [pattern(400, 80), pattern(340, 20), pattern(300, 200), pattern(300, 140)])
    wide, refused, usual, half = inspect(workspace).photos
    assert any("of which training shows" in text for text in wide.warnings)
    assert refused.problem and "too long and narrow" in refused.problem
    assert not any("shows" in text for text in (*usual.warnings, *half.warnings))
    half = inspect(workspace, square=True).photos[3]
    assert any("training shows 47% at a time; crop it, or do not train square" in text for text in half.warnings)


@pytest.mark.parametrize(("resolution", "step"), [(0, 16), (64, 0), (-64, 16), (100, 16), (64, 12), (10**9, 64)])
def test_sizes_that_training_refuses(workspace, toys, resolution, step):
    write(workspace, toys[:1])
    with pytest.raises(InputError, match="is not a multiple of 8"):
        inspect_set(workspace, "dog", resolution, False, step)


def test_near_duplicates_are_named_once(workspace, toys):
    copy = toys[0].crop((2, 2, 126, 126)).resize((100, 100))
    write(workspace, [toys[0], toys[1], copy])
    assert ["nearly the same photo as 00.png" in " ".join(p.warnings) for p in inspect(workspace).photos] == [0, 0, 1]


@pytest.mark.parametrize("edit", ["darker", "smaller", "cut", "turned", "jpeg"])
def test_edited_copies_are_near_duplicates_and_other_photos_are_not(toys, edit, tmp_path):
    def edited(image: Image.Image) -> Image.Image:
        if edit == "darker":
            return image.point(lambda value: value * 0.6)
        if edit == "smaller":
            return image.resize((64, 64), Image.Resampling.LANCZOS)
        if edit == "cut":
            return image.crop((2, 2, 126, 126))
        if edit == "turned":
            return image.rotate(2, Image.Resampling.BICUBIC)
        image.save(tmp_path / "copy.jpg", quality=30)
        return Image.open(tmp_path / "copy.jpg")

    for image in toys:
        assert are_near_duplicates(fingerprint(image), fingerprint(edited(image)))
        assert not any(are_near_duplicates(fingerprint(image), fingerprint(other)) for other in toys if other != image)


def test_blur_is_told_from_a_blurred_background_and_from_low_contrast(toys):
    for image in toys:
        blurred = image.filter(ImageFilter.GaussianBlur(3))
        assert sharpness(image, (128, 128)) > 2 * BLURRED > 2 * sharpness(blurred, (128, 128))
        faint = image.point(lambda value: 100 + value * 0.2)
        assert sharpness(faint, (128, 128)) > BLURRED
        in_front = blurred.copy()
        in_front.paste(image.crop((32, 32, 96, 96)), (32, 32))
        assert sharpness(in_front, (128, 128)) > BLURRED


def test_blur_that_scaling_removes_does_not_count(toys):
    large = toys[0].resize((1024, 1024), Image.Resampling.BICUBIC)
    assert sharpness(large, (1024, 1024)) < BLURRED < sharpness(large, (128, 128))


def test_blurred_photos_are_named(workspace, toys):
    write(workspace, [toys[0], toys[1].filter(ImageFilter.GaussianBlur(4))])
    sharp, blurred = inspect(workspace, resolution=128).photos
    assert sharp.warnings == [] and blurred.warnings[0].startswith("01.png looks blurred")


def test_unreadable_photos_are_named_with_the_reason(workspace, toys):
    folder = write(workspace, toys[:4])
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:2000])
    (folder / "02.png").write_text("<html><script>alert(1)</script>")
    (folder / "03.psd").write_bytes(b"8BPS")
    info = inspect(workspace)
    assert [photo.problem is None for photo in info.photos] == [True, False, False, True]
    assert all(str(folder) not in (photo.problem or "") for photo in info.photos)
    assert "02.png is not a readable image" in (info.photos[2].problem or "")
    assert f"Training will not start: {info.photos[1].problem} 02.png cannot be used either." in info.warnings
    assert any("03.psd cannot be read" in text for text in info.warnings)
    with pytest.raises(InputError, match="not a readable image"):
        preview(workspace, "dog", "02.png")


def test_a_photo_that_changes_after_it_was_measured_is_measured_again(workspace, toys):
    folder = write(workspace, toys[:3])
    assert inspect(workspace).photos[0].problem is None
    size = (folder / "00.png").stat().st_size
    (folder / "00.png").write_bytes(b"<svg onload=alert(1)>".ljust(size))
    assert "not a readable image" in (inspect(workspace).photos[0].problem or "")
    (folder / "00.png").unlink()
    (folder / "00.png").mkdir()
    assert [photo.file for photo in inspect(workspace).photos] == ["01.png", "02.png"]
    toys[1].save(folder / "01.png", "BMP")  # of the same size whatever it shows
    assert inspect(workspace, resolution=128).photos[0].warnings == []
    toys[1].filter(ImageFilter.GaussianBlur(4)).save(folder / "01.png", "BMP")
    assert "looks blurred" in inspect(workspace, resolution=128).photos[0].warnings[0]


def test_strange_names_of_files_that_were_copied_by_hand(workspace, toys):
    folder = write(workspace, toys[:1])
    names = ("<img src=x>.png", "a\x1b[31m\n.png", "b\u202egnp.png", os.fsdecode(b"\xff.png"))
    for name in names:
        toys[0].resize((32, 32)).save(folder / name)
    info = inspect(workspace)
    assert {photo.file for photo in info.photos} == {"00.png", *names[:3]}
    texts = [text for photo in info.photos for text in photo.warnings] + info.warnings
    assert len(texts) >= 5 and all(text.isprintable() for text in texts)
    assert r"the name of \udcff.png is not UTF-8; rename the file." in info.warnings
    for name in names[:3]:
        save_caption(workspace, "dog", name, "a toy")
        remove_photo(workspace, "dog", name)
    assert {path.name for path in folder.iterdir()} == {"00.png", names[3]}


def test_masks_of_another_size_or_shape(workspace, toys):
    folder = write(workspace, toys[:4])
    for number, size in enumerate([(64, 64), (64, 32), (128, 128)]):
        Image.new("L", size, 255).save(folder / f"{number:02}.mask.png")
    Image.new("L", (128, 128)).save(folder / "03.mask.png")
    texts = [" ".join(photo.warnings) for photo in inspect(workspace).photos]
    assert "the mask 00.mask.png is 64 x 64 pixels, and is scaled" in texts[0]
    assert "the mask 01.mask.png is 64 x 32 pixels, but its photo is 128 x 128" in texts[1]
    assert texts[2] == "" and "black everywhere" in texts[3]


def test_captions_are_written_where_training_reads_them(workspace, toys):
    folder = write(workspace, toys[:3])
    (folder / "01.caption").write_text("before")
    lines = [{"file_name": "02.png", "prompt": "before", "place": "beach"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = "  <script>alert('x')</script> & \"quotes\" 'n' ünïcode\nsecond line "
    for number in range(3):
        save_caption(workspace, "dog", f"{number:02}.png", script)
    assert [photo.caption for photo in find_photographs(folder)] == [script.strip()] * 3
    assert [photo.caption for photo in inspect(workspace).photos] == [script.strip()] * 3
    assert json.loads((folder / "metadata.jsonl").read_text())["place"] == "beach"
    assert sorted(path.name for path in folder.glob("*.[tc]*")) == ["00.txt", "01.caption"]
    for number in range(3):
        save_caption(workspace, "dog", f"{number:02}.png", " ")
    assert [photo.caption for photo in find_photographs(folder)] == [None] * 3


@pytest.mark.parametrize("text", ["nul \0", "half \ud800", "x" * 5001])
def test_captions_that_are_no_text_are_refused(workspace, toys, text):
    folder = write(workspace, toys[:1])
    with pytest.raises(InputError, match=r"the caption of 00\.png"):
        save_caption(workspace, "dog", "00.png", text)
    assert [path.name for path in folder.iterdir()] == ["00.png"]


def test_a_mask_is_saved_as_training_reads_it(workspace, toys, tmp_path):
    folder = write(workspace, toys[:3])
    Image.new("L", (128, 128), 255).save(folder / "00_mask.png")
    drawing = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(drawing).rectangle((16, 16, 47, 47), fill=(255, 0, 0, 255))
    drawing.save(tmp_path / "drawing.png")
    save_mask(workspace, "dog", "00.png", tmp_path / "drawing.png")
    assert sorted(path.name for path in folder.iterdir()) == ["00.mask.png", "00.png", "01.png", "02.png"]
    mask = find_photographs(folder, Masks(use=True))[0].load_mask()
    assert mask is not None and mask.getbbox() == (32, 32, 96, 96)

    before = (folder / "00.mask.png").read_bytes()
    for name, image in (("black", Image.new("L", (128, 128))), ("wide", Image.new("L", (128, 64), 255))):
        image.save(tmp_path / f"{name}.png")
        with pytest.raises(InputError, match=rf"{name}\.png"):
            save_mask(workspace, "dog", "00.png", tmp_path / f"{name}.png")
    assert (folder / "00.mask.png").read_bytes() == before


def mask_of(folder: Path) -> Path:
    mask = folder.parent.parent / "white.png"
    Image.new("L", (128, 128), 255).save(mask)
    return mask


def test_removing_a_photo_leaves_a_set_that_training_takes(workspace, toys):
    folder = write(workspace, toys[:3])
    save_caption(workspace, "dog", "00.png", "a toy")
    Image.new("L", (128, 128), 255).save(folder / "00.mask.png")
    lines = [{"file_name": f"{number:02}.png", "text": "a toy"} for number in (0, 1)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    remove_photo(workspace, "dog", "00.png")
    assert sorted(path.name for path in folder.iterdir()) == ["01.png", "02.png", "metadata.jsonl"]
    assert [photo.caption for photo in find_photographs(folder)] == ["a toy", None]


def test_a_removed_photo_comes_back_with_its_caption_and_mask(workspace, toys):
    folder = write(workspace, toys[:3])
    save_mask(workspace, "dog", "00.png", mask_of(folder))
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a toy"}\n')
    save_caption(workspace, "dog", "01.png", "beside it")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for file in ("00.png", "01.png"):
        remove_photo(workspace, "dog", file)
    toys[3].save(folder / "01.png")
    with pytest.raises(InputError, match="another 01.png now"):
        restore_photo(workspace, "dog")
    (folder / "01.png").unlink()
    assert [restore_photo(workspace, "dog"), restore_photo(workspace, "dog")] == ["01.png", "00.png"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="nothing was removed"):
        restore_photo(workspace, "dog")


def test_the_preview_darkens_what_is_not_trained_on_and_outlines_the_mask(workspace):
    folder = write(workspace, [Image.new("RGB", (400, 200), (200, 200, 200))])
    whole = np.asarray(preview(workspace, "dog", "00.png", side=100))
    assert whole.shape == (50, 100, 3) and (whole == 200).all()
    (info,) = inspect(workspace, square=True).photos
    image = np.asarray(preview(workspace, "dog", "00.png", side=100, crop=info.crop))
    assert (image[:, 25:75] == 200).all() and (image[:, :24] < 100).all() and (image[:, 76:] < 100).all()
    clipped = np.asarray(preview(workspace, "dog", "00.png", side=100, crop=(200, 0, 10**9, 10**9)))
    assert (clipped[:, 50:] == 200).all() and (clipped[:, :49] < 100).all()
    for empty in ((10, 10, 10, 20), (300, 0, 100, 200), (10**9, 0, 2 * 10**9, 200)):
        with pytest.raises(InputError, match="is empty"):
            preview(workspace, "dog", "00.png", crop=empty)
    mask = Image.new("L", (400, 200))
    ImageDraw.Draw(mask).rectangle((160, 60, 239, 139), fill=255)
    mask.save(folder / "00.mask.png")
    image = np.asarray(preview(workspace, "dog", "00.png", side=100))
    assert tuple(image[25, 39]) == (255, 64, 160) and tuple(image[25, 50]) == tuple(image[2, 2]) == (200, 200, 200)


@pytest.mark.parametrize("file", ["../dog/00.png", "/etc/passwd", "..", "", "x.png", "00.PNG/", "C:\\00.png", "00.txt"])
def test_only_photos_of_the_set_are_touched(workspace, toys, tmp_path, file):
    folder = write(workspace, toys[:2])
    (folder / "00.txt").write_text("a toy")
    toys[0].save(tmp_path / "mask.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for act in (
        lambda: save_caption(workspace, "dog", file, "text"),
        lambda: save_mask(workspace, "dog", file, tmp_path / "mask.png"),
        lambda: remove_photo(workspace, "dog", file),
        lambda: preview(workspace, "dog", file),
    ):
        with pytest.raises(InputError, match="has no photo"):
            act()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="there is no set"):
        inspect(workspace, "cat")


def test_links_out_of_the_workspace_are_neither_read_nor_written(workspace, toys, tmp_path):
    folder = write(workspace, toys[:5])
    secret = tmp_path / "secret"
    secret.mkdir()
    toys[5].save(secret / "photo.png")
    (secret / "text.txt").write_text("the secret")
    before = {path.name: path.read_bytes() for path in secret.iterdir()}
    for name, target in (("00.png", "photo.png"), ("01.txt", "text.txt"), ("02.mask.png", "photo.png")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret / target)
    (folder / "05.png").symlink_to(folder / "04.png")
    photos = inspect(workspace).photos
    linked = [photo.problem is not None and "outside the workspace" in photo.problem for photo in photos]
    assert linked == [True, True, True, False, False, False]
    assert all("secret" not in str(photo) for photo in photos)
    with pytest.raises(InputError, match="outside the workspace"):
        preview(workspace, "dog", "00.png")
    assert (np.asarray(preview(workspace, "dog", "02.png")) == np.asarray(toys[2].convert("RGB"))).all()
    save_caption(workspace, "dog", "01.png", "mine")
    toys[0].save(tmp_path / "mask.png")
    save_mask(workspace, "dog", "02.png", tmp_path / "mask.png")
    remove_photo(workspace, "dog", "00.png")
    assert {path.name: path.read_bytes() for path in secret.iterdir()} == before
    assert [photo.problem for photo in inspect(workspace).photos] == [None] * 5

    (folder / "metadata.jsonl").symlink_to(secret / "text.txt")
    with pytest.raises(InputError, match=r"metadata\.jsonl is outside"):
        inspect(workspace)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says to be of this size, and ends early."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


def test_too_many_pixels_are_refused_from_the_header(workspace, tmp_path, monkeypatch):
    """Of 200 and of 81 megapixels; decoding fails the test."""

    def forbidden(*_: object) -> None:
        raise AssertionError("decoded")

    folder = write(workspace, [pattern(64, 64)])
    for file in (folder / "01.png", folder / "00.mask.png"):
        file.write_bytes(png_header(9000, 9000))
    for file in (folder / "02.png", tmp_path / "large.png"):
        file.write_bytes(png_header(16000, 12500))
    monkeypatch.setattr(ImageFile.ImageFile, "load", forbidden)
    with pytest.raises(InputError, match=r"large\.png has too many pixels"):
        import_photos(workspace, "cat", [tmp_path / "large.png"])
    assert workspace.photo_sets() == ["dog"]
    with pytest.raises(InputError, match="more than the 80 million"):
        preview(workspace, "dog", "01.png")
    monkeypatch.undo()
    usable, large, larger = inspect(workspace).photos
    assert "00.mask.png has 9000 x 9000 pixels" in " ".join(usable.warnings)
    assert large.problem == "01.png has 9000 x 9000 pixels, more than the 80 million that are read; scale it down."
    assert "too many pixels" in (larger.problem or "")
    with pytest.raises(InputError, match=r"large\.png has too many pixels"):
        save_mask(workspace, "dog", "00.png", tmp_path / "large.png")


def test_imports_of_the_same_names_at_once_keep_every_photo(workspace, toys, tmp_path):
    sources = []
    for number, image in enumerate(toys[:8]):
        (tmp_path / str(number)).mkdir()
        image.save(tmp_path / str(number) / "photo.png")
        (tmp_path / str(number) / "photo.txt").write_text(f"caption {number}")
        sources.append([tmp_path / str(number) / "photo.png", tmp_path / str(number) / "photo.txt"])
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda files: import_photos(workspace, "dog", files), sources))
    names = [imported.files[0] for imported in results]
    assert sorted(names) == sorted(["photo.png", *(f"photo-{number}.png" for number in range(2, 9))])
    photos = {photo.path.name: photo for photo in find_photographs(workspace.photo_set("dog"))}
    for number, name in enumerate(names):
        assert photos[name].load() == toys[number] and photos[name].caption == f"caption {number}"
    assert len(list(workspace.photo_set("dog").iterdir())) == 16
