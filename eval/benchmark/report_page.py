"""The contents of the HTML page of a report. Its markup is in ``eval/templates/report.html.j2``."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from delora_diffusers.image_files import load_rgb
from delora_diffusers.wording import counted
from eval.benchmark import tables
from eval.benchmark.results import EXPLAINED, SCORES, paired_differences
from eval.benchmark.results_folder import Run
from eval.templates import data_uri, render_template, template_file

SIDE = 128
"""Side length of a thumbnail in pixels."""
MAX_SHEET = 16_000
"""Side length of a sheet in pixels, just below what WebP allows."""
PICKED = 8
"""How many of the best and worst images of each score are shown."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page; the first ``marked`` rows are the runs themselves."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    marked: int = 0


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A cell of a sheet of thumbnails: its CSS class, column and row, and its label for screen readers."""

    css_class: str
    column: int
    row: int
    label: str


class Sheets:
    """The thumbnails of a run: one sheet per subject, with a row per prompt."""

    def __init__(self, run: Run, index: int, protocol: str):
        self.rows = run.of(run.images, protocol)
        self.subjects = list(dict.fromkeys(self.rows["subject"]))
        self.index, self.folder = index, run.folder
        self.by_prompt: dict[str, list[list[int]]] = {}
        for subject, rows in self.rows.groupby("subject", sort=False):
            groups = rows.groupby("template", sort=False).indices
            self.by_prompt[str(subject)] = [list(rows.index[positions]) for positions in groups.values()]

    def sheet(self, subject: str) -> str:
        """The subject's sheet as a data URI."""
        prompts = self.by_prompt[subject]
        columns = max(map(len, prompts))
        side = min(SIDE, MAX_SHEET // max(len(prompts), columns))
        sheet = Image.new("RGB", (columns * side, len(prompts) * side), "white")
        for row, images in enumerate(prompts):
            for column, index in enumerate(images):
                image = load_rgb(self.folder / self.rows["file"][index])
                sheet.paste(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), (column * side, row * side))
        return data_uri(sheet)

    def styles(self) -> list[dict[str, Any]]:
        """The CSS class of each subject's sheet, its size in thumbnails and the sheet."""
        return [
            {
                "css_class": self._css_class(subject),
                "columns": max(map(len, self.by_prompt[subject])),
                "rows": len(self.by_prompt[subject]),
                "sheet": self.sheet(subject),
            }
            for subject in self.subjects
        ]

    def thumbnail(self, index: int) -> Thumbnail:
        """The thumbnail of image number ``index`` of the table."""
        record = self.rows.loc[index]
        prompts = self.by_prompt[record["subject"]]
        row = next(number for number, images in enumerate(prompts) if index in images)
        scores = f"DINO {record['dino']:.3f}, CLIP-I {record['clip_i']:.3f}, CLIP-T {record['clip_t']:.3f}"
        css_class = self._css_class(record["subject"])
        return Thumbnail(css_class, prompts[row].index(index), row, f"{record['prompt']}: {scores}")

    def _css_class(self, subject: str) -> str:
        return f"r{self.index}s{self.subjects.index(subject)}"


def render(runs: Sequence[Run], protocols: Sequence[str]) -> str:
    """The complete page. Details are shown for the first protocol."""
    first, protocol = runs[0], protocols[0]
    sheets = [Sheets(run, index, protocol) for index, run in enumerate(runs)]
    return render_template(
        "report.html.j2",
        title=f"{first.summary['benchmark']}: {' and '.join(run.label for run in runs)}",
        descriptions=[describe(run) for run in runs],
        failures=[failure for run in runs for failure in run.summary["failed"].items()],
        summaries=[summarize(runs, name) for name in protocols],
        grids=[grid(sheet, run.label if len(runs) > 1 else "") for run, sheet in zip(runs, sheets)],
        distributions=distributions(runs, protocol),
        picks_label=first.label,
        picks=picks(sheets[0]),
        subjects=subjects(runs, sheets, protocol),
        styles=[style for sheet in sheets for style in sheet.styles()],
        css=Markup(template_file("report.css")),
        script=Markup(template_file("report.js")),
    )


def describe(run: Run) -> str:
    """One line that describes a run."""
    recorded, start = run.settings["made"], run.settings["starts"][-1]
    model = recorded["pretrained_model_name_or_path"] or "the included miniature"
    flags = recorded["train"] | recorded["generate"]
    shown = (name if value is True else f"{name} {value}" for name, value in flags.items() if value is not False)
    settings = ", ".join(shown) or "default settings"
    commit = f", commit {start['git_commit'][:12]}" if start["git_commit"] else ""
    if "generated_dir" in recorded:
        model, settings = f"images in {recorded['generated_dir']}", "existing images"
    return f"{run.label}: {model}, {settings}; {start['started'][:10]}, torch {start['versions']['torch']}{commit}."


def summarize(runs: Sequence[Run], protocol: str) -> dict[str, Any]:
    """The tables of one protocol."""
    summaries = [(run.label, run.summary["protocols"][protocol]) for run in runs]
    counts, models = summaries[0][1]["counts"], summaries[0][1]["models"]
    nouns = {"subjects": "subject", "seeds": "seed", "pictures": "image", "references": "photo", "pairs": "pair"}
    header, rows = tables.summary_rows(summaries, protocol, runs[0].summary["benchmark"])
    more = []
    for label, summary in summaries:
        if summary["counts"]["seeds"] > 1:
            title = "By seed" if len(runs) == 1 else f"{label}, by seed"
            more.append(Table(*tables.seed_rows(summary), title=title))
    for run in runs:
        if "steps" in run.summary:
            kept = f"the step with the highest {SCORES[run.summary['kept_best_by']]} is kept"
            title = f"{'' if len(runs) == 1 else f'{run.label}: '}Along the training ({kept})"
            more.append(Table(*tables.step_rows(run.summary, protocol), title=title))
    if len(runs) == 2:
        more.append(Table(*difference_rows(runs, protocol), title="Paired differences"))
    names = [name for name in SCORES if any(name in summary["scores"] for _, summary in summaries)]
    return {
        "protocol": protocol,
        "table": Table(header, rows, marked=len(runs)),
        "counts": ", ".join(counted(counts[key], noun) for key, noun in nouns.items()),
        "models": f"{short_name(models['dino'])}, {short_name(models['clip'])}, {models['precision']}",
        "more": more,
        "terms": [(SCORES[name], EXPLAINED[name]) for name in names],
    }


def difference_rows(runs: Sequence[Run], protocol: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: by score, the first run minus the second."""
    differences = paired_differences(*(run.of(run.subjects, protocol) for run in runs))
    rows = [
        [SCORES[name], tables.interval(row), f"{row['higher']} of {row['subjects']}"]
        for name, row in differences.items()
    ]
    return ["", f"{runs[0].label} minus {runs[1].label}", "subjects with a higher score"], rows


def short_name(model: str) -> str:
    """A model's name without the folder it is in."""
    return Path(model).name if model.startswith("local-dir:") else model


def grid(sheet: Sheets, label: str) -> dict[str, Any]:
    """The first image of each prompt (rows) and subject (columns)."""
    first: dict[tuple[str, str], int] = {}
    for index, subject, template in zip(sheet.rows.index, sheet.rows["subject"], sheet.rows["template"]):
        first.setdefault((subject, template), index)
    rows = [
        (template, [sheet.thumbnail(first[s, template]) if (s, template) in first else None for s in sheet.subjects])
        for template in dict.fromkeys(sheet.rows["template"])
    ]
    return {"label": label, "subjects": sheet.subjects, "rows": rows}


def distributions(runs: Sequence[Run], protocol: str) -> Markup:
    """Histograms of the images' scores as SVG, with the mean of each run and of real images."""
    names = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.6, 2.6), facecolor="none", layout="constrained")
        for axis, (name, title) in zip(figure.subplots(1, 3), names.items()):
            values = [run.of(run.images, protocol)[name] for run in runs]
            bins = np.histogram_bin_edges(np.concatenate(values), 30)
            for run, scores, colour in zip(runs, values, ("#c0392b", "#2c6fa6")):
                label = run.label.replace("$", r"\$")  # otherwise matplotlib reads mathematics between two of them
                axis.hist(scores, bins.tolist(), histtype="stepfilled", color=colour, alpha=0.35, label=label)
                axis.axvline(scores.mean(), color=colour, linewidth=1.8)
            real = runs[0].summary["protocols"][protocol]["real"].get(name)
            if real:
                axis.axvline(real["mean"], color="#333", linewidth=1.4, linestyle="--", label="real images")
            axis.set_title(title, fontsize=10)
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.patch.set_visible(False)
            if name == "dino":
                axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=3)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    label = escape("Histograms of the images' DINO, CLIP-I and CLIP-T")
    return Markup(drawing[drawing.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def picks(sheet: Sheets) -> list[dict[str, Any]]:
    """The images with the highest and lowest DINO and CLIP-T."""
    blocks = []
    for name, title in (("dino", "DINO"), ("clip_t", "CLIP-T")):
        ranked = sheet.rows[name].sort_values(ascending=False).index
        count = min(PICKED, len(ranked) // 2)
        for kind, indices in (("highest", ranked[:count]), ("lowest", ranked[::-1][:count])):
            records = [sheet.rows.loc[index] for index in indices]
            captions = [(f"{record['subject']}: {record[name]:.3f}", record["prompt"]) for record in records]
            thumbnails = [sheet.thumbnail(index) for index in indices]
            blocks.append({"title": f"{title}, {kind}", "images": list(zip(thumbnails, captions))})
    return blocks


def subjects(runs: Sequence[Run], sheets: Sequence[Sheets], protocol: str) -> list[dict[str, Any]]:
    """Every subject: its scores, its photos, and all of its images by prompt."""
    means = [run.of(run.subjects, protocol).groupby("subject").mean(numeric_only=True) for run in runs]
    blocks = []
    for subject in dict.fromkeys(name for sheet in sheets for name in sheet.subjects):
        values = []
        for run, table in zip(runs, means):
            if subject in table.index:
                row = table.loc[subject]
                scores = [
                    f"{SCORES[name]} {row[name]:.3f}" for name in SCORES if name in row and row[name] == row[name]
                ]
                values += scores if len(runs) == 1 else [f"{run.label}: {score}" for score in scores[:3]]
        photos = []
        for name in runs[0].summary["references"].get(subject, []):
            photo = load_rgb(runs[0].folder / name)
            photo.thumbnail((2 * SIDE, SIDE), Image.Resampling.LANCZOS)
            photos.append((Path(name).name, data_uri(photo)))
        present = [sheet for sheet in sheets if subject in sheet.by_prompt]
        prompts = []
        for number in range(max(len(sheet.by_prompt[subject]) for sheet in present)):
            rows = [sheet.by_prompt[subject][number] for sheet in present]
            images = [[sheet.thumbnail(index) for index in row] for sheet, row in zip(present, rows)]
            prompts.append((present[0].rows["prompt"][rows[0][0]], images))
        labels = [runs[sheet.index].label for sheet in present] if len(present) > 1 else []
        blocks.append({"name": subject, "scores": values, "photos": photos, "labels": labels, "prompts": prompts})
    return blocks
