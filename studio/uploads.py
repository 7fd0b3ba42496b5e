"""Uploaded files, among them zip archives, as files with harmless names in a temporary folder. No torch.

Nothing about an upload is trusted: names may be paths or HTML, archives may be bombs, and files may change. So each
file is copied first, what follows looks at the copy, and no name in an archive is ever used as a path.
"""

import dataclasses
import errno
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from delora_diffusers.errors import InputError, reason
from studio.workspace import RESERVED

MAX_FILES = 1000
"""Files of one upload, those in archives included."""
MAX_FILE_BYTES = 256 * 2**20
MAX_BYTES = 2 * 2**30
"""All files of one upload, unpacked."""
ARCHIVES = (".zip",)
OTHER_ARCHIVES = (".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst")
IGNORED = re.compile(r"(?:.*[/\\])?(?:\.[^/\\]*|__MACOSX[/\\].*|Thumbs\.db|desktop\.ini)", re.IGNORECASE | re.DOTALL)
"""What systems add to folders and archives without being asked."""
LONGEST_STEM = 80
"""Bytes; leaves room for a number, the ending of a mask and the name of a temporary file."""
CHUNK = 2**20

FULL = "the disk of the workspace is full; free some space."
"""What is said of any upload that does not fit."""
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)
"""What ``zipfile`` raises for damaged or hostile archives."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """A copy of an uploaded file.

    Attributes:
        name: harmless; see ``safe_name``. shown: as it was uploaded, for messages.
        folder: tells apart folders of an archive that contain files of the same name.
        path: of the copy.
    """

    name: str
    shown: str
    folder: str
    path: Path

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix


class Limits:
    """How much of an upload may still come."""

    def __init__(self) -> None:
        self.files, self.bytes = MAX_FILES, MAX_BYTES

    def count_file(self) -> None:
        self.files -= 1
        if self.files < 0:
            raise InputError(f"more than {MAX_FILES:,} files were uploaded at once; upload fewer.")

    def count_bytes(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise InputError(f"the files take more than {MAX_BYTES / 2**30:g} GiB unpacked; upload fewer at once.")


def copied(files: Sequence[Path], folder: Path) -> tuple[list[Upload], list[str]]:
    """Copy files to an empty folder and unpack archives there.

    Returns:
        The copies, and a sentence for each file that was refused.
    """
    uploads: list[Upload] = []
    refused: list[str] = []
    limits = Limits()
    for file in files:
        suffix = file.suffix.lower()
        try:
            if IGNORED.fullmatch(file.name):
                continue
            _check_regular(file)
            if suffix in ARCHIVES:
                uploads += _unpacked(file, folder, limits, refused)
            elif suffix in OTHER_ARCHIVES:
                raise InputError(f"{file.name} is an archive that is not read; upload a zip, or the photos themselves.")
            else:
                with file.open("rb") as source:
                    uploads.append(_copy(source, file.name, "", folder, limits))
        except InputError as error:
            refused.append(str(error))
        except OSError as error:
            if is_full(error):
                raise InputError(FULL) from error
            refused.append(str(InputError(f"{file.name} could not be copied ({error.strerror}); try again.")))
    return uploads, refused


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for lack of space."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def safe_name(name: str) -> str:
    """A file name of letters, digits, spaces and ``. _ - + ( )``, from the last part of a path of any system; other
    characters become underscores, and the extension is in lower case."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    last = re.sub(r"[^\w .+()-]", "_", last)
    stem, dot, suffix = last.rpartition(".")
    stem, suffix = (stem, suffix) if dot else (last, "")
    stem = stem.encode()[:LONGEST_STEM].decode(errors="ignore").strip(" .-") or "photo"
    suffix = re.sub(r"\W", "", suffix, flags=re.ASCII)[:10].lower()
    return ("_" if RESERVED.fullmatch(stem) else "") + (f"{stem}.{suffix}" if suffix else stem)


def _check_regular(file: Path) -> None:
    mode = file.lstat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device"
        raise InputError(f"{file.name} is {kind} and not a file; upload the photos themselves.")


def _copy(source: IO[bytes], shown: str, parent: str, folder: Path, limits: Limits) -> Upload:
    """Copy what a file really contains, whatever its size is said to be."""
    limits.count_file()
    target = folder / f"{MAX_FILES - limits.files}"  # not a name that anybody chose
    left = MAX_FILE_BYTES
    with target.open("xb") as copy:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise InputError(f"{shown} is larger than {MAX_FILE_BYTES / 2**20:g} MiB; scale the photo down.")
            limits.count_bytes(len(chunk))
            copy.write(chunk)
    return Upload(safe_name(shown), shown, parent, target)


def _unpacked(file: Path, folder: Path, limits: Limits, refused: list[str]) -> list[Upload]:
    """Unpack an archive completely, or not at all.

    Raises:
        InputError: it is damaged, encrypted or too large.
    """
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            return list(_entries(archive, file.name, folder, limits, refused))
    except InputError:
        raise
    except (*ZIP_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a disk, and not of an impossible offset
            raise
        raise InputError(f"{file.name} is not a readable zip ({reason(error)}); zip the photos again.") from error


def _check_directory(file: Path) -> None:
    """Refuse an archive with too many entries before ``zipfile`` makes an object of each.

    Their number is in the last record of the archive, which a comment of up to 64 KiB may follow (APPNOTE.TXT 4.3.16).
    The 64-bit records, which may give another number, are for archives that are too large anyway.
    """
    with file.open("rb") as source:
        source.seek(max(0, file.stat().st_size - 2**16 - 22 - 20))
        tail = source.read()
    start = tail.rfind(b"PK\x05\x06")
    record = tail[start : start + 22]
    if start < 0 or len(record) < 22:
        raise InputError(f"{file.name} is not a zip archive; upload a zip, or the photos themselves.")
    entries, size = struct.unpack("<HI", record[10:16])
    if entries > MAX_FILES or size > 1000 * MAX_FILES or tail[max(0, start - 20) : start].startswith(b"PK\x06\x07"):
        raise InputError(f"{file.name} has more than {MAX_FILES:,} entries; zip the photos only.")


def _entries(
    archive: zipfile.ZipFile, shown: str, folder: Path, limits: Limits, refused: list[str]
) -> Iterator[Upload]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir() and not IGNORED.fullmatch(entry.filename)]
    if sum(entry.file_size for entry in entries) > MAX_BYTES:
        raise InputError(f"{shown} takes more than {MAX_BYTES / 2**30:g} GiB unpacked; zip fewer photos.")
    for entry in entries:
        name = f"{entry.filename} in {shown}"
        if entry.file_size > MAX_FILE_BYTES:
            raise InputError(f"{name} is larger than {MAX_FILE_BYTES / 2**20:g} MiB unpacked; zip photos only.")
        if entry.flag_bits & 1:
            raise InputError(f"{shown} is encrypted; zip the photos without a password.")
        if stat.S_ISLNK(entry.external_attr >> 16):
            refused.append(str(InputError(f"{name} is a link and not a file; zip the photo itself.")))
        elif safe_name(entry.filename).endswith((*ARCHIVES, *OTHER_ARCHIVES)):
            refused.append(str(InputError(f"{name} is an archive in an archive; unpack it first.")))
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{shown} is compressed in an unusual way; zip the photos with the usual settings.")
        else:
            parent = re.sub(r"[^/\\]*$", "", entry.filename)
            with archive.open(entry) as source:
                upload = _copy(source, entry.filename, f"{shown}/{parent}", folder, limits)
            yield dataclasses.replace(upload, shown=name)
