"""Benchmarks for subject-driven generation: their subjects, their prompts, and which photos are available.

``python -m data.benchmark dreambooth`` describes a benchmark; ``--photographs FOLDER`` lists which of its subjects a
downloaded folder contains. A benchmark is a YAML file: give the name of a file in ``data/benchmarks``, or the path of
any other.
"""

import argparse
import dataclasses
import string
import sys
from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import list_images
from delora_diffusers.names import is_folder_name
from delora_diffusers.text_files import as_int, read_yaml

SHIPPED = Path(__file__).parent / "benchmarks"
FIELDS = {"identifier", "class"}
"""Placeholders that every prompt contains."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One subject of a benchmark.

    Attributes:
        name: also the name of its folder of photos.
        class_name: its class as it appears in prompts.
        kind: selects its list of prompts.
        toybox: number of the unseen toy, for subjects whose photos are rendered.
    """

    name: str
    class_name: str
    kind: str
    toybox: int | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Subjects and prompts.

    Attributes:
        prompts: for each kind of subject, its prompts with ``{identifier}`` and ``{class}``.
        drift_prompts: prompts without the subject, with or without ``{class}``. Comparing their images to the base
            model's measures how far training drifts on everything else.
    """

    name: str
    identifier: str
    images_per_prompt: int
    prompts: dict[str, tuple[str, ...]]
    subjects: tuple[Subject, ...]
    drift_prompts: tuple[str, ...] = ()

    def prompts_of(self, subject: Subject) -> list[str]:
        """The subject's prompts with identifier and class filled in."""
        words = {"identifier": self.identifier, "class": subject.class_name}
        return [template.format_map(words) for template in self.prompts[subject.kind]]

    def drift_prompts_of(self, subject: Subject) -> list[str]:
        """The distinct drift prompts, with the subject's class filled in."""
        return list(dict.fromkeys(p.format_map({"class": subject.class_name}) for p in self.drift_prompts))

    def class_prompt(self, subject: Subject) -> str:
        """The prompt of the class images for prior preservation, as in OFT's scripts."""
        return f"a photo of {subject.class_name}"

    def instance_prompt(self, subject: Subject) -> str:
        """The prompt for every photo of the subject during training."""
        return f"a photo of {self.identifier} {subject.class_name}"


def load_benchmark(name_or_file: str | Path) -> Benchmark:
    """Load a shipped benchmark by name, or any other from a YAML file.

    Raises:
        InputError: there is no such benchmark, or the file is not a valid one; the message names the entry.
    """
    file = SHIPPED / f"{name_or_file}.yaml"
    if not file.is_file():
        file = Path(name_or_file)
    if not file.is_file():
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise InputError(f"there is no benchmark {name_or_file}; choose one of {shipped}, or give a YAML file.")
    content = read_yaml(file)

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise InputError(f"{file}: {problem}; see data/benchmarks/dreambooth.yaml for an example.")

    require(isinstance(content, dict), "the file is not a mapping")
    unknown = sorted({str(key) for key in content} - {field.name for field in dataclasses.fields(Benchmark)})
    require(not unknown, f"unknown key {', '.join(unknown)}")
    prompts, entries = content.get("prompts"), content.get("subjects")
    require(isinstance(prompts, dict) and bool(prompts), "prompts must map each kind of subject to a list of prompts")
    for kind, templates in prompts.items():
        require(isinstance(kind, str), f"the kind {kind!r} is not a word")
        require(isinstance(templates, list) and bool(templates), f"the prompts of {kind!r} are not a list")
        for template in templates:
            require(
                _fields(template) == FIELDS,
                f"the prompt {template!r} must contain {{identifier}} and {{class}}, once each",
            )
    require(isinstance(entries, dict) and bool(entries), "subjects must map each name to its class and kind")
    subjects = []
    for name, entry in entries.items():
        require(
            isinstance(name, str) and is_folder_name(name),
            f"the subject {name!r} cannot name a folder (give a visible name without slashes)",
        )
        entry = entry if isinstance(entry, dict) else {}
        class_name = entry.get("class")
        require(
            isinstance(class_name, str) and bool(class_name.strip()) and not set(entry) - {"class", "kind", "toybox"},
            f"the subject {name!r} needs a class and a kind (the only other key is toybox)",
        )
        require(
            isinstance(entry.get("kind"), str) and entry["kind"] in prompts,
            f"the subject {name!r} is of kind {entry.get('kind')!r}, which has no prompts",
        )
        number = as_int(entry.get("toybox"))
        require(
            entry.get("toybox") is None or (number is not None and number >= 0),
            f"the toybox number of {name!r} is {entry.get('toybox')!r}, not a whole number of at least 0",
        )
        subjects.append(Subject(name, entry["class"], entry["kind"], number))
    given: Any = content.get("images_per_prompt", 4)
    images = as_int(given) or 0
    require(images > 0, f"images_per_prompt is {given}, not a whole number of at least 1")
    identifier: Any = content.get("identifier", "sks")
    require(isinstance(identifier, str) and bool(identifier.strip()), f"the identifier is {identifier!r}, not a word")
    drift_prompts: Any = content.get("drift_prompts", [])
    require(isinstance(drift_prompts, list), "drift_prompts is not a list")
    for template in drift_prompts:
        require(
            _fields(template) in (set(), {"class"}),
            f"the drift prompt {template!r} may contain {{class}} once, and no other field",
        )
    return Benchmark(
        name=str(content.get("name") or file.stem),
        identifier=identifier,
        images_per_prompt=images,
        prompts={kind: tuple(templates) for kind, templates in prompts.items()},
        subjects=tuple(subjects),
        drift_prompts=tuple(drift_prompts),
    )


def _fields(template: Any) -> set[str] | None:
    """The fields of a prompt; None if it is not a valid template or repeats a field."""
    if not isinstance(template, str):
        return None
    try:
        parsed = [part for part in string.Formatter().parse(template) if part[1] is not None]
        if any(form or conversion for _, _, form, conversion in parsed):
            return None
        fields = [field for _, field, _, _ in parsed if field is not None]
    except ValueError:
        return None
    return set(fields) if len(fields) == len(set(fields)) else None


@dataclasses.dataclass(frozen=True)
class FolderContents:
    """Which subjects of a benchmark a folder contains.

    Attributes:
        counts: number of photos of each subject that has any.
        missing: subjects without a folder, or with an empty one.
        extra: folders that belong to no subject.
    """

    counts: dict[str, int]
    missing: list[str]
    extra: list[str]


def find_subjects(benchmark: Benchmark, folder: str | Path) -> FolderContents:
    """Look for each subject's folder of photos.

    Raises:
        InputError: ``folder`` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that contains one folder per subject.")
    counts = {}
    for subject in benchmark.subjects:
        subject_folder = folder / subject.name
        photos = list_images(subject_folder) if subject_folder.is_dir() else []
        if photos:
            counts[subject.name] = len(photos)
    names = [subject.name for subject in benchmark.subjects]
    missing = [name for name in names if name not in counts]
    extra = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in names and p.name[0] != ".")
    return FolderContents(counts, missing, extra)


def render_subjects(benchmark: Benchmark, folder: str | Path) -> None:
    """Render the photos of all toybox subjects to ``folder/NAME``, unless that exists.

    Raises:
        InputError: a subject's class is not that of its toy.
    """
    from data.toybox.write import write_unseen_subject

    for subject in benchmark.subjects:
        if subject.toybox is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            kind = write_unseen_subject(Path(folder) / subject.name, subject.toybox)
            if kind != subject.class_name:
                raise InputError(f"toy {subject.toybox} is a {kind}, not a {subject.class_name}; fix the benchmark.")


def describe(benchmark: Benchmark) -> str:
    """The benchmark's size, then one line per subject."""
    kinds = [
        f"{sum(s.kind == kind for s in benchmark.subjects)} {kind} with {len(templates)} prompts"
        for kind, templates in benchmark.prompts.items()
    ]
    total = sum(len(benchmark.prompts[s.kind]) for s in benchmark.subjects) * benchmark.images_per_prompt
    lines = [f"{benchmark.name}: {len(benchmark.subjects)} subjects ({', '.join(kinds)}), {total} images per seed"]
    return "\n".join(lines + [f"  {s.name:20} {s.class_name:16} {s.kind}" for s in benchmark.subjects])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.benchmark", description=__doc__)
    parser.add_argument("benchmark", help="dreambooth, toybox or a YAML file")
    parser.add_argument(
        "--photographs", type=Path, help="list which subjects this folder contains; exit with 1 if any is missing"
    )
    options = parser.parse_args(arguments)
    try:
        benchmark = load_benchmark(options.benchmark)
        if options.photographs is None:
            print(describe(benchmark))
            return
        contents = find_subjects(benchmark, options.photographs)
    except InputError as error:
        sys.exit(f"error: {error}")
    photos = sum(contents.counts.values())
    print(f"{len(contents.counts)} of {len(benchmark.subjects)} subjects, {photos} photos in {options.photographs}")
    for label, names in (("missing", contents.missing), ("extra", contents.extra)):
        if names:
            print(f"{label}: {', '.join(names)}")
    sys.exit(1 if contents.missing else 0)


if __name__ == "__main__":
    main()
