"""From features to the numbers of a benchmark: a row for each picture, a row for each subject, means and intervals."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eval.metrics.scores import pair_scores, real_score, text_scores

SCORES = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "lpips": "LPIPS to photographs",
    "lpips_diversity": "LPIPS diversity",
    "dino_diversity": "DINO diversity",
    "drift": "drift",
}
"""What a benchmark reports, by the name of its column."""

EXPLAINED = {
    "dino": "mean cosine of all (photograph, picture) pairs; likeness to the subject",
    "clip_i": "the same by CLIP",
    "clip_t": "cosine of a picture and its prompt without the identifier",
    "lpips": "mean LPIPS distance of all (photograph, picture) pairs, as OFT and ETHER report it",
    "lpips_diversity": "mean LPIPS distance of the pictures of one prompt to one another, as DreamBooth reports it",
    "dino_diversity": "1 - mean DINO cosine of the pictures of one prompt with one another",
    "drift": "1 - mean DINO cosine with the base model's picture of the same seed, for prompts without the subject",
}

REAL = {"real_dino": "dino", "real_clip_i": "clip_i"}
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class SubjectImages:
    """The generated images of one subject and one seed.

    Attributes:
        prompts: of each image, without the identifier; those of one prompt are together.
        drift: (image, the base model's image) of prompts without the subject.
    """

    subject: str
    class_name: str
    seed: int
    images: Sequence[Path]
    prompts: Sequence[str]
    references: Sequence[Path]
    drift: Sequence[tuple[Path, Path]] = ()

    def files(self) -> list[Path]:
        return [*self.images, *self.references, *(path for pair in self.drift for path in pair)]

    def groups(self) -> list[list[int]]:
        """Indices of the pictures of each prompt."""
        found: dict[str, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            found.setdefault(prompt, []).append(index)
        return list(found.values())


Features = dict[Path, Tensor]
Perceived = tuple[list[Tensor], list[float | None]]


def score_subject(
    images: SubjectImages, dino: Features, clip: Features, texts: dict[str, Tensor], perceived: Perceived | None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row for each picture, and the subject's own row.

    Args:
        images: what is scored.
        dino: unit features of every file. clip: the same by CLIP. texts: unit features of every prompt.
        perceived: see ``perceptual_scores``.
    """

    def stacked(features: Features, paths: Sequence[Path]) -> Tensor:
        return torch.stack([features[path] for path in paths])

    groups, references = images.groups(), images.references
    of_dino, of_clip = stacked(dino, images.images), stacked(clip, images.images)
    columns: dict[str, Any] = {
        "subject": images.subject,
        "class": images.class_name,
        "seed": images.seed,
        "prompt": list(images.prompts),
        "image": 0,
        "file": [path.as_posix() for path in images.images],
        "dino": pair_scores(of_dino, stacked(dino, references)).numpy(),
        "clip_i": pair_scores(of_clip, stacked(clip, references)).numpy(),
        "clip_t": text_scores(of_clip, torch.stack([texts[prompt] for prompt in images.prompts])).numpy(),
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
        **{name: float(rows[name].mean()) for name in ("dino", "clip_i", "clip_t")},
        "real_dino": real_score(stacked(dino, references)),
        "real_clip_i": real_score(stacked(clip, references)),
    }
    among = [1 - value for group in groups if (value := real_score(of_dino[group])) is not None]
    summary["dino_diversity"] = float(np.mean(among)) if among else None
    if perceived is not None:
        likeness, diversity = perceived
        for group, values in zip(groups, likeness):
            rows.loc[group, "lpips"] = values.numpy().astype(float)
        summary["lpips"] = float(rows["lpips"].mean())
        apart = [value for value in diversity if value is not None]
        summary["lpips_diversity"] = float(np.mean(apart)) if apart else None
    if images.drift:
        ours, base = (stacked(dino, paths).double() for paths in zip(*images.drift))
        summary["drift"] = 1 - float((ours * base).sum(dim=1).mean())
    return rows, summary


def _weights(subjects: pd.DataFrame, name: str) -> pd.Series:
    """How much each subject counts: the pairs or the pictures that its number is a mean of."""
    if name in REAL:
        return subjects["references"] * (subjects["references"] - 1)
    if name in ("dino", "clip_i", "lpips"):
        return subjects["pictures"] * subjects["references"]
    return subjects["pictures"]


def mean_and_interval(subjects: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """Mean over all pairs (or pictures) of all subjects, and its bootstrap 95% interval over subjects.

    Args:
        subjects: rows of ``score``; the rows of one subject, one for each seed, stay together.
        name: a column of scores.
    """
    if name not in subjects or subjects[name].isna().all():
        return None
    weighted = pd.DataFrame({"subject": subjects["subject"], "w": _weights(subjects, name).astype(float)})
    weighted["wx"] = weighted["w"] * subjects[name]
    sums = weighted[subjects[name].notna()].groupby("subject")[["w", "wx"]].sum().to_numpy()
    low, high = bootstrap_interval(sums[:, 0], sums[:, 1])
    return {"mean": float(sums[:, 1].sum() / sums[:, 0].sum()), "low": low, "high": high}


def bootstrap_interval(weights: np.ndarray, weighted: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of ``sum(weighted) / sum(weights)`` over the entries."""
    count = len(weights)
    chosen = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.quantile(chosen @ weighted / (chosen @ weights), [0.025, 0.975])
    return float(low), float(high)


def summarize(subjects: pd.DataFrame, pictures: pd.DataFrame) -> dict[str, Any]:
    """What one protocol says of a whole run."""
    scores = {name: found for name in SCORES if (found := mean_and_interval(subjects, name)) is not None}
    real = {REAL[name]: found for name in REAL if (found := mean_and_interval(subjects, name)) is not None}
    by_seed = {
        str(seed): {name: found["mean"] for name in scores if (found := mean_and_interval(rows, name)) is not None}
        for seed, rows in subjects.groupby("seed")
    }
    by_prompt = pictures.groupby("template", sort=False)[["dino", "clip_i", "clip_t"]].mean()
    return {
        "scores": scores,
        "real": real,
        "by_seed": by_seed,
        "by_prompt": {str(prompt): row.to_dict() for prompt, row in by_prompt.iterrows()},
        "counts": {
            "subjects": int(subjects["subject"].nunique()),
            "seeds": int(subjects["seed"].nunique()),
            "pictures": len(pictures),
            "references": int(subjects.drop_duplicates("subject")["references"].sum()),
            "pairs": int((subjects["pictures"] * subjects["references"]).sum()),
        },
    }


def paired_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By score, the mean difference (ours - theirs) over the subjects that both have, its 95% interval, and counts."""
    found = {}
    for name in SCORES:
        if name not in ours or name not in theirs:
            continue
        means: list[Any] = [rows.groupby("subject")[name].mean() for rows in (ours, theirs)]
        difference = (means[0] - means[1]).dropna()
        if len(difference):
            low, high = bootstrap_interval(np.ones(len(difference)), difference.to_numpy())
            found[name] = {
                "mean": float(difference.mean()),
                "low": low,
                "high": high,
                "higher": int((difference > 0).sum()),
                "subjects": len(difference),
            }
    return found
