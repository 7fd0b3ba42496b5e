"""From features to the results of a benchmark: a row per image, a row per subject, means and intervals."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eval.metrics.lpips import LpipsScores
from eval.metrics.scores import pair_scores, real_score, text_scores

SCORES = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "lpips": "LPIPS to photos",
    "lpips_diversity": "LPIPS diversity",
    "dino_diversity": "DINO diversity",
    "drift": "drift",
}
"""Titles of the scores, by column of the tables."""

EXPLAINED = {
    "dino": "subject fidelity, the mean cosine over all (reference, generated) pairs",
    "clip_i": "the same with CLIP features",
    "clip_t": "prompt fidelity, the mean cosine of an image and its prompt without the identifier",
    "lpips": "mean LPIPS distance over all (reference, generated) pairs, as reported by OFT and ETHER",
    "lpips_diversity": "mean LPIPS distance between the images of one prompt, as reported by DreamBooth",
    "dino_diversity": "1 - mean DINO cosine between the images of one prompt",
    "drift": "1 - mean DINO cosine of an image and the base model's image for the same prompt and seed, for prompts "
    "without the subject",
}

REAL = {"real_dino": "dino", "real_clip_i": "clip_i"}
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class SubjectImages:
    """The generated images of one subject and one seed.

    Attributes:
        prompts: of each image, without the identifier; images of one prompt are adjacent.
        drift: (image, the base model's image) for prompts without the subject.
        others: images of other subjects that a protocol compares with this subject's photos too.
    """

    subject: str
    class_name: str
    seed: int
    images: Sequence[Path]
    prompts: Sequence[str]
    references: Sequence[Path]
    drift: Sequence[tuple[Path, Path]] = ()
    others: Sequence[Path] = ()

    def without(self, excluded: Collection[Path]) -> "SubjectImages":
        """The same without these images."""
        kept = [(path, prompt) for path, prompt in zip(self.images, self.prompts) if path not in excluded]
        return dataclasses.replace(self, images=[path for path, _ in kept], prompts=[prompt for _, prompt in kept])

    def files(self) -> list[Path]:
        return [*self.images, *self.references, *(path for pair in self.drift for path in pair)]

    def groups(self) -> list[list[int]]:
        """Indices of the images of each prompt."""
        indices: dict[str, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            indices.setdefault(prompt, []).append(index)
        return list(indices.values())


Features = dict[Path, Tensor]


def score_subject(
    images: SubjectImages, dino: Features, clip: Features, texts: dict[str, Tensor], lpips: LpipsScores | None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row per image, and the row of the subject.

    Args:
        images: the images to score.
        dino, clip: unit features of every file. texts: unit features of every prompt.
        lpips: the LPIPS scores of the groups, if they are measured.
    """

    def stacked(features: Features, paths: Sequence[Path]) -> Tensor:
        return torch.stack([features[path] for path in paths])

    def compared(features: Features) -> np.ndarray:
        """The score of each image, and of the other subjects' images that are compared with the photos."""
        return pair_scores(stacked(features, [*images.images, *images.others]), stacked(features, references)).numpy()

    groups, references, own = images.groups(), images.references, len(images.images)
    dino_features, clip_features = stacked(dino, images.images), stacked(clip, images.images)
    dino_scores, clip_scores = compared(dino), compared(clip)
    columns: dict[str, Any] = {
        "subject": images.subject,
        "class": images.class_name,
        "seed": images.seed,
        "prompt": list(images.prompts),
        "image": 0,
        "file": [path.as_posix() for path in images.images],
        "dino": dino_scores[:own],
        "clip_i": clip_scores[:own],
        "clip_t": text_scores(clip_features, torch.stack([texts[prompt] for prompt in images.prompts])).numpy(),
    }
    rows = pd.DataFrame(columns)
    for group in groups:
        rows.loc[group, "image"] = range(len(group))
    summary: dict[str, Any] = {
        "subject": images.subject,
        "class": images.class_name,
        "seed": images.seed,
        "pictures": len(rows),
        "references": len(references),
        "dino": float(dino_scores.mean()),
        "clip_i": float(clip_scores.mean()),
        "clip_t": float(rows["clip_t"].mean()),
        "real_dino": real_score(stacked(dino, references)),
        "real_clip_i": real_score(stacked(clip, references)),
    }
    if images.others:
        summary["compared"] = len(dino_scores)
    dino_diversity = [1 - cosine for group in groups if (cosine := real_score(dino_features[group])) is not None]
    summary["dino_diversity"] = float(np.mean(dino_diversity)) if dino_diversity else None
    if lpips is not None:
        for group, values in zip(groups, lpips.to_photos):
            rows.loc[group, "lpips"] = values.numpy().astype(float)
        summary["lpips"] = float(torch.cat([*lpips.to_photos, lpips.of_others]).double().mean())
        defined = [value for value in lpips.diversity if value is not None]
        summary["lpips_diversity"] = float(np.mean(defined)) if defined else None
    if images.drift:
        adapted, base = (stacked(dino, paths).double() for paths in zip(*images.drift))
        summary["drift"] = 1 - float((adapted * base).sum(dim=1).mean())
    return rows, summary


def _weights(subjects: pd.DataFrame, name: str) -> pd.Series:
    """The weight of each row: the number of pairs or images that its score is a mean over."""
    if name in REAL:
        return subjects["references"] * (subjects["references"] - 1)
    if name in ("dino", "clip_i", "lpips"):
        compared = subjects["pictures"]
        if "compared" in subjects:  # more than the subject's own images
            compared = subjects["compared"].fillna(compared)
        return compared * subjects["references"]
    return subjects["pictures"]


def mean(subjects: pd.DataFrame, name: str) -> float:
    """The mean of a score that every row has, over all pairs (or images) of all subjects."""
    weights = _weights(subjects, name)
    return float((weights * subjects[name]).sum() / weights.sum())


def mean_and_interval(subjects: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """Mean over all pairs (or images) of all subjects, and its 95% bootstrap interval over subjects.

    Args:
        subjects: the rows of ``score_subject``; the rows of a subject, one per seed, are resampled together.
        name: column of the score.
    """
    if name not in subjects or subjects[name].isna().all():
        return None
    weighted = pd.DataFrame({"subject": subjects["subject"], "w": _weights(subjects, name).astype(float)})
    weighted["wx"] = weighted["w"] * subjects[name]
    sums = weighted[subjects[name].notna()].groupby("subject")[["w", "wx"]].sum().to_numpy()
    low, high = bootstrap_interval(sums[:, 0], sums[:, 1])
    return {"mean": float(sums[:, 1].sum() / sums[:, 0].sum()), "low": low, "high": high}


def bootstrap_interval(weights: np.ndarray, weighted: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval of ``sum(weighted) / sum(weights)`` over the entries."""
    count = len(weights)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.quantile(draws @ weighted / (draws @ weights), [0.025, 0.975])
    return float(low), float(high)


def summarize(subjects: pd.DataFrame, images: pd.DataFrame) -> dict[str, Any]:
    """The results of a run under one protocol."""
    scores = {name: score for name in SCORES if (score := mean_and_interval(subjects, name)) is not None}
    real = {REAL[name]: score for name in REAL if (score := mean_and_interval(subjects, name)) is not None}
    by_seed = {
        str(seed): {name: score["mean"] for name in scores if (score := mean_and_interval(rows, name)) is not None}
        for seed, rows in subjects.groupby("seed")
    }
    by_prompt = images.groupby("template", sort=False)[["dino", "clip_i", "clip_t"]].mean()
    return {
        "scores": scores,
        "real": real,
        "by_seed": by_seed,
        "by_prompt": {str(prompt): row.to_dict() for prompt, row in by_prompt.iterrows()},
        "counts": {
            "subjects": int(subjects["subject"].nunique()),
            "seeds": int(subjects["seed"].nunique()),
            "pictures": len(images),
            "references": int(subjects.drop_duplicates("subject")["references"].sum()),
            "pairs": int(_weights(subjects, "dino").sum()),
        },
    }


def paired_differences(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By score, the mean difference (first - second) over the subjects in both, its 95% interval, and counts."""
    differences = {}
    for name in SCORES:
        if name not in first or name not in second:
            continue
        means: list[Any] = [rows.groupby("subject")[name].mean() for rows in (first, second)]
        difference = (means[0] - means[1]).dropna()
        if len(difference):
            low, high = bootstrap_interval(np.ones(len(difference)), difference.to_numpy())
            differences[name] = {
                "mean": float(difference.mean()),
                "low": low,
                "high": high,
                "higher": int((difference > 0).sum()),
                "subjects": len(difference),
            }
    return differences
