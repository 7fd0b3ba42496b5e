"""Score the pictures of a benchmark run: which there are, their features, the tables of numbers."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import Benchmark, Subject
from data.errors import InputError
from eval.dreambooth import read_generated
from eval.plan import Plan
from eval.protocols import PROTOCOLS, Protocol
from eval.scores import IDENTIFIERS, without_identifier
from eval.writing import write_text, written_whole


def collect(plan: Plan, options: argparse.Namespace, failed: dict[str, str]) -> list[Any]:
    """What there is to score; a subject whose pictures are not all there is added to ``failed``."""
    from eval.results import Drawn

    words = [*IDENTIFIERS, plan.benchmark.identifier]
    given: Path | None = options.generated_dir
    found = []
    for seed in plan.seeds:
        base = {}
        if plan.drifts() and str(plan.base(seed)) not in failed:
            base = _by_prompt(read_generated(plan.base(seed) / "pictures"))
        for subject in plan.benchmark.subjects:
            place = plan.place(subject, seed)
            if str(place) in failed:
                continue
            try:
                drawn = _by_prompt(read_generated(place / "pictures" if given is None else given / subject.name), words)
                pictures = _pictures_of(plan.benchmark, subject, drawn, words)
            except InputError as error:
                failed[str(place)] = str(error)
                continue
            drift = [
                pair
                for prompt in plan.benchmark.drift_prompts_of(subject)
                if prompt in base
                for pair in zip(drawn[without_identifier(prompt, words)], base[prompt])
            ]
            paths, prompts = [path for path, _ in pictures], [prompt for _, prompt in pictures]
            references = plan.photographs[subject.name]
            found.append(Drawn(subject.name, subject.class_name, seed, paths, prompts, references, drift))
    return found


def _by_prompt(generated: list[tuple[Path, str]], identifiers: Sequence[str] = ()) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path, prompt in generated:
        found.setdefault(without_identifier(prompt, identifiers) if identifiers else prompt, []).append(path)
    return found


def _pictures_of(
    benchmark: Benchmark, subject: Subject, drawn: dict[str, list[Path]], words: Sequence[str]
) -> list[tuple[Path, str]]:
    """(picture, prompt without identifier) of the subject's prompts in order.

    Raises:
        InputError: a prompt has fewer or more pictures than the benchmark asks for.
    """
    found = []
    for prompt in benchmark.prompts_of(subject):
        bare = without_identifier(prompt, words)
        paths = drawn.get(bare, [])
        if len(paths) != benchmark.images_per_prompt:
            wanted = benchmark.images_per_prompt
            raise InputError(f"{subject.name} has {len(paths)} pictures of {bare!r}, not {wanted}; draw them again.")
        found += [(path, bare) for path in paths]
    return found


class Scorers:
    """The models of one protocol."""

    def __init__(self, protocol: Protocol, options: argparse.Namespace, device: Any):
        from eval.encoders import ClipEncoder, DinoEncoder

        self.names = {"dino": options.dino or protocol.dino, "clip": options.clip or protocol.clip}
        dino = DinoEncoder(self.names["dino"], protocol.dino_transform, device, options.precision)
        pretrained = protocol.clip_pretrained
        clip = ClipEncoder(self.names["clip"], pretrained, device, protocol.clip_crop, options.precision)
        self.encoders: dict[str, Any] = {"dino": dino, "clip": clip}

    def described(self) -> dict[str, str]:
        transforms = {f"{key}_transform": str(encoder.transform) for key, encoder in self.encoders.items()}
        return self.names | transforms | {f"{k}_identity": e.identity for k, e in self.encoders.items()}


@dataclasses.dataclass(frozen=True)
class Models:
    """All that scores: the encoders by protocol, and LPIPS' backbone where it is asked for."""

    scorers: dict[str, Scorers]
    perceptual: Any


def load_models(options: argparse.Namespace, device: Any) -> Models:
    """The models that the options name.

    Raises:
        InputError: one cannot be had.
    """
    from eval.perceptual import Perceptual

    scorers = {name: Scorers(PROTOCOLS[name], options, device) for name in options.protocol}
    return Models(scorers, None if options.lpips == "none" else Perceptual(options.lpips, device))


def score(
    plan: Plan, options: argparse.Namespace, accelerator: Any, failed: dict[str, str], models: Models
) -> dict[str, Any] | None:
    """Encode on every process, then make the numbers on the first; None on the others."""
    import pandas as pd

    from eval.embedding import embed
    from eval.perceptual import perceptual_scores
    from eval.results import score as score_one
    from eval.results import summarize

    cache = plan.folder / "embeddings"
    settings = {"batch_size": options.batch_size, "workers": options.workers, "cache_dir": cache}
    scorers, perceptual = models.scorers, models.perceptual
    drawn, kept = collect(plan, options, failed), []
    index, count = accelerator.process_index, accelerator.num_processes
    for one in scorers.values():
        files = list(dict.fromkeys(path for d in drawn for path in d.files()))[index::count]
        with contextlib.suppress(InputError):  # the first process says which subject it belongs to
            embed(files, one.encoders, **settings)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    features = []
    for d in drawn:
        try:
            features.append({name: embed(d.files(), one.encoders, **settings) for name, one in scorers.items()})
            kept.append(d)
        except InputError as error:
            failed[str(plan.folder / f"seed-{d.seed}" / d.subject)] = str(error)
    if not kept:
        raise InputError(f"no subject could be scored; the first problem: {next(iter(failed.values()), 'none drawn')}")
    templates = _templates(plan.benchmark)
    perceived = []
    for d in kept:
        groups = [[d.pictures[i] for i in group] for group in d.groups()]
        perceived.append(None if perceptual is None else perceptual_scores(perceptual, groups, d.references))
    summary: dict[str, Any] = {"benchmark": plan.benchmark.name, "method": plan.made["method"], "failed": failed}
    summary["references"] = {name: [_within(plan.folder, p) for p in paths] for name, paths in plan.photographs.items()}
    summary["protocols"], all_pictures, all_subjects = {}, [], []
    for name, one in scorers.items():
        prompts = list(dict.fromkeys(prompt for d in kept for prompt in d.prompts))
        texts = dict(zip(prompts, one.encoders["clip"].encode_texts(prompts).cpu()))
        scored = []
        for d, found, seen in zip(kept, features, perceived):
            dino, clip = (dict(zip(d.files(), found[name][key])) for key in ("dino", "clip"))
            scored.append(score_one(d, dino, clip, texts, seen))
        pictures = pd.concat([rows for rows, _ in scored], ignore_index=True)
        pictures.insert(0, "protocol", name)
        pictures["template"] = [templates[s, p] for s, p in zip(pictures["subject"], pictures["prompt"])]
        subjects = pd.DataFrame([row for _, row in scored])
        subjects.insert(0, "protocol", name)
        summary["protocols"][name] = summarize(subjects, pictures) | {
            "source": PROTOCOLS[name].source,
            "models": one.described() | {"lpips": options.lpips, "precision": options.precision},
        }
        all_pictures.append(pictures)
        all_subjects.append(subjects)
    _write_scores(plan.folder, pd.concat(all_pictures), pd.concat(all_subjects), summary)
    return summary


def _templates(benchmark: Benchmark) -> dict[tuple[str, str], str]:
    """The prompt as the benchmark has it, by (subject, prompt without identifier)."""
    words = [*IDENTIFIERS, benchmark.identifier]
    return {
        (subject.name, without_identifier(prompt, words)): without_identifier(
            template.replace("{identifier}", benchmark.identifier), words
        )
        for subject in benchmark.subjects
        for template, prompt in zip(benchmark.prompts[subject.kind], benchmark.prompts_of(subject))
    }


def _within(folder: Path, path: Path) -> str:
    """A file's name from the results folder where it lies there, its whole path elsewhere."""
    root, path = folder.resolve(), path.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _write_scores(folder: Path, pictures: Any, subjects: Any, summary: dict[str, Any]) -> None:
    pictures["file"] = [_within(folder, Path(name)) for name in pictures["file"]]
    with written_whole(folder / "scores.parquet") as temporary:
        pictures.reset_index(drop=True).to_parquet(temporary, index=False)
    write_text(folder / "subjects.csv", subjects.to_csv(index=False))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
