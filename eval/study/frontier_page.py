"""The page of the study ``frontier``: a plot in which every point shows its images, as one HTML file.

Its markup is in ``eval/templates/frontier.html.j2``. The thumbnails are kept beside the rows, one sheet per method, so
that the page can be written again without the runs.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image, ImageOps

from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from delora_diffusers.text_files import read_json
from eval.metrics.generated import by_prompt, read_generated
from eval.study.frontier_analysis import Analysis, Result
from eval.study.frontier_figure import STYLES, limits
from eval.study.frontier_settings import BASE
from eval.study.frontier_words import in_words
from eval.study.trials import Trial
from eval.templates import render_template, template_file

SIDE, PAIRS_PER_ROW = 112, 6
"""Side length of a thumbnail in pixels, and how many points a sheet has in a row; each point has two thumbnails."""
PHOTOS = "photos"
TITLE = "Subject fidelity against prompt fidelity"


def pictured(trial: Trial) -> list[tuple[str, str]]:
    """The (subject, prompt) of both images of every point."""
    benchmark = trial.plan.benchmark
    first, second = benchmark.subjects[0], benchmark.subjects[:2][-1]
    return [(first.name, benchmark.prompts_of(first)[:2][-1]), (second.name, benchmark.prompts_of(second)[-1])]


def write_thumbnails(folder: Path, rows: pd.DataFrame, trials: Sequence[Trial]) -> None:
    """A sheet of thumbnails per method, ``KEY.webp``, one of photos, and what they show, ``shown.json``.

    Args:
        rows: of the study; the column ``thumbnail`` numbers the points of each method.
    """
    by_run = {trial.plan.folder.name: trial for trial in trials}
    shown = pictured(trials[0])
    folder.mkdir(parents=True, exist_ok=True)
    points = rows.drop_duplicates(["key", "run", "strength"])
    for key, of_method in points.groupby("key", sort=False):
        cells: list[Path | None] = [None] * (2 * len(of_method))
        for record in of_method.to_dict("records"):
            trial, strength = by_run[record["run"]], 1.0 if record["key"] == BASE else record["strength"]
            start = 2 * record["thumbnail"]
            cells[start : start + 2] = [_image_of(trial, strength, *which) for which in shown]
        _write_sheet(folder / f"{key}.webp", cells)
    photographs = trials[0].plan.photographs
    _write_sheet(folder / f"{PHOTOS}.webp", [photographs[subject][0] for subject, _ in shown])
    write_text(folder / "shown.json", json.dumps(shown) + "\n")


def _image_of(trial: Trial, strength: float, subject: str, prompt: str) -> Path | None:
    """The first image of a prompt with the first seed; None if there is none."""
    plan = trial.plan
    found = next(s for s in plan.benchmark.subjects if s.name == subject)
    try:
        images = by_prompt(read_generated(plan.images_folder(found, 0, None, strength)))
    except InputError:
        return None
    return next(iter(images.get(prompt, [])), None)


def _write_sheet(file: Path, cells: Sequence[Path | None]) -> None:
    columns = min(2 * PAIRS_PER_ROW, len(cells))
    sheet = Image.new("RGB", (columns * SIDE, -(-len(cells) // columns) * SIDE), "white")
    for number, path in enumerate(cells):
        if path is not None:
            image = ImageOps.fit(load_rgb(path), (SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(image, (number % columns * SIDE, number // columns * SIDE))
    with atomic_write(file) as temporary:
        sheet.save(temporary, format="WEBP", quality=80)


def write(file: Path, analysis: Analysis, images: Path, tables: Sequence[Any]) -> None:
    """Write the page.

    Args:
        images: folder of ``write_thumbnails``; without it the page has no images.
    """
    write_text(file, render(analysis, images, tables))


def render(analysis: Analysis, images: Path, tables: Sequence[Any]) -> str:
    """The text of the page."""
    shown = read_json(images / "shown.json") if (images / "shown.json").is_file() else []
    series = [_series(result) for result in analysis.results]
    (left, _), (bottom, _) = limits(analysis, analysis.results)
    data = {
        "left": left,
        "bottom": bottom,
        "series": series,
        "base": {"x": analysis.base, "y": analysis.base_dino},
        "target": analysis.target,
        "hasDrift": analysis.has_drift,
    }
    return render_template(
        "frontier.html.j2",
        title=TITLE,
        analysis=analysis,
        data=data,
        shown=shown,
        tables=tables,
        sheets=[_sheet(images, key) for key in [*(s["key"] for s in series), BASE, PHOTOS] if shown],
        series=series,
        css=Markup(template_file("report.css")),
        script=Markup(template_file("frontier.js")),
    )


def _sheet(images: Path, key: str) -> dict[str, Any]:
    """The CSS class of a sheet, its size in thumbnails and the sheet as a data URI."""
    file = images / f"{key}.webp"
    if not file.is_file():
        return {"css_class": f"s-{key}", "columns": 1, "rows": 1, "sheet": "data:,"}
    with Image.open(file) as sheet:
        columns, rows = (side // SIDE for side in sheet.size)
    uri = f"data:image/webp;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"css_class": f"s-{key}", "columns": columns, "rows": rows, "sheet": uri}


def _series(result: Result) -> dict[str, Any]:
    """A method as data for the plot; its last point is the base model."""
    scores, (colour, line) = result.scores, STYLES[result.scores.key]
    points = []
    for number, record in enumerate(scores.points.to_dict("records")):
        x, y, drift = (float(a[number].mean()) for a in (scores.clip_t, scores.dino, scores.drift))
        points.append(
            {
                "x": x,
                "y": y,
                "drift": drift if np.isfinite(drift) else None,
                "words": in_words(record),
                "sheet": f"s-{record['key']}",
                "cell": int(record["thumbnail"]),
                "isBase": record["key"] == BASE,
            }
        )
    dash = {"-": "", "--": "7 4", "-.": "7 3 2 3"}[line]
    return {"key": scores.key, "label": scores.label, "colour": colour, "dash": dash, "points": points}
