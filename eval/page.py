"""One page about one subject: its photos, images before and after training, the scores, the training curves."""

import dataclasses
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from delora_diffusers.names import CONFIG_NAME
from eval.templates import data_uri, render_template

SIDE = 256
"""Longest side in pixels of the images in the page."""
SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
CURVES = {"loss": "loss", "distance/mean": "distance |W' - W|", "lambda/mean": "boundary λ"}
PHOTOS_SHOWN = 6
"""Number of photos in the PNG."""

Curves = dict[str, tuple[list[int], list[float]]]
"""(steps, values) by tag."""


def read_curves(training_dir: Path | None) -> Curves:
    """The curves in ``CURVES`` that the tensorboard logs in a folder contain.

    Raises:
        InputError: the folder does not exist, or is not that of a run.
    """
    if training_dir is None:
        return {}
    if not training_dir.is_dir():
        raise InputError(f"--training_dir {training_dir} is not a folder; give the output folder of a training run.")
    logs = sorted({file.parent for file in training_dir.glob("**/events.out.tfevents.*")})
    if not logs and not (training_dir / CONFIG_NAME).is_file():
        raise InputError(f"--training_dir {training_dir} is not the output folder of a training run; give one.")
    curves: Curves = {}
    for folder in logs:
        events = EventAccumulator(str(folder)).Reload()
        for tag in CURVES.keys() & set(events.Tags()["scalars"]):
            points = events.Scalars(tag)
            curves[tag] = ([point.step for point in points], [point.value for point in points])
    return {tag: curves[tag] for tag in CURVES if tag in curves}


def common_start(prompts: list[str]) -> str:
    """The words that all prompts start with."""
    columns = zip(*(prompt.split() for prompt in prompts))
    return " ".join(words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, columns))


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        before, after: images by prompt, of the base model and with the adapter.
        scores_before, scores_after: of ``metrics.subjects.score_subject``.
    """

    photos: list[Path]
    before: dict[str, list[Path]]
    after: dict[str, list[Path]]
    scores_before: dict[str, Any]
    scores_after: dict[str, Any]
    curves: Curves

    @property
    def title(self) -> str:
        return f"Before and after: {common_start(list(self.after)) or 'training'}"

    def score_rows(self) -> list[tuple[str, list[str]]]:
        """(label, one cell per score) of the base model, the adapter and real images."""
        rows = (
            ("base model", self.scores_before["scores"]),
            ("with the adapter", self.scores_after["scores"]),
            ("real images", self.scores_after["real"]),
        )
        return [(label, [_cell(scores.get(name)) for name in SCORES]) for label, scores in rows]

    def html(self) -> str:
        """The page as a single HTML file."""
        prompts = [
            (prompt, [[_embedded(path) for path in images] for images in (self.before.get(prompt, []), after)])
            for prompt, after in self.after.items()
        ]
        return render_template(
            "page.html.j2",
            title=self.title,
            photos=[(path.name, _embedded(path)) for path in self.photos],
            names=list(SCORES.values()),
            scores=self.score_rows(),
            prompts=prompts,
            curves=self._curves_uri() if self.curves else None,
        )

    def _curves_uri(self) -> str:
        figure = Figure(figsize=(9, 2.2), dpi=110, facecolor="#fafaf8", layout="constrained")
        plot_curves(figure.subplots(1, len(self.curves), squeeze=False)[0], self.curves)
        return data_uri(Image.open(io.BytesIO(_png(figure))), "PNG")

    def png(self) -> bytes:
        """The page as one image: photos at the top, generated images on the left, scores and curves on the right."""
        per_prompt = max(len(images) for images in self.after.values())
        columns, rows = 2 * per_prompt, len(self.after)
        width, height = 1.5 * (columns + 4), 1.5 * (rows + 1.25) + 0.4
        figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
        figure.suptitle(self.title, fontsize=13, x=0.02, ha="left", y=1 - 0.1 / height, va="top", parse_math=False)
        grid = figure.add_gridspec(
            1 + rows, columns, left=0.02, right=columns / (columns + 4), top=1 - 0.5 / height, bottom=0.01, hspace=0.22
        )
        top = grid[0, :].subgridspec(1, max(columns, min(len(self.photos), PHOTOS_SHOWN)))
        for number, path in enumerate(self.photos[: top.ncols]):
            _show(figure, top[0, number], path, "photos" if number == 0 else "")
        for row, (prompt, images) in enumerate(self.after.items(), 1):
            for number, path in enumerate(self.before.get(prompt, [])[:per_prompt]):
                _show(figure, grid[row, number], path, f"{prompt}: before" if number == 0 else "")
            for number, path in enumerate(images):
                _show(figure, grid[row, per_prompt + number], path, "after" if number == 0 else "")
        side = figure.add_gridspec(
            1 + len(self.curves),
            1,
            left=(columns + 0.5) / (columns + 4),
            right=0.97,
            top=1 - 0.6 / height,
            bottom=0.07,
            hspace=0.7,
        )
        self._add_scores(figure.add_subplot(side[0]))
        plot_curves([figure.add_subplot(side[1 + i]) for i in range(len(self.curves))], self.curves)
        return _png(figure)

    def _add_scores(self, axis: Axes) -> None:
        rows = self.score_rows()
        axis.axis("off")
        table = axis.table(
            [cells for _, cells in rows],
            rowLabels=[label for label, _ in rows],
            colLabels=list(SCORES.values()),
            loc="center right",
            edges="open",
            colWidths=[0.2] * len(SCORES),
        )
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.scale(1, 1.5)


def plot_curves(axes: Iterable[Axes], curves: Curves) -> None:
    """Plot one curve per axis."""
    for axis, (tag, (steps, values)) in zip(axes, curves.items()):
        axis.plot(steps, values, color="#c0392b" if tag == "loss" else "#2c3e50", linewidth=1.6)
        axis.set_title(CURVES[tag], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _embedded(path: Path) -> str:
    image = load_rgb(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "PNG")


def _show(figure: Figure, cell: SubplotSpec, path: Path, label: str) -> None:
    axis = figure.add_subplot(cell)
    axis.imshow(load_rgb(path).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    axis.set_title(label, fontsize=8, loc="left", pad=3, parse_math=False)
    axis.axis("off")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
