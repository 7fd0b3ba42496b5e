"""The subjects of a training run: one, given by flags, or several trained at once, from a file with a line each."""

import dataclasses
from pathlib import Path
from typing import Any

from data.photographs import Photo, find_photographs
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import list_images
from delora_diffusers.json_lines import SUBJECTS, read_json_lines


@dataclasses.dataclass(frozen=True)
class Subject:
    """The settings that differ between subjects trained at once.

    Attributes:
        photographs: at least one photo.
        instance_prompt: for photos without a caption.
        output_dir: where its adapter is written.
        seed: of its initialization and of all its random numbers.
        class_prompt, class_data_dir: for prior preservation; without a folder, class images go to ``output_dir``.
    """

    photographs: list[Photo]
    instance_data_dir: Path
    instance_prompt: str
    output_dir: Path
    seed: int = 0
    class_prompt: str | None = None
    class_data_dir: Path | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompt for each photo."""
        return [photo.caption or self.instance_prompt for photo in self.photographs]

    def class_images(self) -> list[Path]:
        """The images that its folder of class images contains; none without a folder."""
        folder = self.class_data_dir
        return [] if folder is None or not folder.is_dir() else list_images(folder)

    def flag_overrides(self) -> dict[str, Any]:
        """The flags to change in order to train this subject alone."""
        return {name: getattr(self, name) for name in SUBJECTS.keys} | {"subjects_file": None}


def read_subjects(file: Path, seed: int, class_prompt: str | None) -> list[Subject]:
    """Read subjects from a file with one JSON object per line.

    A line is like ``{"instance_data_dir": "dog", "instance_prompt": "a sks dog", "output_dir": "out"}``.

    Args:
        file: its folders are relative to the working directory. A line may also contain seed, class_prompt and
            class_data_dir.
        seed: for lines without a seed.
        class_prompt: for lines without a class_prompt.

    Raises:
        InputError: the file does not exist, a line is not such a record, or two subjects share an output folder.
    """
    if not file.is_file():
        raise InputError(f"--subjects_file {file} is not a file; write one line per subject.")
    subjects: list[Subject] = []
    for number, record in read_json_lines(file, SUBJECTS):
        record = {"seed": seed, "class_prompt": class_prompt} | record
        if not record["instance_prompt"].strip() or not 0 <= record["seed"] < 2**32:
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
                Path(record["class_data_dir"]) if record.get("class_data_dir") else None,
            )
        )
    if not subjects:
        raise InputError(f"--subjects_file {file} is empty; write one line per subject.")
    folders = [subject.output_dir.resolve() for subject in subjects]
    repeated = next((s.output_dir for s, folder in zip(subjects, folders) if folders.count(folder) > 1), None)
    if repeated is not None:
        raise InputError(f"{file} gives two subjects the output_dir {repeated}; give each a different one.")
    return subjects
