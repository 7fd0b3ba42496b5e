"""JSON Lines files, one JSON object per line: reading, writing and the schema of each file. Imports no torch."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.names import stays_inside
from delora_diffusers.text_files import is_text, parse_json, read_lines

TYPES: dict[str, tuple[type, ...]] = {
    "file_name": (str,),
    "text": (str, type(None)),
    "prompt": (str,),
    "prompts": (list,),
    "map": (str,),
    "adapter": (str, type(None)),
    "seed": (int,),
    "strength": (int, float),
    "output_dir": (str,),
    "instance_data_dir": (str,),
    "instance_prompt": (str,),
    "class_prompt": (str, type(None)),
    "class_data_dir": (str, type(None)),
    "source": (str,),
}
"""The types that each key's value may have."""
INSIDE = ("file_name", "map")
"""Keys whose values are paths in the folder of the file."""
NOT_EMPTY = ("output_dir", "instance_data_dir", "adapter", "prompts")
"""Keys whose texts must contain something, where they are given."""


@dataclasses.dataclass(frozen=True)
class LineFormat:
    """The schema of a JSON Lines file.

    Attributes:
        required: keys that every line must have. optional: keys that are used if present.
        example: one line, for error messages.
        closed: whether any other key is an error; image metadata may contain other keys.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: str
    closed: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    def problem(self, record: Any) -> str | None:
        """What is wrong with a parsed line; None if it is valid."""
        if not isinstance(record, dict):
            return "it is not a JSON object"
        missing = [key for key in self.required if key not in record]
        if missing:
            return f"it has no {missing[0]}"
        unknown = [key for key in record if key not in self.keys]
        if self.closed and unknown:
            return f"it has an unknown key {unknown[0]!r}"
        for key in self.keys:
            if key in record and not self._is_valid(key, record[key]):
                return f"its {key} is {json.dumps(record[key])[:60]}"
        return None

    def _is_valid(self, key: str, value: Any) -> bool:
        if not isinstance(value, TYPES[key]) or isinstance(value, bool):
            return False
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if key in NOT_EMPTY and not all(text.strip() for text in texts):
            return False
        return all(map(is_text, texts)) and (key not in INSIDE or all(map(stays_inside, texts)))


PHOTOS = LineFormat(("file_name",), ("text", "prompt"), '{"file_name": "01.jpg", "text": "a photo of sks dog"}')
"""``metadata.jsonl`` in a folder of photos: their captions. In a folder of generated images they are the prompts."""
IMAGES_WITH_MAPS = LineFormat(("file_name",), ("map", "text"), '{"file_name": "1.jpg", "map": "1.png", "text": "..."}')
"""``metadata.jsonl`` in a folder of images with their maps."""
GENERATED = LineFormat(("file_name", "prompt"), (), '{"file_name": "000.png", "prompt": "a sks dog"}')
"""``metadata.jsonl`` of generated images; it also records how each was generated."""
GENERATED_FROM_MAPS = LineFormat(("file_name", "prompt", "map"), (), '{"file_name": "1.png", "map": "maps/1.png", ...}')
"""``metadata.jsonl`` of images that were generated from maps."""
OFT_PROMPTS = LineFormat(("source", "prompt"), (), '{"source": "source/1.png", "prompt": "a street"}')
"""``prompt_*_blip.json`` in OFT's preprocessed ADE20K."""
SUBJECTS = LineFormat(
    ("instance_data_dir", "instance_prompt", "output_dir"),
    ("seed", "class_prompt", "class_data_dir"),
    '{"instance_data_dir": "dog", "instance_prompt": "a sks dog", "output_dir": "runs/dog"}',
    closed=True,
)
"""``--subjects_file`` of the DreamBooth script: subjects that are trained together."""
REQUESTS = LineFormat(
    ("prompts", "output_dir"),
    ("adapter", "seed", "strength"),
    '{"adapter": "runs/dog", "prompts": ["a sks dog"], "output_dir": "images/dog"}',
    closed=True,
)
"""``--requests_file`` of generate: images to generate with several adapters."""


def read_json_lines(file: Path, line_format: LineFormat) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every non-blank line.

    Raises:
        InputError: a line does not match the format; the message gives its number and what is wrong with it.
    """
    records = []
    for number, line in read_lines(file):
        try:
            record = parse_json(line)
            problem = line_format.problem(record)
        except ValueError as error:
            problem = f"it is not JSON: {str(error)[:100]}"
        if problem is not None:
            raise InputError(f"{file} line {number} is not a record like {line_format.example} ({problem}); fix it.")
        records.append((number, record))
    return records


def write_json_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one object per line, completely or not at all."""
    write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
