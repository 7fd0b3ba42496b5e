"""The subjects of a training run: one, given by flags, or several trained at once, from a file with a line each."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.captions import with_instance
from data.concepts import Concept
from data.photographs import find_photographs
from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import SUBJECTS, read_json_lines
from delora_diffusers.names import INSTANCE


@dataclasses.dataclass(frozen=True)
class Subject:
    """What differs between subjects trained at once; each gets an adapter.

    Attributes:
        concepts: at least one. Several subjects have one each.
        output_dir: where its adapter is written.
        seed: of its initialization and of all its random numbers.
    """

    concepts: Sequence[Concept]
    output_dir: Path
    seed: int = 0

    @property
    def prompts(self) -> list[str]:
        """The prompt for each photo, of all concepts."""
        return [prompt for concept in self.concepts for prompt in concept.prompts]

    @property
    def instance_prompt(self) -> str:
        """What its photos are called, as given, or the first caption."""
        concept = self.concepts[0]
        if concept.instance_prompt is None:
            return self.prompts[0]
        return with_instance(concept.instance_prompt, concept.instance_name, "--instance_prompt")

    @property
    def class_prompts(self) -> list[str]:
        """The class prompts of its concepts."""
        return [concept.class_prompt or "" for concept in self.concepts]

    def class_folder(self, concept: int) -> Path:
        """The folder of a concept's class images; concepts with the same class prompt share the default folder."""
        given, prompts = self.concepts[concept].class_data_dir, self.class_prompts
        if given is not None:
            return given
        folder, first = self.output_dir / "class_images", prompts.index(prompts[concept])
        return folder / f"{first:02}" if len(set(prompts)) > 1 else folder

    def flag_overrides(self) -> dict[str, Any]:
        """The flags to change in order to train this subject, of several, alone."""
        (concept,) = self.concepts
        flags = vars(concept) | vars(self)
        return {name: flags[name] for name in SUBJECTS.keys} | {"subjects_file": None}


def check_class_prompts(subjects: Sequence[Subject]) -> None:
    """Reject one folder of class images for several classes.

    Raises:
        InputError
    """
    prompts: dict[Path, str] = {}
    for subject in subjects:
        for number, prompt in enumerate(subject.class_prompts):
            folder = subject.class_folder(number)
            if prompts.setdefault(folder.resolve(), prompt) != prompt:
                raise InputError(
                    f"--class_data_dir {folder} is given for the class prompts {prompts[folder.resolve()]!r} and "
                    f"{prompt!r}; give each class its own folder."
                )


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
        if INSTANCE in record["instance_prompt"]:
            raise InputError(f"{file} line {number} has {INSTANCE} in its instance_prompt; write the name there.")
        folder = Path(record["instance_data_dir"])
        concept = Concept(
            find_photographs(folder),
            folder,
            record["instance_prompt"],
            class_prompt=record["class_prompt"] or None,
            class_data_dir=Path(record["class_data_dir"]) if record.get("class_data_dir") else None,
        )
        subjects.append(Subject([concept], Path(record["output_dir"]), record["seed"]))
    if not subjects:
        raise InputError(f"--subjects_file {file} is empty; write one line per subject.")
    folders = [subject.output_dir.resolve() for subject in subjects]
    repeated = next((s.output_dir for s, folder in zip(subjects, folders) if folders.count(folder) > 1), None)
    if repeated is not None:
        raise InputError(f"{file} gives two subjects the output_dir {repeated}; give each a different one.")
    return subjects
