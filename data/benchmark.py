"""Benchmarks of subject-driven generation: which subjects, which prompts, and whether their photographs are at hand.

``python -m data.benchmark dreambooth`` shows one; ``--photographs FOLDER`` says what of it a downloaded folder holds.
A benchmark is a YAML file: those in ``data/benchmarks`` go by their name, any other by its path.
"""

import argparse
import dataclasses
import string
import sys
from pathlib import Path
from typing import Any

import yaml

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import list_images

SHIPPED = Path(__file__).parent / "benchmarks"
FIELDS = {"identifier", "class"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One subject: its name, which is its folder's, its class in words and the kind that says which prompts it gets.

    Attributes:
        toybox: number of the unseen toy that it is, where its photographs are rendered.
    """

    name: str
    class_name: str
    kind: str
    toybox: int | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Subjects, and for each kind of subject its prompts with ``{identifier}`` and ``{class}`` in them.

    Attributes:
        drift_prompts: prompts without the subject, with ``{class}`` or without; their pictures, compared to the base
            model's, say how much else a training has moved.
    """

    name: str
    identifier: str
    images_per_prompt: int
    prompts: dict[str, tuple[str, ...]]
    subjects: tuple[Subject, ...]
    drift_prompts: tuple[str, ...] = ()

    def prompts_of(self, subject: Subject) -> list[str]:
        """The subject's prompts as a model reads them."""
        words = {"identifier": self.identifier, "class": subject.class_name}
        return [template.format_map(words) for template in self.prompts[subject.kind]]

    def drift_prompts_of(self, subject: Subject) -> list[str]:
        """The prompts without the subject."""
        return list(dict.fromkeys(p.format_map({"class": subject.class_name}) for p in self.drift_prompts))

    def instance_prompt(self, subject: Subject) -> str:
        """What every photograph of the subject is called while training."""
        return f"a photo of {self.identifier} {subject.class_name}"


def load_benchmark(name_or_file: str | Path) -> Benchmark:
    """A shipped benchmark by its name, or any other from its YAML file.

    Raises:
        InputError: there is none, or the file does not describe one; the message says where.
    """
    file = SHIPPED / f"{name_or_file}.yaml"
    if not file.is_file():
        file = Path(name_or_file)
    if not file.is_file():
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise InputError(f"there is no benchmark {name_or_file}; name one of {shipped}, or a YAML file.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())}); mend it.") from error

    def require(right: bool, what: str) -> None:
        if not right:
            raise InputError(f"{file}: {what}; data/benchmarks/dreambooth.yaml is an example.")

    require(isinstance(content, dict), "this is no mapping")
    unknown = sorted(set(content) - {field.name for field in dataclasses.fields(Benchmark)})
    require(not unknown, f"{', '.join(map(str, unknown))} means nothing here")
    prompts, listed = content.get("prompts"), content.get("subjects")
    require(isinstance(prompts, dict) and bool(prompts), "prompts are to be lists by kind of subject")
    for kind, templates in prompts.items():
        require(isinstance(templates, list) and bool(templates), f"the prompts of {kind!r} are no list")
        for template in templates:
            require(
                _fields(template) == FIELDS, f"the prompt {template!r} needs {{identifier}} and {{class}}, once each"
            )
    require(isinstance(listed, dict) and bool(listed), "subjects are to be a mapping from name to class and kind")
    subjects = []
    for name, entry in listed.items():
        entry = entry if isinstance(entry, dict) else {}
        require(
            isinstance(entry.get("class"), str) and not set(entry) - {"class", "kind", "toybox"},
            f"the subject {name!r} needs a class and a kind, and takes nothing else but toybox",
        )
        require(entry.get("kind") in prompts, f"the subject {name!r} is of kind {entry.get('kind')!r}, without prompts")
        number = entry.get("toybox")
        require(
            number is None or (isinstance(number, int) and number >= 0),
            f"the toybox number of {name!r} is {number!r}, not a number from 0",
        )
        subjects.append(Subject(str(name), entry["class"], entry["kind"], number))
    images: Any = content.get("images_per_prompt", 4)
    require(isinstance(images, int) and images > 0, f"images_per_prompt is {images!r}, not a number from 1")
    identifier: Any = content.get("identifier", "sks")
    require(isinstance(identifier, str) and bool(identifier), f"the identifier is {identifier!r}, not a word")
    drift: Any = content.get("drift_prompts", [])
    require(isinstance(drift, list), "drift_prompts is no list")
    for template in drift:
        require(_fields(template) in (set(), {"class"}), f"the drift prompt {template!r} takes {{class}} or nothing")
    by_kind = {kind: tuple(templates) for kind, templates in prompts.items()}
    return Benchmark(str(content.get("name", file.stem)), identifier, images, by_kind, tuple(subjects), tuple(drift))


def _fields(template: Any) -> set[str] | None:
    """The fields of a prompt, each of them once; None where it is not such a prompt."""
    if not isinstance(template, str):
        return None
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError:
        return None
    return set(found) if len(found) == len(set(found)) else None


@dataclasses.dataclass(frozen=True)
class Photographs:
    """What a folder holds of a benchmark.

    Attributes:
        counts: pictures of each subject whose folder is there.
        missing: subjects without a folder or without a picture. extra: folders that are no subject's.
    """

    counts: dict[str, int]
    missing: list[str]
    extra: list[str]


def find_subjects(benchmark: Benchmark, folder: str | Path) -> Photographs:
    """Look for a folder of photographs for each subject.

    Raises:
        InputError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the one that holds a folder for each subject.")
    counts = {}
    for subject in benchmark.subjects:
        place = folder / subject.name
        pictures = list_images(place) if place.is_dir() else []
        if pictures:
            counts[subject.name] = len(pictures)
    names = [subject.name for subject in benchmark.subjects]
    missing = [name for name in names if name not in counts]
    extra = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in names and p.name[0] != ".")
    return Photographs(counts, missing, extra)


def render_subjects(benchmark: Benchmark, folder: str | Path) -> None:
    """Render the photographs of subjects that are toys into ``folder/NAME``, unless they are there."""
    from data.toybox.write import write_unseen_subject

    for subject in benchmark.subjects:
        if subject.toybox is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            kind = write_unseen_subject(Path(folder) / subject.name, subject.toybox)
            if kind != subject.class_name:
                raise InputError(f"toy {subject.toybox} is a {kind}, not a {subject.class_name}; mend the benchmark.")


def describe(benchmark: Benchmark) -> str:
    kinds = [
        f"{sum(s.kind == kind for s in benchmark.subjects)} {kind} with {len(templates)} prompts"
        for kind, templates in benchmark.prompts.items()
    ]
    total = sum(len(benchmark.prompts[s.kind]) for s in benchmark.subjects) * benchmark.images_per_prompt
    lines = [f"{benchmark.name}: {len(benchmark.subjects)} subjects ({', '.join(kinds)}), {total} images a seed"]
    return "\n".join(lines + [f"  {s.name:20} {s.class_name:16} {s.kind}" for s in benchmark.subjects])


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.benchmark", description=__doc__)
    parser.add_argument("benchmark", help="dreambooth, toybox or a YAML file")
    parser.add_argument("--photographs", type=Path, help="say what of it this folder holds; exit 1 unless all")
    options = parser.parse_args(typed)
    try:
        benchmark = load_benchmark(options.benchmark)
        if options.photographs is None:
            print(describe(benchmark))
            return
        found = find_subjects(benchmark, options.photographs)
    except InputError as error:
        sys.exit(f"error: {error}")
    pictures = sum(found.counts.values())
    print(f"{len(found.counts)} of {len(benchmark.subjects)} subjects, {pictures} photographs in {options.photographs}")
    for what, names in (("missing", found.missing), ("extra", found.extra)):
        if names:
            print(f"{what}: {', '.join(names)}")
    sys.exit(1 if found.missing else 0)


if __name__ == "__main__":
    main()
