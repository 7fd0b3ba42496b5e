"""What browsers upload: names, archives and files that are not what they say."""

import errno
import io
import os
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.photographs import Masks, find_photographs
from delora_diffusers.errors import InputError
from delora_diffusers.names import stays_inside
from studio import uploads
from studio.photos import import_photos, inspect_set, preview
from studio.uploads import safe_name
from studio.workspace import Workspace
from tests.helpers import write_photos


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "studio")


def png(colour: str = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def write_zip(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def everything_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("IMG_0001.JPG", "IMG_0001.jpg"),
        ("Käthes Hund (2).png", "Käthes Hund (2).png"),
        ("Ka\u0308the.png", "Käthe.png"),
        ("犬.webp", "犬.webp"),
        ("<img src=x onerror=alert(1)>.png", "_img src_x onerror_alert(1)_.png"),
        ("<script>alert('x')</script>.png", "script_.png"),
        ("../../etc/passwd.png", "passwd.png"),
        ("/etc/cron.d/job.png", "job.png"),
        ("C:\\Windows\\system.png", "system.png"),
        ("..\\..\\dog.png", "dog.png"),
        ("dog\x00\x1b[31m\n\u202egnp.png", "dog___31m__gnp.png"),
        (".htaccess.png", "htaccess.png"),
        ("-rf.png", "rf.png"),
        ("...", "photo"),
        ("nul.png", "_nul.png"),
        (".png", "photo.png"),
    ],
)
def test_names_become_harmless(name, safe):
    assert safe_name(name) == safe


@given(st.text(max_size=300))
def test_no_name_leaves_its_folder_or_is_markup(name):
    safe = safe_name(name)
    assert stays_inside(safe) and Path(safe).name == safe and safe[0] not in ".-" and len(safe.encode()) < 100
    assert safe.isprintable() and not set(safe) & set("<>&\"'`:*?|/\\\0")


def test_photos_of_a_folder_come_with_captions_and_masks(workspace, tmp_path):
    """A folder that training reads is read as the same photos after it was uploaded, even into a set with its names."""
    source = write_photos(tmp_path / "source")
    for number in range(5):
        (source / f"{number:02}.txt").write_text(f"caption {number}")
    Image.new("L", (112, 112), 255).save(source / "00.mask.png")
    (source / ".DS_Store").write_bytes(b"\0")
    files = sorted(source.iterdir())
    write_zip(tmp_path / "others.zip", {f"{number:02}.png": png() for number in range(5)})
    import_photos(workspace, "cat", [tmp_path / "others.zip"])
    for name, ending in (("dog", ""), ("cat", "-2")):
        added = import_photos(workspace, name, files)
        assert added.files == [f"{number:02}{ending}.png" for number in range(5)] and added.refused == []
        found = find_photographs(workspace.photo_set(name), Masks(use=True, required=False))
        imported = {photo.path.name: photo for photo in found}
        for file, photo in zip(added.files, find_photographs(source, Masks(use=True))):
            copy = imported[file]
            assert copy.path.read_bytes() == photo.path.read_bytes() and copy.caption == photo.caption
            assert (copy.mask is None) == (photo.mask is None)


def test_an_archive_of_folders_keeps_what_belongs_together(workspace, tmp_path):
    file = write_zip(
        tmp_path / "dogs.zip",
        {
            "a/01.png": png("red"),
            "a/01.txt": b"a red dog",
            "b/01.png": png("blue"),
            "b/metadata.jsonl": b'{"file_name": "01.png", "text": "a blue dog"}\n',
            "__MACOSX/a/._01.png": b"\0",
            "b/.DS_Store": b"\0",
            "readme.txt": b"hello",
        },
    )
    imported = import_photos(workspace, "dog", [file])
    assert imported.files == ["01.png", "01-2.png"] and len(imported.refused) == 1
    assert imported.refused[0].startswith("readme.txt in dogs.zip was not used")
    photos = {photo.path.name: photo for photo in find_photographs(workspace.photo_set("dog"))}
    assert photos["01.png"].caption == "a red dog" and photos["01-2.png"].caption == "a blue dog"
    assert photos["01.png"].load().getpixel((0, 0)) == (255, 0, 0)


def test_a_caption_with_a_script_is_text(workspace, tmp_path):
    script = "<script>fetch('http://x')</script><img src=x onerror=alert(1)>"
    (tmp_path / "01.png").write_bytes(png())
    (tmp_path / "01.txt").write_text(script)
    import_photos(workspace, "dog", [tmp_path / "01.png", tmp_path / "01.txt"])
    assert inspect_set(workspace, "dog", 64, False, 16).photos[0].caption == script
    assert (workspace.photo_set("dog") / "01.txt").read_text().strip() == script


def test_photos_never_become_masks_captions_or_contact_sheets_of_others(workspace, tmp_path):
    names = ("dog.png", "dog.jpg", "DOG.png", "contact_sheet.png", "cat_mask.png")
    for name in names:
        (tmp_path / name).write_bytes(png())
    for name in names:
        import_photos(workspace, "dog", [tmp_path / name])
    (tmp_path / "cat.png").write_bytes(png())
    import_photos(workspace, "dog", [tmp_path / "cat.png"])
    folder = workspace.photo_set("dog")
    photos = find_photographs(folder)
    assert len(photos) == 6 and len({photo.path.stem.casefold() for photo in photos}) == 6
    assert all(
        photo.mask is None for photo in find_photographs(workspace.photo_set("dog"), Masks(True, required=False))
    )


def test_a_photo_that_is_uploaded_again_is_skipped(workspace, tmp_path):
    (tmp_path / "01.png").write_bytes(png())
    assert import_photos(workspace, "dog", [tmp_path / "01.png"]).files == ["01.png"]
    again = import_photos(workspace, "dog", [tmp_path / "01.png"])
    assert again.files == [] and again.refused == ["01.png was skipped, because the set already has this photo."]
    (tmp_path / "01.png").write_bytes(png("blue"))
    assert import_photos(workspace, "dog", [tmp_path / "01.png"]).files == ["01-2.png"]


def test_refused_files_are_named_and_the_others_imported(workspace, tmp_path):
    contents = {
        "good.png": png(),
        "broken.png": png()[:60],
        "page.jpg": b"<html><script>alert(1)</script></html>",
        "film.mp4": b"0",
        "drawing.svg": b"<svg onload=alert(1)>",
        "lonely.mask.png": png(),
        "old.rar": b"Rar!",
        "latin.txt": "é".encode("latin-1"),
        "long.txt": b"x" * (2**20 + 1),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "latin.png").write_bytes(png("blue"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    names = [*contents, "latin.png", "pipe.png", "link.png", "folder.png", "missing.png"]
    imported = import_photos(workspace, "dog", [tmp_path / name for name in names])
    assert imported.files == ["good.png", "latin.png"]
    expected = {*names} - {"good.png", "latin.png"}
    assert {next(name for name in expected if text.startswith(name)) for text in imported.refused} == expected
    assert len(imported.refused) == len(expected) and str(tmp_path) not in " ".join(imported.refused)
    assert everything_in(workspace.root) == {"photos/dog/good.png", "photos/dog/latin.png"}


def test_unusual_images_are_read_or_named(workspace, tmp_path):
    noise = Image.effect_noise((160, 96), 100)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    noise.convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.convert("P").save(tmp_path / "transparent.png", transparency=0)
    noise.convert("1").save(tmp_path / "bits.png")
    Image.fromarray(np.arange(96 * 160, dtype=np.uint16).reshape(96, 160)).save(tmp_path / "deep.png")
    frames = [noise.rotate(90 * number) for number in range(1, 4)]
    noise.save(tmp_path / "moving.gif", save_all=True, append_images=frames)
    noise.convert("F").save(tmp_path / "float.tif")
    (tmp_path / "\u202egnp.bmp").write_bytes(png())  # its name is shown backwards
    (tmp_path / ("a" * 240 + ".png")).write_bytes(png())
    imported = import_photos(workspace, "dog", sorted(tmp_path.glob("*.*")))
    assert [text.partition(" ")[0] for text in imported.refused] == ["float.tif"]
    photos = {photo.file: photo for photo in inspect_set(workspace, "dog", 64, False, 16).photos}
    assert len(photos) == 8 and all(photo.problem is None for photo in photos.values())
    assert (photos["turned.jpg"].width, photos["turned.jpg"].height) == (96, 160)
    for name, photo in photos.items():
        assert "\u202e" not in name and len(name.encode()) < 100
        assert max(preview(workspace, "dog", name, side=32, crop=photo.crop).size) == 32


def test_nothing_is_left_of_an_import_without_photos(workspace, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    for files in ([], [tmp_path / "broken.png"]):
        with pytest.raises(InputError, match=r"broken\.png|no photos were uploaded"):
            import_photos(workspace, "dog", files)
    assert workspace.photo_sets() == [] and everything_in(workspace.root) == set()


def test_nothing_is_left_of_an_import_that_the_disk_has_no_space_for(workspace, tmp_path, monkeypatch):
    for name in ("01.png", "02.png"):
        (tmp_path / name).write_bytes(png())
        (tmp_path / name).with_suffix(".txt").write_text("a toy")
    write_photos(workspace.photo_set("dog"))
    before = everything_in(workspace.root)
    copyfile = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        copyfile(source, target)
        if ".02." in target.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    (tmp_path / "02.png").rename(tmp_path / "2.02.png")
    files = [tmp_path / name for name in ("01.png", "01.txt", "2.02.png")]
    with pytest.raises(InputError, match="free some space"):
        import_photos(workspace, "dog", files)
    assert everything_in(workspace.root) == before


def test_paths_and_links_in_an_archive_stay_in_the_set(workspace, tmp_path):
    (tmp_path / "secret.png").write_bytes(png("blue"))
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "dogs.zip", "w") as archive:
        archive.writestr(link, str(tmp_path / "secret.png"))
        for name in ("../../../up.png", "/abs.png", "C:\\win.png", "..\\..\\back.png", "<b>.png", "a/../../dots.png"):
            archive.writestr(name, png())
    imported = import_photos(workspace, "dog", [tmp_path / "dogs.zip"])
    assert imported.files == ["up.png", "abs.png", "win.png", "back.png", "_b_.png", "dots.png"]
    assert imported.refused == ["link.png in dogs.zip is a link and not a file; zip the photo itself."]
    assert everything_in(workspace.root) == {f"photos/dog/{name}" for name in imported.files}
    assert everything_in(tmp_path) - {"dogs.zip", "secret.png"} == {f"studio/photos/dog/{n}" for n in imported.files}


def is_refused(workspace: Workspace, file: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        import_photos(workspace, "dog", [file])
    assert workspace.photo_sets() == [] and everything_in(workspace.root) == set()


def test_a_huge_entry_is_refused_before_it_is_unpacked(workspace, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.png", png())
        with archive.open("zeros.png", "w") as entry:
            for _ in range(300):
                entry.write(bytes(2**20))
    assert (tmp_path / "bomb.zip").stat().st_size < 2**19
    copy, written = uploads._copy, []

    def spy(source, shown, *rest):
        written.append(shown)
        return copy(source, shown, *rest)

    monkeypatch.setattr(uploads, "_copy", spy)
    is_refused(workspace, tmp_path / "bomb.zip", "larger than 256 MiB unpacked")
    assert "zeros.png" not in written


def test_an_entry_that_lies_about_its_size_is_cut(workspace, tmp_path, monkeypatch):
    """Its directory says 10 bytes, of a mebibyte that is read no further."""
    file = write_zip(tmp_path / "bomb.zip", {"zeros.png": bytes(2**20)})
    content = bytearray(file.read_bytes())
    directory = content.rfind(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 10)
    file.write_bytes(content)
    is_refused(workspace, file, r"bomb\.zip is not a readable zip|zeros\.png in bomb\.zip is not a readable image")


def test_many_entries_that_are_large_together(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    is_refused(
        workspace, write_zip(tmp_path / "a.zip", {f"{i}.png": bytes(2**18) for i in range(5)}), "takes more than"
    )
    files = [write_zip(tmp_path / f"{n}.zip", {f"{i}.png": bytes(2**18) for i in range(3)}) for n in "bc"]
    with pytest.raises(InputError, match="unpacked; upload fewer at once"):
        import_photos(workspace, "dog", files)


def test_overlapping_entries_count_each_time(workspace, tmp_path, monkeypatch):
    """Entries that share their data make a small archive large without nesting (Fifield, A better zip bomb, 2019)."""
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**22)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**20))
        archive.filelist += [archive.filelist[0]] * 9
        archive._didModify = True
    is_refused(workspace, tmp_path / "bomb.zip", "takes more than")


def test_too_many_entries_are_refused_before_their_directory_is_read(workspace, tmp_path, monkeypatch):
    file = write_zip(tmp_path / "many.zip", {f"{i}.png": b"" for i in range(1001)})
    counted = bytearray(file.read_bytes())
    record = counted.rfind(b"PK\x05\x06")

    def forbidden(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(zipfile.ZipFile, "__init__", forbidden)
    is_refused(workspace, file, "more than 1,000 entries")
    counted[record + 8 : record + 12] = struct.pack("<HH", 1, 1)  # lies
    counted[record + 12 : record + 16] = struct.pack("<I", 100_000_000)
    file.write_bytes(counted)
    is_refused(workspace, file, "more than 1,000 entries")
    locator = b"PK\x06\x07" + bytes(16)
    file.write_bytes(counted[:record] + locator + counted[record : record + 12] + bytes(10))
    is_refused(workspace, file, "more than 1,000 entries")


def test_files_that_are_too_large(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 2**18)
    (tmp_path / "large.png").write_bytes(png() + bytes(2**18))
    is_refused(workspace, tmp_path / "large.png", r"large\.png is larger than 0\.25 MiB")


def test_too_many_files_in_several_archives(workspace, tmp_path):
    files = [write_zip(tmp_path / f"{n}.zip", {f"{i}.png": b"" for i in range(600)}) for n in "ab"]
    with pytest.raises(InputError, match="more than 1,000 files"):
        import_photos(workspace, "dog", files)


def test_archives_in_archives_are_not_opened(workspace, tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"01.png": png()}).read_bytes()
    is_refused(workspace, write_zip(tmp_path / "outer.zip", {"inner.zip": inner}), "an archive in an archive")
    is_refused(workspace, write_zip(tmp_path / "named.zip", {"inner.png": inner}), "not a readable image")


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("text", "is not a zip archive"),
        ("cut", "is not a readable zip"),
        ("encrypted", "is encrypted"),
        ("lzma", "in an unusual way"),
        ("empty", "no photos were uploaded"),
    ],
)
def test_damaged_and_unusual_archives(workspace, tmp_path, kind, match):
    file = write_zip(tmp_path / "dogs.zip", {"01.png": png(size=(500, 500))})
    content = bytearray(file.read_bytes())
    if kind == "text":
        content = bytearray(b"<script>")
    elif kind == "cut":
        content = content[:40] + content[80:]
    elif kind == "encrypted":
        content[content.rfind(b"PK\x01\x02") + 8] |= 1
    elif kind == "lzma":
        content = bytearray(write_zip(file, {"01.png": png()}, zipfile.ZIP_LZMA).read_bytes())
    elif kind == "empty":
        content = bytearray(write_zip(file, {}).read_bytes())
    file.write_bytes(content)
    is_refused(workspace, file, match)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_damage_of_an_archive_raises_anything_else(tmp_path_factory, noise, position):
    folder = tmp_path_factory.mktemp("damaged")
    file = write_zip(folder / "dogs.zip", {"01.png": png(), "02.png": png("blue")})
    content = bytearray(file.read_bytes())
    content[position : position + len(noise)] = noise
    file.write_bytes(content)
    try:
        imported = import_photos(Workspace(folder / "studio"), "dog", [file])
    except InputError as error:
        assert "dogs.zip" in str(error)
    else:
        assert 1 <= len(imported.files) <= 2
