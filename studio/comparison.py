"""Compare runs: the same prompts and seeds, scores with real images, paired differences. Scores with torch."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import write_json_lines
from studio import adapters, jobs
from studio.workspace import Workspace

BASE = "base model (no adapter)"
"""Its label, which no run can have as a name."""
BENCHMARK_FILES = ("settings.json", "summary.json", "scores.parquet", "subjects.csv")
"""By which the output folder of a finished ``eval benchmark`` is recognized."""
SCENES = ("on the beach", "in the snow", "in the jungle", "on a wooden floor")


def default_prompts(workspace: Workspace, label: str | None) -> str:
    """The instance prompt of a run in a few scenes, one per line."""
    prompt = adapters.prompt_of(workspace, label) or "a photo of sks mug"
    return "\n".join(f"{prompt} {scene}" for scene in SCENES)


def other_subject(workspace: Workspace, labels: Sequence[str], name: str | None) -> str:
    """A sentence about the adapters that were not trained on this set of photos; empty without any."""
    trained = {label: adapters.photos_of(workspace, label) for label in labels}
    others = [f"{label} was trained on {photos}" for label, photos in trained.items() if photos not in (None, name)]
    if not name or not others:
        return ""
    return f"{' and '.join(others)}, not on {name}: with these photos the scores may be about another subject."


def requests(workspace: Workspace, labels: Sequence[str], prompts: Sequence[str], flags: Sequence[str]) -> Path:
    """Write the requests of ``generate --requests_file`` for the base model and these adapters; returns their folder.

    Its name follows from the requests and the flags, so the same comparison is generated and scored once.

    Raises:
        InputError: fewer than two adapters, or no prompt.
    """
    if len(labels) < 2:
        raise InputError("a comparison needs two adapters at least; choose more in the list.")
    if not prompts:
        raise InputError("there is no prompt; write at least one, each on its own line.")
    sources = {label: adapters.adapter(workspace, label) for label in labels}
    states = [adapters.digest(jobs.ROOT / source) for source in sources.values()]
    content = json.dumps([list(labels), states, list(prompts), list(flags)])
    folder = workspace.output("compare-" + hashlib.sha256(content.encode()).hexdigest()[:10])
    records = [
        {"adapter": str(source), "prompts": list(prompts), "output_dir": str(jobs.short(images_of(folder, label)))}
        for label, source in sources.items()
    ]
    records.insert(
        0, {"adapter": None, "prompts": list(prompts), "output_dir": str(jobs.short(images_of(folder, BASE)))}
    )
    write_json_lines(folder / "requests.jsonl", records)
    return folder


def images_of(folder: Path, label: str) -> Path:
    """The images of one adapter in a comparison; ``@`` is in no name, so that no two adapters share a folder."""
    return folder / ("@base" if label == BASE else label.replace("/", "@"))


def scores_file(folder: Path, label: str, photos: Path, protocol: str) -> Path:
    return folder / f"{images_of(folder, label).name}@{photos.name}@{protocol}.json"


def score_words(folder: Path, label: str, photos: Path, protocol: str) -> list[str]:
    """The command that scores the images of one adapter."""
    words = ["dreambooth", "--generated_dir", images_of(folder, label), "--reference_dir", photos]
    output = scores_file(folder, label, photos, protocol)
    words = [jobs.short(word) if isinstance(word, Path) else word for word in words]
    return jobs.words_of("eval", *words, "--protocol", protocol, "--output", jobs.short(output))


def page_words(folder: Path, label: str, photos: Path, protocol: str, run: Path) -> tuple[list[str], Path]:
    """The command that writes the page of one adapter, and the page."""
    output = folder / f"{images_of(folder, label).name}@{photos.name}.html"
    words = ["page", "--generated_dir", images_of(folder, label), "--base_dir", images_of(folder, BASE)]
    words += ["--reference_dir", photos, "--training_dir", run]
    words = [jobs.short(word) if isinstance(word, Path) else word for word in words]
    return jobs.words_of("eval", *words, "--protocol", protocol, "--output", jobs.short(output)), output


def benchmarks(workspace: Workspace) -> list[str]:
    """The finished output folders of ``eval benchmark`` among the outputs, newest first."""
    folders = [workspace.output(name) for name in workspace.output_names()]
    folders = [folder for folder in folders if all((folder / file).is_file() for file in BENCHMARK_FILES)]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [folder.name for folder in folders]


def benchmark_words(workspace: Workspace) -> list[str]:
    """The command of a benchmark that the page finds afterwards."""
    folder = jobs.short(workspace.outputs / "toybox-delora")
    return jobs.words_of("eval", "benchmark", "toybox", "--method", "delora", "--output_dir", folder)


def report_words(workspace: Workspace, names: Sequence[str]) -> tuple[list[str], Path]:
    """The command that writes the report of one benchmark run, or of two, and the report.

    Raises:
        InputError: there is none of that name, or the number of them is another.
    """
    if len(names) not in (1, 2):
        raise InputError(f"{len(names)} benchmark runs are chosen; a report shows one, or two side by side.")
    if missing := set(names) - set(benchmarks(workspace)):
        raise InputError(f"there is no benchmark run {min(missing)!r}; choose one from the list.")
    folders = [workspace.output(name) for name in names]
    digest = hashlib.sha256(b"".join((folder / "summary.json").read_bytes() for folder in folders)).hexdigest()[:10]
    output = workspace.outputs / f"report-{digest}.html"
    return jobs.words_of("eval", "report", *map(jobs.short, folders), "--output", jobs.short(output)), output


def read_scores(folder: Path, labels: Sequence[str], photos: Path, protocol: str) -> dict[str, dict[str, Any]]:
    """What ``eval dreambooth`` wrote, by adapter, for those that are scored."""
    files = {label: scores_file(folder, label, photos, protocol) for label in (BASE, *labels)}
    return {label: json.loads(file.read_text("utf-8")) for label, file in files.items() if file.is_file()}


def differences(scores: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, dict[str, Any]]]]:
    """For every two adapters, the mean difference of each score over the prompts, paired, with its 95% interval.

    The images of a prompt are not independent of one another, so that prompts are resampled and not images.
    """
    import pandas as pd

    from eval.benchmark.results import paired_differences  # imports torch

    rows = {
        label: pd.DataFrame(result["pictures"]).rename(columns={"prompt": "subject"})
        for label, result in scores.items()
        if label != BASE
    }
    return [
        (first, second, paired_differences(rows[first], rows[second]))
        for first, second in itertools.combinations(rows, 2)
    ]


def write_differences(folder: Path, scores: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict]]:
    """``differences``, also as JSON in the folder of the comparison."""
    found = differences(scores)
    named = [{"first": first, "second": second, "difference": result} for first, second, result in found]
    write_text(folder / "differences.json", json.dumps(named, indent=2) + "\n")
    return found
