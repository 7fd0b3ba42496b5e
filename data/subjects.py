"""The subjects of one training: one from flags, or several, trained at once, from a file with a line for each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.photographs import Photograph, find_photographs

REQUIRED = ("instance_data_dir", "instance_prompt", "output_dir")
OPTIONAL = ("seed", "class_prompt")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is one subject's own.

    Attributes:
        photographs: at least one. instance_prompt: of those without a caption.
        class_prompt: for prior preservation. seed: of its start and of all its draws.
        output_dir: where its adapter goes.
    """

    photographs: list[Photograph]
    instance_data_dir: Path
    instance_prompt: str
    output_dir: Path
    seed: int = 0
    class_prompt: str | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompt of each photograph."""
        return [photograph.caption or self.instance_prompt for photograph in self.photographs]

    def own_flags(self) -> dict[str, Any]:
        """The flags of a training of this subject alone that differ from those of all."""
        names = (*REQUIRED, *OPTIONAL)
        return {name: getattr(self, name) for name in names} | {"subjects_file": None}


def read_subjects(file: Path, seed: int, class_prompt: str | None) -> list[Subject]:
    """Subjects from lines like ``{"instance_data_dir": "dog", "instance_prompt": "a sks dog", "output_dir": "out"}``.

    Args:
        file: relative folders in it are relative to the working directory. A line may also have seed and class_prompt.
        seed, class_prompt: of lines without one.

    Raises:
        InputError: no such file, a line that is no such record, two subjects with one output folder.
    """
    if not file.is_file():
        raise InputError(f"--subjects_file {file} is not a file; write a line for each subject.")
    found: list[Subject] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = {"seed": seed, "class_prompt": class_prompt} | json.loads(line)
            folder, prompt, output_dir = (record[name] for name in REQUIRED)
            right = set(record) <= {*REQUIRED, *OPTIONAL} and isinstance(prompt, str) and bool(prompt)
            right = right and isinstance(record["seed"], int) and record["seed"] >= 0
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise InputError(
                f'{file} line {number} is not a record like {{"instance_data_dir": "dog", "instance_prompt": "a sks '
                'dog", "output_dir": "runs/dog"}, with seed and class_prompt or without; mend it.'
            )
        photographs = find_photographs(folder)
        out = Path(output_dir)
        found.append(
            Subject(photographs, Path(folder), prompt, out, int(record["seed"]), record["class_prompt"] or None)
        )
    if not found:
        raise InputError(f"--subjects_file {file} holds no subject; write a line for each.")
    places = [subject.output_dir.resolve() for subject in found]
    twice = next((s.output_dir for s, place in zip(found, places) if places.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"{file} names the output_dir {twice} for two subjects; give each its own.")
    return found
