"""Score the collected images of a benchmark run under each protocol, and write the tables."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from data.benchmark import Benchmark
from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.errors import InputError
from eval.benchmark.checks import total_steps
from eval.benchmark.collect import ByStep, collect
from eval.benchmark.plan import Plan
from eval.benchmark.results import LpipsScores, SubjectImages, mean, score_subject, summarize
from eval.metrics.embedding import embed
from eval.metrics.encoders import Encoders, load_encoders
from eval.metrics.lpips import Perceptual, perceptual_scores
from eval.metrics.pairing import is_black, is_selected_by_name
from eval.metrics.protocols import IDENTIFIERS, PROTOCOLS
from eval.metrics.scores import without_identifier

if TYPE_CHECKING:
    from accelerate import Accelerator

Features = dict[str, dict[Path, Tensor]]
"""Unit features by encoder (``dino``, ``clip``) and file."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that score: the encoders by protocol, and the LPIPS network unless it is disabled."""

    encoders: dict[str, Encoders]
    perceptual: Perceptual | None


@dataclasses.dataclass(frozen=True)
class Scored:
    """The tables of one protocol and training step: a row per image, and per subject and seed."""

    images: pd.DataFrame
    subjects: pd.DataFrame


def load_models(options: argparse.Namespace, device: torch.device | str) -> Models:
    """The models that the options ask for. Protocols with the same encoders share them.

    Raises:
        InputError: a model cannot be loaded.
    """
    encoders: dict[str, Encoders] = {}
    for name in options.protocol:
        same = next((other for other in encoders if PROTOCOLS[other].same_encoders(PROTOCOLS[name])), None)
        if same is not None:
            encoders[name] = encoders[same]
        else:
            encoders[name] = load_encoders(PROTOCOLS[name], options.dino, options.clip, device, options.precision)
    return Models(encoders, None if options.lpips == "none" else Perceptual(options.lpips, device))


def describe_encoders(encoders: Encoders) -> dict[str, str]:
    """Names, preprocessing and identity of the encoders, for the summary."""
    names = {"dino": encoders.dino_name, "clip": encoders.clip_name}
    transforms = {f"{key}_transform": str(encoder.transform) for key, encoder in encoders.by_key().items()}
    return names | transforms | {f"{key}_identity": encoder.identity for key, encoder in encoders.by_key().items()}


def score(
    plan: Plan, options: argparse.Namespace, accelerator: "Accelerator", failed: dict[str, str], models: Models
) -> dict[str, Any] | None:
    """Compute features on every process, then the scores on the first; None on the others.

    With several training steps, the scores are those of the step with the highest mean of ``--keep_best_by`` over all
    subjects and seeds under the first protocol. OFT's script, too, scores all subjects at one step.

    Raises:
        InputError: no subject could be scored.
    """
    collected = collect(plan, options, failed)
    features = encode(plan, options, accelerator, collected, failed, models)
    if features is None:
        return None
    paired = {
        name: {step: pair_as_oft(of_step) for step, of_step in collected.items()}
        if PROTOCOLS[name].pairs_by_name
        else collected
        for name in models.encoders
    }
    best, means = None, {}
    if len(collected) > 1:
        means = {
            step: {
                name: _means(score_protocol(plan.benchmark, paired[name][step], name, features[name], encoders))
                for name, encoders in models.encoders.items()
            }
            for step in collected
        }
        best = max(means, key=lambda step: means[step][options.protocol[0]][options.keep_best_by])
    summary: dict[str, Any] = {"benchmark": plan.benchmark.name, "method": plan.settings["method"], "failed": failed}
    summary["references"] = {name: [_within(plan.folder, p) for p in paths] for name, paths in plan.photographs.items()}
    if means:
        last = total_steps(plan.settings)
        summary |= {"step": best or last, "kept_best_by": options.keep_best_by}
        summary["steps"] = {
            name: {str(step or last): by_protocol[name] for step, by_protocol in means.items()}
            for name in models.encoders
        }
    lpips = LpipsCache(models.perceptual)
    tables = {
        name: score_protocol(plan.benchmark, paired[name][best], name, features[name], encoders, lpips)
        for name, encoders in models.encoders.items()
    }
    summary["protocols"] = {
        name: summarize(tables[name].subjects, tables[name].images)
        | {
            "source": PROTOCOLS[name].source,
            "models": describe_encoders(encoders) | {"lpips": options.lpips, "precision": options.precision},
        }
        for name, encoders in models.encoders.items()
    }
    write_scores(plan.folder, list(tables.values()), summary)
    return summary


def encode(
    plan: Plan,
    options: argparse.Namespace,
    accelerator: "Accelerator",
    collected: ByStep,
    failed: dict[str, str],
    models: Models,
) -> dict[str, Features] | None:
    """The features of all files by protocol, on the first process; every process encodes a share of them.

    Subjects with an image that cannot be read are added to ``failed`` and removed from every step.

    Raises:
        InputError: no subject is left.
    """
    settings: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers}
    settings["cache_dir"] = plan.folder / "embeddings"
    unique = {id(encoders): encoders for encoders in models.encoders.values()}
    everything = [images for of_step in collected.values() for images in of_step]
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    for encoders in unique.values():
        files = list(dict.fromkeys(path for images in everything for path in images.files()))[share]
        with contextlib.suppress(InputError):  # the first process reports it, with the subject it belongs to
            embed(files, encoders.by_key(), **settings)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    features: dict[int, Features] = {key: {"dino": {}, "clip": {}} for key in unique}
    unreadable = set()
    for images in everything:
        files = images.files()
        try:
            by_encoders = {key: embed(files, encoders.by_key(), **settings) for key, encoders in unique.items()}
        except InputError as error:
            failed[str(plan.folder / f"seed-{images.seed}" / images.subject)] = str(error)
            unreadable.add((images.subject, images.seed))
            continue
        for key, by_key in by_encoders.items():
            for encoder, vectors in by_key.items():
                features[key][encoder].update(zip(files, vectors))
    for step, of_step in collected.items():
        collected[step] = [images for images in of_step if (images.subject, images.seed) not in unreadable]
    if not all(collected.values()):
        problem = next(iter(failed.values()), "nothing was generated")
        raise InputError(f"no subject could be scored; the first problem: {problem}")
    return {name: features[id(encoders)] for name, encoders in models.encoders.items()}


class LpipsCache:
    """LPIPS of the images of each subject, computed once for all protocols.

    Args:
        perceptual: the network; None if LPIPS is not measured.
    """

    def __init__(self, perceptual: Perceptual | None):
        self.perceptual = perceptual
        self._known: dict[tuple[Any, ...], LpipsScores] = {}

    def scores(self, images: SubjectImages) -> LpipsScores | None:
        """See ``perceptual_scores``."""
        if self.perceptual is None:
            return None
        groups = [[images.images[i] for i in group] for group in images.groups()]
        key = (*images.images, *images.others)
        if key not in self._known:
            self._known[key] = perceptual_scores(self.perceptual, groups, images.references, images.others)
        return self._known[key]


def score_protocol(
    benchmark: Benchmark,
    collected: Sequence[SubjectImages],
    protocol: str,
    features: Features,
    encoders: Encoders,
    lpips: LpipsCache | None = None,
) -> Scored:
    """The tables of one protocol.

    Args:
        collected: the images of all subjects and seeds. lpips: None to leave LPIPS out.
    """
    prompts = list(dict.fromkeys(prompt for images in collected for prompt in images.prompts))
    texts = dict(zip(prompts, encoders.clip.encode_texts(prompts).cpu()))
    lpips = lpips or LpipsCache(None)
    scored = [
        score_subject(images, features["dino"], features["clip"], texts, lpips.scores(images)) for images in collected
    ]
    images = pd.concat([table for table, _ in scored], ignore_index=True)
    images.insert(0, "protocol", protocol)
    templates = _templates(benchmark)
    images["template"] = [templates[s, p] for s, p in zip(images["subject"], images["prompt"])]
    subjects = pd.DataFrame([row for _, row in scored])
    subjects.insert(0, "protocol", protocol)
    return Scored(images, subjects)


def pair_as_oft(collected: Sequence[SubjectImages]) -> list[SubjectImages]:
    """The images as OFT's script pairs them (see ``eval.metrics.pairing``), without subjects that have black ones only.

    Raises:
        InputError: all images are black.
    """
    visible = [images.without({path for path in images.images if is_black(path)}) for images in collected]
    visible = [images for images in visible if images.images]
    if not visible:
        raise InputError("all images are black, so protocol oft has nothing to score; use protocol delora.")
    paired = []
    for images in visible:
        others = [
            path
            for other in visible
            if other.seed == images.seed and other.subject != images.subject
            if is_selected_by_name(images.subject, other.subject)
            for path in other.images
        ]
        paired.append(dataclasses.replace(images, others=others))
    return paired


def _means(scored: Scored) -> dict[str, float]:
    """The means of the scores over all pairs (or images) of all subjects and seeds."""
    return {name: mean(scored.subjects, name) for name in ("dino", "clip_i", "clip_t")}


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


def write_scores(folder: Path, tables: Sequence[Scored], summary: dict[str, Any]) -> None:
    """Write ``scores.parquet``, ``subjects.csv`` and ``summary.json`` of all protocols."""
    images = pd.concat([scored.images for scored in tables])
    images["file"] = [_within(folder, Path(name)) for name in images["file"]]
    with atomic_write(folder / "scores.parquet") as temporary:
        images.reset_index(drop=True).to_parquet(temporary, index=False)
    subjects = pd.concat([scored.subjects for scored in tables])
    if "step" in summary:
        subjects["step"] = summary["step"]
    write_text(folder / "subjects.csv", subjects.to_csv(index=False))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
