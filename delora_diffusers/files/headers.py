"""The header of a safetensors file, read without trusting it and without its tensors. Imports no torch."""

from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError, reason
from delora_diffusers.text_files import parse_json

MAX_HEADER_BYTES = 8 * 2**20
"""For comparison, the header of an adapter for SDXL's attention has 0.6 MB, that of all of SDXL 0.3 MB."""


def safetensors_header(file: Path, purpose: str = "an adapter") -> Any:
    """The JSON at the beginning of a safetensors file; its length and names are checked before it is parsed.

    Args:
        purpose: what the file should be, for the message.

    Raises:
        InputError: the file is not safetensors, is truncated, has a name twice, or a header that is far too long.
    """
    message = f"{file} is not a safetensors file (%s); save or download it again."
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        available = file.stat().st_size - 8
        if available < 2:
            raise InputError(f"{file} is truncated (it has {max(available + 8, 0)} bytes); save or download it again.")
        if size > MAX_HEADER_BYTES and size <= available:
            raise InputError(
                f"{file} has a header of {size / 2**20:.0f} MiB, far more than {purpose}'s; give {purpose} file."
            )
        if size > available:
            raise InputError(message % f"it announces a header of {size} bytes but has {available}")
        header = stream.read(size)

    try:
        return parse_json(header.decode())
    except ValueError as error:
        raise InputError(message % f"its header is not valid: {reason(error, 200)}") from error
