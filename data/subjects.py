"""The subjects of one training: one from flags, or several, trained at once, from a file with a line for each."""

import dataclasses
from pathlib import Path
from typing import Any

from data.photographs import Photo, find_photographs
from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import SUBJECTS, read_json_lines


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is one subject's own.

    Attributes:
        photographs: at least one. instance_prompt: of those without a caption.
        class_prompt: for prior preservation. seed: of its start and of all its draws.
        output_dir: where its adapter goes.
    """

    photographs: list[Photo]
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
        return {name: getattr(self, name) for name in SUBJECTS.keys} | {"subjects_file": None}


def read_subjects(file: Path, seed: int, class_prompt: str | None) -> list[Subject]:
    """Subjects from lines like ``{"instance_data_dir": "dog", "instance_prompt": "a sks dog", "output_dir": "out"}``.

    Args:
        file: relative folders in it are relative to the working directory. A line may also have seed and class_prompt.
        seed, class_prompt: of lines without one.

    Raises:
        InputError: no such file, a line that is no such record, two subjects with one output folder.
    """
    if not file.is_file():
        raise InputError(f"--subjects_file {file} is not a file; write one line for each subject.")
    subjects: list[Subject] = []
    for number, record in read_json_lines(file, SUBJECTS):
        record = {"seed": seed, "class_prompt": class_prompt} | record
        if not record["instance_prompt"] or record["seed"] < 0:
            raise InputError(f"{file} line {number} needs an instance_prompt, and a seed of at least 0; fix it.")
        folder, output_dir = Path(record["instance_data_dir"]), Path(record["output_dir"])
        subjects.append(
            Subject(
                find_photographs(folder),
                folder,
                record["instance_prompt"],
                output_dir,
                record["seed"],
                record["class_prompt"] or None,
            )
        )
    if not subjects:
        raise InputError(f"--subjects_file {file} is empty; write one line for each subject.")
    folders = [subject.output_dir.resolve() for subject in subjects]
    repeated = next((s.output_dir for s, folder in zip(subjects, folders) if folders.count(folder) > 1), None)
    if repeated is not None:
        raise InputError(f"{file} gives the output_dir {repeated} to two subjects; give each its own.")
    return subjects
