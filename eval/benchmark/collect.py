"""Collect the images of a benchmark run, compute their features, and write the tables of scores."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from data.benchmark import Benchmark, Subject
from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.errors import InputError
from eval.benchmark.plan import Plan
from eval.benchmark.results import LpipsScores, SubjectImages, score_subject, summarize
from eval.metrics.embedding import embed
from eval.metrics.encoders import Encoders, load_encoders
from eval.metrics.generated import Generated, by_prompt, read_generated
from eval.metrics.lpips import Perceptual, perceptual_scores
from eval.metrics.protocols import IDENTIFIERS, PROTOCOLS
from eval.metrics.scores import without_identifier

if TYPE_CHECKING:
    from accelerate import Accelerator


def collect(plan: Plan, options: argparse.Namespace, failed: dict[str, str]) -> list[SubjectImages]:
    """The images to score. Subjects whose images are incomplete are added to ``failed``."""
    words = [*IDENTIFIERS, plan.benchmark.identifier]
    given: Path | None = options.generated_dir
    collected = []
    for seed in plan.seeds:
        base = {}
        if plan.measures_drift() and str(plan.base_folder(seed)) not in failed:
            base = by_prompt(read_generated(plan.base_folder(seed) / "pictures"))
        for subject in plan.benchmark.subjects:
            folder = plan.subject_folder(subject, seed)
            if str(folder) in failed:
                continue
            try:
                generated = read_generated(folder / "pictures" if given is None else given / subject.name)
                images = by_prompt([(path, without_identifier(prompt, words)) for path, prompt in generated])
                scored = _images_of(plan.benchmark, subject, images, words)
            except InputError as error:
                failed[str(folder)] = str(error)
                continue
            drift = [
                pair
                for prompt in plan.benchmark.drift_prompts_of(subject)
                if prompt in base
                for pair in zip(images[without_identifier(prompt, words)], base[prompt])
            ]
            paths, prompts = [path for path, _ in scored], [prompt for _, prompt in scored]
            references = plan.photographs[subject.name]
            collected.append(SubjectImages(subject.name, subject.class_name, seed, paths, prompts, references, drift))
    return collected


def _images_of(
    benchmark: Benchmark, subject: Subject, images: dict[str, list[Path]], words: Sequence[str]
) -> Generated:
    """(image, prompt without identifier), in the order of the subject's prompts.

    Raises:
        InputError: the number of images of a prompt differs from the benchmark's.
    """
    expected, generated = benchmark.images_per_prompt, []
    for prompt in benchmark.prompts_of(subject):
        bare = without_identifier(prompt, words)
        paths = images.get(bare, [])
        if len(paths) != expected:
            raise InputError(
                f"{subject.name} has {len(paths)} images of {bare!r} instead of {expected}; generate them again."
            )
        generated += [(path, bare) for path in paths]
    return generated


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that score: the encoders by protocol, and the LPIPS network unless it is disabled."""

    encoders: dict[str, Encoders]
    perceptual: Perceptual | None


def load_models(options: argparse.Namespace, device: torch.device | str) -> Models:
    """The models that the options ask for.

    Raises:
        InputError: a model cannot be loaded.
    """
    encoders = {
        name: load_encoders(PROTOCOLS[name], options.dino, options.clip, device, options.precision)
        for name in options.protocol
    }
    return Models(encoders, None if options.lpips == "none" else Perceptual(options.lpips, device))


def describe_encoders(encoders: Encoders) -> dict[str, str]:
    """Names, preprocessing and identity of the encoders, for the summary."""
    names = {"dino": encoders.dino_name, "clip": encoders.clip_name}
    transforms = {f"{key}_transform": str(encoder.transform) for key, encoder in encoders.by_key().items()}
    return names | transforms | {f"{key}_identity": encoder.identity for key, encoder in encoders.by_key().items()}


def score(
    plan: Plan, options: argparse.Namespace, accelerator: "Accelerator", failed: dict[str, str], models: Models
) -> dict[str, Any] | None:
    """Compute features on every process, then the scores on the first; None on the others."""
    settings: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers}
    settings["cache_dir"] = plan.folder / "embeddings"
    collected = collect(plan, options, failed)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    for encoders in models.encoders.values():
        files = list(dict.fromkeys(path for images in collected for path in images.files()))[share]
        with contextlib.suppress(InputError):  # the first process reports it, with the subject it belongs to
            embed(files, encoders.by_key(), **settings)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    features, scored = [], []
    for images in collected:
        try:
            features.append({n: embed(images.files(), e.by_key(), **settings) for n, e in models.encoders.items()})
            scored.append(images)
        except InputError as error:
            failed[str(plan.folder / f"seed-{images.seed}" / images.subject)] = str(error)
    if not scored:
        problem = next(iter(failed.values()), "nothing was generated")
        raise InputError(f"no subject could be scored; the first problem: {problem}")
    lpips_scores = [_lpips_scores(images, models.perceptual) for images in scored]
    summary: dict[str, Any] = {"benchmark": plan.benchmark.name, "method": plan.settings["method"], "failed": failed}
    summary["references"] = {name: [_within(plan.folder, p) for p in paths] for name, paths in plan.photographs.items()}
    summary["protocols"], image_tables, subject_tables = {}, [], []
    templates = _templates(plan.benchmark)
    for name, encoders in models.encoders.items():
        prompts = list(dict.fromkeys(prompt for images in scored for prompt in images.prompts))
        texts = dict(zip(prompts, encoders.clip.encode_texts(prompts).cpu()))
        tables, rows = [], []
        for images, by_protocol, lpips in zip(scored, features, lpips_scores):
            dino, clip = (dict(zip(images.files(), by_protocol[name][key])) for key in ("dino", "clip"))
            table, row = score_subject(images, dino, clip, texts, lpips)
            tables.append(table)
            rows.append(row)
        image_table = pd.concat(tables, ignore_index=True)
        image_table.insert(0, "protocol", name)
        image_table["template"] = [templates[s, p] for s, p in zip(image_table["subject"], image_table["prompt"])]
        subject_table = pd.DataFrame(rows)
        subject_table.insert(0, "protocol", name)
        summary["protocols"][name] = summarize(subject_table, image_table) | {
            "source": PROTOCOLS[name].source,
            "models": describe_encoders(encoders) | {"lpips": options.lpips, "precision": options.precision},
        }
        image_tables.append(image_table)
        subject_tables.append(subject_table)
    _write_scores(plan.folder, pd.concat(image_tables), pd.concat(subject_tables), summary)
    return summary


def _lpips_scores(images: SubjectImages, perceptual: Perceptual | None) -> LpipsScores | None:
    if perceptual is None:
        return None
    groups = [[images.images[i] for i in group] for group in images.groups()]
    return perceptual_scores(perceptual, groups, images.references)


def _templates(benchmark: Benchmark) -> dict[tuple[str, str], str]:
    """The benchmark's prompt template by (subject, prompt without identifier)."""
    words = [*IDENTIFIERS, benchmark.identifier]
    return {
        (subject.name, without_identifier(prompt, words)): without_identifier(
            template.replace("{identifier}", benchmark.identifier), words
        )
        for subject in benchmark.subjects
        for template, prompt in zip(benchmark.prompts[subject.kind], benchmark.prompts_of(subject))
    }


def _within(folder: Path, path: Path) -> str:
    """A file's path relative to the results folder if it is inside it, else its absolute path."""
    root, path = folder.resolve(), path.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _write_scores(folder: Path, images: pd.DataFrame, subjects: pd.DataFrame, summary: dict[str, Any]) -> None:
    images["file"] = [_within(folder, Path(name)) for name in images["file"]]
    with atomic_write(folder / "scores.parquet") as temporary:
        images.reset_index(drop=True).to_parquet(temporary, index=False)
    write_text(folder / "subjects.csv", subjects.to_csv(index=False))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
