"""One page about a benchmark run, or two side by side: tables, every picture, distributions. One file, no network."""

import argparse
import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from data.errors import InputError
from data.photographs import load_rgb
from eval.methods import TITLES
from eval.writing import write_text

if TYPE_CHECKING:
    import pandas as pd

ASSETS = Path(__file__).parent / "assets"
SIDE = 128
"""Of a thumbnail, pixels."""

LONGEST = 16_000
"""Pixels that a WebP picture can be high or wide, nearly."""

PICKED = 8
"""Best and worst pictures that are shown of each score."""

METHODS = TITLES | {"none": "base model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one or two output folders of eval benchmark")
    parser.add_argument("--labels", nargs="+", help="what to call each run, by default its method")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write; tables as .md and .tex beside")


@dataclasses.dataclass(frozen=True)
class Run:
    """A results folder as it was read."""

    label: str
    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    pictures: "pd.DataFrame"
    subjects: "pd.DataFrame"

    def of(self, table: "pd.DataFrame", protocol: str) -> "pd.DataFrame":
        return table.query("protocol == @protocol").reset_index(drop=True)


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a results folder.

    Raises:
        InputError: it is none, or its scores are not there yet.
    """
    import pandas as pd

    for name in ("settings.json", "summary.json", "scores.parquet", "subjects.csv"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; name a finished output folder of eval benchmark.")
    settings, summary = (json.loads((folder / name).read_text()) for name in ("settings.json", "summary.json"))
    if label is None:
        given = settings["made"].get("generated_dir")
        label = Path(given).name if given else METHODS[summary["method"]]
    tables = pd.read_parquet(folder / "scores.parquet"), pd.read_csv(folder / "subjects.csv", dtype={"subject": str})
    return Run(label, folder, settings, summary, *tables)


def write(folders: Sequence[Path], output: Path, labels: Sequence[str] | None = None, overwrite: bool = False) -> Path:
    """Write the page, and its tables as Markdown and LaTeX beside it.

    Raises:
        InputError: a folder is no finished run, the runs are of different benchmarks, a file is there already.
    """
    if len(folders) > 2:
        raise InputError(f"{len(folders)} runs were given; a page shows one, or two side by side.")
    if labels is not None and len(labels) != len(folders):
        raise InputError(f"--labels gives {len(labels)} names to {len(folders)} runs; give each one.")
    runs = [read_run(folder, label) for folder, label in zip(folders, labels or [None] * len(folders))]
    if len({run.label for run in runs}) < len(runs):
        runs = [dataclasses.replace(run, label=f"{run.label} ({run.folder.name})") for run in runs]
    if len({run.summary["benchmark"] for run in runs}) > 1:
        raise InputError(f"{folders[0]} and {folders[1]} are runs of different benchmarks; compare runs of one.")
    protocols = [name for name in runs[0].summary["protocols"] if all(name in r.summary["protocols"] for r in runs)]
    if not protocols:
        raise InputError(f"{folders[0]} and {folders[1]} share no protocol; score both under one.")
    files = {output: page(runs, protocols)}
    files |= {output.with_suffix(end): text for end, text in text_tables(runs, protocols).items()}
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(f"{file} exists already; remove it or name another --output.")
    for file, text in files.items():
        write_text(file, text)
    return output


def terminal(folder: Path) -> str:
    """The summary as lines to read in a terminal."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = []
    for protocol, found in summary["protocols"].items():
        counts = found["counts"]
        lines.append(
            f"protocol {protocol}: {counts['subjects']} subjects, {counts['seeds']} seeds, {counts['pictures']} "
            f"pictures, {counts['pairs']} pairs; mean [95% interval over subjects]"
        )
        for name, value in found["scores"].items():
            real = found["real"].get(name)
            beside = f"   real images {real['mean']:.3f}" if real else ""
            lines.append(f"  {name:16}{value['mean']:7.3f} [{value['low']:.3f}, {value['high']:.3f}]{beside}")
    return "\n".join(lines)


def text_tables(runs: Sequence[Run], protocols: Sequence[str]) -> dict[str, str]:
    """The tables as Markdown and LaTeX, by the ending of their file."""
    from eval import tables

    markdown, latex = "", ""
    for protocol in protocols:
        summaries = [(run.label, run.summary["protocols"][protocol]) for run in runs]
        header, rows = tables.summary_rows(summaries, protocol, runs[0].summary["benchmark"])
        caption = f"{runs[0].summary['benchmark']}, protocol {protocol}: mean [95% interval over subjects]"
        found = [(caption, header, rows)]
        if len(runs) == 2:
            found.append(("Paired differences over subjects", *difference_rows(runs, protocol)))
        for run in runs:
            if run.summary["protocols"][protocol]["counts"]["seeds"] > 1:
                found.append((f"{run.label}, by seed", *tables.seed_rows(run.summary["protocols"][protocol])))
            found.append((f"{run.label}, by subject", *tables.subject_rows(run.of(run.subjects, protocol))))
            found.append((f"{run.label}, by prompt", *tables.prompt_rows(run.summary["protocols"][protocol])))
        for caption, header, rows in found:
            markdown += f"**{caption}**\n\n{tables.markdown(header, rows)}\n"
            latex += tables.latex(header, rows, caption) + "\n"
    return {".md": markdown, ".tex": latex}


def difference_rows(runs: Sequence[Run], protocol: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: by score, the first run minus the second."""
    from eval.results import SCORES, paired_differences
    from eval.tables import interval

    found = paired_differences(*(run.of(run.subjects, protocol) for run in runs))
    rows = [[SCORES[name], interval(one), f"{one['higher']} of {one['subjects']}"] for name, one in found.items()]
    return ["", f"{runs[0].label} minus {runs[1].label}", "subjects where it is higher"], rows


# The page, from top to bottom.


def page(runs: Sequence[Run], protocols: Sequence[str]) -> str:
    """The whole page."""
    first = runs[0]
    name = first.summary["benchmark"]
    title = f"{name}: {' and '.join(run.label for run in runs)}"
    sheets = [_Sheets(run, index, protocols[0]) for index, run in enumerate(runs)]
    body = [f"<h1>{_e(title)}</h1>", *(f"<p>{_e(_described(run))}</p>" for run in runs)]
    for run in runs:
        for place, problem in run.summary["failed"].items():
            body.append(f"<p class=failed>Not in any mean: {_e(place)}: {_e(problem)}</p>")
    body += _summaries(runs, protocols)
    body += _grid(runs, sheets, protocols[0])
    body += ["<h2>Distributions</h2><div class=plot>", distributions(runs, protocols[0]), "</div>"]
    body += _picks(first, sheets[0], protocols[0])
    body += _subjects(runs, sheets, protocols[0])
    body.append(
        "<dialog aria-label=Picture><i class=t></i><p></p><form method=dialog><button>Close</button></form></dialog>"
    )
    style = (ASSETS / "report.css").read_text() + "".join(sheet.style() for sheet in sheets)
    head = '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
    head += f"<title>{_e(title)}</title><link rel=icon href=data:,><style>{style}</style>"
    return f"{head}<body>{''.join(body)}<script>{(ASSETS / 'report.js').read_text()}</script></body></html>\n"


def _e(text: object) -> str:
    return html.escape(str(text))


def _short(name: str) -> str:
    """A model's name without the folder that it lies in."""
    return Path(name).name if name.startswith("local-dir:") else name


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _described(run: Run) -> str:
    made, start = run.settings["made"], run.settings["starts"][-1]
    model = made["pretrained_model_name_or_path"] or "the shipped miniature"
    settings = ", ".join(f"{k} {v}" for k, v in (made["train"] | made["generate"]).items()) or "default settings"
    commit = f", commit {start['git_commit'][:12]}" if start["git_commit"] else ""
    if "generated_dir" in made:
        model, settings = f"pictures of {made['generated_dir']}", "not made here"
    return f"{run.label}: {model}, {settings}; {start['started'][:10]}, torch {start['versions']['torch']}{commit}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: int = 0) -> str:
    def cell(text: str) -> str:
        mean, bracket, rest = text.partition(" [")
        return f"{_e(mean)}<small>{_e(bracket.strip() + rest)}</small>" if bracket else _e(text)

    head = "".join(f"<th scope=col>{_e(one)}</th>" for one in header)
    lines = [
        f"<tr{' class=run' if number < marked else ''}>" + "".join(f"<td>{cell(one)}</td>" for one in row) + "</tr>"
        for number, row in enumerate(rows)
    ]
    return (
        f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _summaries(runs: Sequence[Run], protocols: Sequence[str]) -> list[str]:
    from eval import tables
    from eval.results import EXPLAINED, SCORES

    body = []
    for protocol in protocols:
        found = [(run.label, run.summary["protocols"][protocol]) for run in runs]
        counts, models = found[0][1]["counts"], found[0][1]["models"]
        body.append(f"<h2>Scores, protocol {_e(protocol)}</h2>")
        body.append(_table(*tables.summary_rows(found, protocol, runs[0].summary["benchmark"]), marked=len(runs)))
        body.append(
            f"<p>{_counted(counts['subjects'], 'subject')}, {_counted(counts['seeds'], 'seed')}, "
            f"{_counted(counts['pictures'], 'picture')}, {_counted(counts['references'], 'photograph')}, "
            f"{_counted(counts['pairs'], 'pair')}. In brackets: 95% interval, bootstrap over "
            f"subjects. {_e(_short(models['dino']))}, {_e(_short(models['clip']))}, {models['precision']}.</p>"
        )
        for run in runs:
            if run.summary["protocols"][protocol]["counts"]["seeds"] > 1:
                title = "By seed" if len(runs) == 1 else f"{run.label}, by seed"
                body += [f"<h3>{_e(title)}</h3>", _table(*tables.seed_rows(run.summary["protocols"][protocol]))]
        if len(runs) == 2:
            body += ["<h3>Paired differences</h3>", _table(*difference_rows(runs, protocol))]
        names = [name for name in SCORES if any(name in summary["scores"] for _, summary in found)]
        terms = "; ".join(f"<b>{SCORES[name]}</b>: {_e(EXPLAINED[name])}" for name in names)
        body.append(f"<p>{terms}.</p>")
    return body


class _Sheets:
    """The thumbnails of a run: one picture for each subject, a row for each prompt."""

    def __init__(self, run: Run, index: int, protocol: str):
        self.rows = run.of(run.pictures, protocol)
        self.subjects = list(dict.fromkeys(self.rows["subject"]))
        self.index, self.folder = index, run.folder
        self.places: dict[str, list[list[int]]] = {}
        for subject, rows in self.rows.groupby("subject", sort=False):
            by_prompt = rows.groupby("template", sort=False).indices
            self.places[str(subject)] = [list(rows.index[some]) for some in by_prompt.values()]

    def sheet(self, subject: str) -> str:
        places = self.places[subject]
        columns = max(map(len, places))
        side = min(SIDE, LONGEST // max(len(places), columns))
        sheet = Image.new("RGB", (columns * side, len(places) * side), "white")
        for row, some in enumerate(places):
            for column, index in enumerate(some):
                picture = load_rgb(self.folder / self.rows["file"][index])
                sheet.paste(_square(picture, side), (column * side, row * side))
        return _data(sheet)

    def style(self) -> str:
        rules = []
        for number, subject in enumerate(self.subjects):
            places = self.places[subject]
            size = f"--cols:{max(map(len, places))};--rows:{len(places)}"
            rules.append(f".r{self.index}s{number}{{{size};background-image:url({self.sheet(subject)})}}")
        return "\n".join(rules)

    def thumb(self, index: int, tag: str = "button") -> str:
        row = self.rows.loc[index]
        places = self.places[row["subject"]]
        r = next(number for number, some in enumerate(places) if index in some)
        name = f"r{self.index}s{self.subjects.index(row['subject'])}"
        said = f"{row['prompt']}: DINO {row['dino']:.3f}, CLIP-I {row['clip_i']:.3f}, CLIP-T {row['clip_t']:.3f}"
        role = "" if tag == "button" else " role=img"
        label = f'aria-label="{_e(said)}" title="{_e(said)}"'
        return f'<{tag}{role} class="t {name}" style="--c:{places[r].index(index)};--r:{r}" {label}></{tag}>'


def _square(picture: Image.Image, side: int) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _grid(runs: Sequence[Run], sheets: Sequence[_Sheets], protocol: str) -> list[str]:
    """Prompts x subjects, the first picture of each; a table for each kind of subject that has prompts of its own."""
    body = ["<h2>Prompts and subjects</h2><p>The first picture of each; all of them are in the rows below.</p>"]
    for run, sheet in zip(runs, sheets):
        if len(runs) > 1:
            body.append(f"<h3>{_e(run.label)}</h3>")
        templates = list(dict.fromkeys(sheet.rows["template"]))
        first = {
            (s, t): i
            for i, s, t in reversed(list(zip(sheet.rows.index, sheet.rows["subject"], sheet.rows["template"])))
        }
        head = "".join(f"<th scope=col>{_e(subject)}</th>" for subject in sheet.subjects)
        lines = []
        for template in templates:
            cells = "".join(
                f"<td>{sheet.thumb(first[s, template], 'i') if (s, template) in first else ''}</td>"
                for s in sheet.subjects
            )
            lines.append(f"<tr><th scope=row>{_e(template)}</th>{cells}</tr>")
        body.append(f"<div class='wide grid' tabindex=0><table><thead><tr><th></th>{head}</tr></thead>")
        body.append(f"<tbody>{''.join(lines)}</tbody></table></div>")
    return body


def distributions(runs: Sequence[Run], protocol: str) -> str:
    """Histograms of the pictures' scores as SVG, with the mean of each run and of real images."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.6, 2.6), facecolor="none", layout="constrained")
        for axis, (name, title) in zip(figure.subplots(1, 3), names.items()):
            values = [run.of(run.pictures, protocol)[name] for run in runs]
            bins = np.histogram_bin_edges(np.concatenate(values), 30)
            for run, some, colour in zip(runs, values, ("#c0392b", "#2c6fa6")):
                axis.hist(some, bins.tolist(), histtype="stepfilled", color=colour, alpha=0.35, label=run.label)
                axis.axvline(some.mean(), color=colour, linewidth=1.8)
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
    label = "Histograms of the pictures' DINO, CLIP-I and CLIP-T"
    return drawing[drawing.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{_e(label)}"', 1)


def _picks(run: Run, sheet: _Sheets, protocol: str) -> list[str]:
    rows = sheet.rows
    body = [f"<h2>Best and worst pictures{'' if sheet.index else ', ' + _e(run.label)}</h2>"]
    for name, title in (("dino", "DINO"), ("clip_t", "CLIP-T")):
        order = rows[name].sort_values(ascending=False).index
        each = min(PICKED, len(order) // 2)
        for kind, some in (("highest", order[:each]), ("lowest", order[::-1][:each])):
            body.append(f"<h3>{title}, {kind}</h3><div class=picks>")
            for index in some:
                row = rows.loc[index]
                text = f"{row['subject']}: {row[name]:.3f}<br>{_e(row['prompt'])}"
                body.append(f"<figure>{sheet.thumb(index)}<figcaption>{text}</figcaption></figure>")
            body.append("</div>")
    return body


def _subjects(runs: Sequence[Run], sheets: Sequence[_Sheets], protocol: str) -> list[str]:
    from eval.results import SCORES

    means = [run.of(run.subjects, protocol).groupby("subject").mean(numeric_only=True) for run in runs]
    body = ["<h2>Subjects</h2><p>Each row opens to the photographs and all pictures.</p>"]
    for subject in list(dict.fromkeys(s for sheet in sheets for s in sheet.subjects)):
        said = ""
        for run, table in zip(runs, means):
            if subject not in table.index:
                continue
            row = table.loc[subject]
            values = [f"{SCORES[n]} {row[n]:.3f}" for n in SCORES if n in row and row[n] == row[n]]
            prefix = f"{run.label}: " if len(runs) > 1 else ""
            shown = values if len(runs) == 1 else values[:3]
            said += "".join(f"<span>{_e(prefix + value)}</span>" for value in shown)
        body.append(f"<details id='{_e(subject)}'><summary><b>{_e(subject)}</b>{said}</summary>")
        body.append("<div class=row>")
        for name in runs[0].summary["references"].get(subject, []):
            picture = load_rgb(runs[0].folder / name)
            picture.thumbnail((2 * SIDE, SIDE), Image.Resampling.LANCZOS)
            body.append(f'<img alt="photograph {_e(Path(name).name)}" src="{_data(picture)}">')
        body.append("</div>")
        holders = [sheet for sheet in sheets if subject in sheet.places]
        if len(holders) > 1:
            names = "".join(f"<b>{_e(runs[sheet.index].label)}</b>" for sheet in holders)
            body.append(f"<div class=prompt><span></span>{names}</div>")
        for prompt in range(max(len(sheet.places[subject]) for sheet in holders)):
            rows = [sheet.places[subject][prompt] for sheet in holders]
            text = holders[0].rows["prompt"][rows[0][0]]
            cells = "".join(
                f"<div class=row>{''.join(map(sheet.thumb, some))}</div>" for sheet, some in zip(holders, rows)
            )
            body.append(f"<div class=prompt><span>{_e(text)}</span>{cells}</div>")
        body.append("</details>")
    return body


def run(options: argparse.Namespace) -> None:
    page = write(options.runs, options.output, options.labels)
    print(f"wrote {page}; open it in a browser")
