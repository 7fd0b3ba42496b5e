"""Collect the images of a benchmark run: which to score, of which subject, with which prompts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.benchmark import Benchmark, Subject
from delora_diffusers.errors import InputError
from eval.benchmark.plan import Plan
from eval.benchmark.results import SubjectImages
from eval.metrics.generated import Generated, by_prompt, read_generated
from eval.metrics.protocols import IDENTIFIERS
from eval.metrics.scores import without_identifier

ByStep = dict[int | None, list[SubjectImages]]
"""The images of all subjects and seeds, by the training step after which they were generated; None is the last."""


def collect(plan: Plan, options: argparse.Namespace, failed: dict[str, str], strength: float = 1.0) -> ByStep:
    """The images to score. Subjects whose images are incomplete at some step are added to ``failed``."""
    words = [*IDENTIFIERS, plan.benchmark.identifier]
    given: Path | None = options.generated_dir
    collected: ByStep = {step: [] for step in plan.steps}
    for seed in plan.seeds:
        base = {}
        if plan.measures_drift() and str(plan.base_folder(seed)) not in failed:
            base = by_prompt(read_generated(plan.base_folder(seed) / "pictures"))
        for subject in plan.benchmark.subjects:
            folder = plan.subject_folder(subject, seed)
            if str(folder) in failed:
                continue
            folders = {step: plan.images_folder(subject, seed, step, strength) for step in plan.steps}
            if given is not None:
                folders = {None: given / subject.name}
            try:
                of_subject = {step: _collect_one(plan, subject, seed, f, base, words) for step, f in folders.items()}
            except InputError as error:
                failed[str(folder)] = str(error)
                continue
            for step, images in of_subject.items():
                collected[step].append(images)
    return collected


def _collect_one(
    plan: Plan, subject: Subject, seed: int, folder: Path, base: dict[str, list[Path]], words: Sequence[str]
) -> SubjectImages:
    """The images of one subject, seed and step.

    Args:
        base: the base model's images by prompt, for the drift. words: identifiers to remove from the prompts.

    Raises:
        InputError: images are missing.
    """
    generated = [(path, without_identifier(prompt, words)) for path, prompt in read_generated(folder)]
    images = by_prompt(generated)
    scored = _images_of(plan.benchmark, subject, images, words)
    drift = [
        pair
        for prompt in plan.benchmark.drift_prompts_of(subject)
        if prompt in base
        for pair in zip(images[without_identifier(prompt, words)], base[prompt])
    ]
    paths, prompts = [path for path, _ in scored], [prompt for _, prompt in scored]
    return SubjectImages(subject.name, subject.class_name, seed, paths, prompts, plan.photographs[subject.name], drift)


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
