"""The commands for each subject of a benchmark, as a user would type them, and checks whether they are done."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import UNREADABLE, open_image
from delora_diffusers.json_lines import GENERATED, read_json_lines, write_json_lines
from delora_diffusers.names import CHECKPOINT_PREFIX, METADATA_NAME, WEIGHTS_NAME, list_checkpoints

ROOT = Path(__file__).parents[2]
TRAINING_SCRIPT = ROOT / "train_dreambooth_delora.py"


class Result(Protocol):
    """What a task produces in its folder."""

    @property
    def folder(self) -> Path: ...

    def is_done(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class SubjectRun:
    """One subject and seed: its adapter goes to ``folder/adapter``, its images to ``folder/pictures``.

    Attributes:
        training_flags: the flags that only this subject has; None for images of the base model.
        prompts, seed: of the images.
        steps: the checkpoints from which images are generated too.
        strengths: further strengths at which images of the finished run are generated too.
    """

    folder: Path
    training_flags: Mapping[str, object] | None
    prompts: Sequence[str]
    seed: int
    steps: Sequence[int] = ()
    strengths: Sequence[float] = ()

    @property
    def adapter(self) -> Path | None:
        return None if self.training_flags is None else self.folder / "adapter"

    def images(self) -> list[tuple[Path | None, Path]]:
        """Each adapter, the last one the finished run's, and the folder of its images; None for the base model."""
        if self.adapter is None:
            return [(None, images_folder(self.folder))]
        early = [(self.adapter / f"{CHECKPOINT_PREFIX}{step}", images_folder(self.folder, step)) for step in self.steps]
        return [*early, (self.adapter, images_folder(self.folder))]

    def scaled_images(self) -> list[tuple[float, Path]]:
        """Each further strength, and the folder of its images."""
        return [(strength, images_folder(self.folder, strength=strength)) for strength in self.strengths]

    def is_trained(self) -> bool:
        return not self.missing_adapters()

    def missing_adapters(self) -> list[Path]:
        """The adapters that do not exist and whose images are not complete; the finished run's always counts."""
        return [
            adapter
            for adapter, folder in self.images()
            if adapter is not None and not (adapter / WEIGHTS_NAME).is_file()
            if adapter == self.adapter or not images_are_complete(folder, self.prompts)
        ]

    def is_done(self) -> bool:
        folders = [folder for _, folder in (*self.images(), *self.scaled_images())]
        return self.is_trained() and all(images_are_complete(folder, self.prompts) for folder in folders)


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, built just before it runs (None if it has nothing to do), and a check whether it is done."""

    command: Callable[[], Sequence[str] | None]
    is_done: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Task:
    """Commands that lead to one result, or to several at once; their output goes to ``folder/log.txt``."""

    folder: Path
    results: Sequence[Result]
    steps: Sequence[Step]

    def is_done(self) -> bool:
        return all(result.is_done() for result in self.results)


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """Images of a class for prior preservation, which all of its subjects share."""

    folder: Path
    prompt: str
    generation: Mapping[str, object]

    def generate(self) -> Sequence[str]:
        arguments = {**self.generation, "output_dir": self.folder, "prompt": self.prompt}
        return [sys.executable, "-m", "delora_diffusers", "generate", *flags(arguments)]

    def is_done(self) -> bool:
        return images_are_complete(self.folder, [self.prompt])

    def task(self) -> Task:
        return Task(self.folder.with_name(f".{self.folder.name}"), [self], [Step(self.generate, self.is_done)])


@dataclasses.dataclass(frozen=True)
class SubjectCommands:
    """The commands that train one subject, or several at once, and generate their images.

    Attributes:
        folder: contains the log; with several subjects also the checkpoints and the files that list the subjects.
        training, generation: the flags that all subjects share.
        continues: the folder of a shorter training of the same subjects, whose last checkpoint is continued.
    """

    folder: Path
    runs: Sequence[SubjectRun]
    training: Mapping[str, object]
    generation: Mapping[str, object]
    continues: Path | None = None

    def train(self) -> Sequence[str]:
        """The training command.

        Raises:
            InputError: a training is finished, but an adapter of one of its checkpoints was removed.
        """
        for run in self.runs:
            missing = run.missing_adapters()
            if missing and run.adapter not in missing:
                raise InputError(f"{missing[0]} has no adapter any more; remove {run.folder} to train it again.")
        name = "adapter" if len(self.runs) == 1 else "training"
        shorter = []
        if self.continues is not None and not list_checkpoints(self.folder / name):
            shorter = list_checkpoints(self.continues / name)
        start = str(shorter[-1]) if shorter else "latest"
        defaults = {"checkpoints_total_limit": 1, "report_to": "tensorboard"}
        command = [sys.executable, str(TRAINING_SCRIPT), *flags(defaults | dict(self.training))]
        command += ["--resume_from_checkpoint", start]
        if len(self.runs) == 1:
            (run,) = self.runs
            return [*command, *flags(run.training_flags or {}), "--output_dir", str(run.adapter)]
        lines = [{**(run.training_flags or {}), "output_dir": run.adapter} for run in self.runs]
        file = _write_lines(self.folder / "subjects.jsonl", lines)
        return [*command, "--subjects_file", file, "--output_dir", str(self.folder / name)]

    def generate(self) -> Sequence[str] | None:
        command = [sys.executable, "-m", "delora_diffusers", "generate", *flags(self.generation)]
        trained = [run for run in self.runs if run.is_trained()]
        if not trained:
            return None
        lines: list[dict[str, object]] = []
        for run in trained:
            scaled = [(run.adapter, folder, {"strength": strength}) for strength, folder in run.scaled_images()]
            for adapter, folder, more in [*((*images, {}) for images in run.images()), *scaled]:
                if adapter is None or (adapter / WEIGHTS_NAME).is_file():
                    request = {"adapter": adapter, "prompts": run.prompts, "seed": run.seed, "output_dir": folder}
                    lines.append(request | more)
        if len(lines) == 1:
            prompts: Any = lines[0].pop("prompts")
            return [*command, *flags(lines[0]), "--prompt", *prompts]
        return [*command, "--requests_file", _write_lines(self.folder / "requests.jsonl", lines)]

    def task(self) -> Task:
        """Train, then generate."""
        steps = [Step(self.generate, lambda: all(run.is_done() for run in self.runs))]
        if any(run.training_flags is not None for run in self.runs):
            steps.insert(0, Step(self.train, lambda: all(run.is_trained() for run in self.runs)))
        return Task(self.folder, self.runs, steps)


def in_order(tasks: Sequence[Task]) -> Task:
    """One task that runs several in order; their output goes to the log of the last."""
    results = [result for task in tasks for result in task.results]
    return Task(tasks[-1].folder, results, [step for task in tasks for step in task.steps])


def flag_values(words: Sequence[str], flag: str) -> dict[str, object]:
    """``rank=16 center_crop`` as flags and values; ``center_crop=false`` is False, which leaves a switch out.

    Raises:
        InputError: a word is not FLAG=VALUE.
    """
    values: dict[str, object] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not name.isidentifier():
            raise InputError(f"{flag} {word} is not FLAG=VALUE; give for example {flag} seed=1.")
        values[name] = {"true": True, "false": False}.get(value, value) if equals else True
    return values


def flags(values: Mapping[str, object]) -> list[str]:
    """``{"rank": 4, "center_crop": True}`` as command-line flags; None and False leave a flag out."""
    words: list[str] = []
    for name, value in values.items():
        if value is not None and value is not False:
            words += [f"--{name}", *([] if value is True else [str(value)])]
    return words


def _write_lines(file: Path, lines: Sequence[Mapping[str, object]]) -> str:
    texts = [{key: str(value) if isinstance(value, Path) else value for key, value in line.items()} for line in lines]
    write_json_lines(file, texts)
    return str(file)


def images_folder(subject_folder: Path, step: int | None = None, strength: float = 1.0) -> Path:
    """Where the images of a subject are: those of the finished run, of a checkpoint, or of another strength."""
    if strength != 1:
        return subject_folder / f"pictures-at-strength-{strength:g}"
    return subject_folder / ("pictures" if step is None else f"pictures-{step}")


def images_are_complete(folder: Path, prompts: Sequence[str]) -> bool:
    """Whether the folder's ``metadata.jsonl`` has all prompts and every image that it lists is complete."""
    file = folder / METADATA_NAME
    if not file.is_file():
        return False
    try:
        records = [record for _, record in read_json_lines(file, GENERATED)]
        for record in records:
            with open_image(folder / record["file_name"]) as image:
                image.verify()
    except (InputError, *UNREADABLE):
        return False
    return {record["prompt"] for record in records} >= set(prompts)
