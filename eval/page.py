"""One page about one subject: its photographs, pictures before and after training, the scores, the training curves."""

import argparse
import base64
import html
import io
import itertools
from pathlib import Path
from typing import Any

from PIL import Image

from data.errors import InputError
from data.photographs import find_photographs, load_rgb
from eval import dreambooth
from eval.writing import written_whole

SIDE = 256
"""Of the pictures in the page, pixels at most."""

SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
CURVES = {"loss": "loss", "distance/mean": "distance |W' - W|", "lambda/mean": "boundary λ"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fafaf8; margin: 2rem auto; max-width: 62rem;
       padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { margin: .3rem 0; color: #555 }
.row { display: flex; flex-wrap: wrap; gap: .5rem } .row img, td img { width: 9.5rem; border-radius: 6px }
table { border-collapse: collapse } td, th { padding: .3rem .6rem .3rem 0; text-align: left; font-weight: normal }
.scores td { font-variant-numeric: tabular-nums; min-width: 5rem } .scores tr.after td { font-weight: 600 }
.pictures th { color: #555 } .pictures td.prompt { width: 9rem } figure { margin: 0 } figure img { max-width: 100% }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="pictures of generate with the adapter")
    parser.add_argument("--base_dir", type=Path, required=True, help="pictures of the same prompts without it")
    parser.add_argument("--reference_dir", type=Path, required=True, help="photographs of the subject")
    parser.add_argument("--training_dir", type=Path, help="output folder of the training, for its curves")
    dreambooth.add_scorer_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write; a PNG of it goes beside")


def by_prompt(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each prompt, in order."""
    found: dict[str, list[Path]] = {}
    for path, prompt in dreambooth.read_generated(folder):
        found.setdefault(prompt, []).append(path)
    return found


def shared_beginning(prompts: list[str]) -> str:
    """The words that all prompts begin with."""
    columns = zip(*(prompt.split() for prompt in prompts))
    return " ".join(words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, columns))


def read_curves(training_dir: Path | None) -> dict[str, tuple[list[int], list[float]]]:
    """(steps, values) of each of ``CURVES`` that the tensorboard logs below a folder hold.

    Raises:
        InputError: no such folder.
    """
    if training_dir is None:
        return {}
    if not training_dir.is_dir():
        raise InputError(f"--training_dir {training_dir} is not a folder; name the output folder of a training.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for folder in sorted({file.parent for file in training_dir.glob("**/events.out.tfevents.*")}):
        events = EventAccumulator(str(folder)).Reload()
        for tag in CURVES.keys() & set(events.Tags()["scalars"]):
            points = events.Scalars(tag)
            curves[tag] = ([point.step for point in points], [point.value for point in points])
    return {tag: curves[tag] for tag in CURVES if tag in curves}


def drawn_curves(axes: Any, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """One curve into each of the axes."""
    for axis, (tag, (steps, values)) in zip(axes, curves.items()):
        axis.plot(steps, values, color="#c0392b" if tag == "loss" else "#2c3e50", linewidth=1.6)
        axis.set_title(CURVES[tag], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)


def score_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, a cell for each of ``SCORES``) for the base model, the adapter and real photographs."""

    def cells(values: dict[str, float | None]) -> list[str]:
        numbers = [values.get(name) for name in SCORES]
        return ["-" if number is None else f"{number:.3f}" for number in numbers]

    return [
        ("base model", cells(before["scores"])),
        ("with the adapter", cells(after["scores"])),
        ("real photographs", cells(after["real"])),
    ]


def embedded(picture: Image.Image | bytes, label: str) -> str:
    """An ``img`` that carries its picture."""
    if isinstance(picture, Image.Image):
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        picture = buffer.getvalue()
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def as_html(title: str, photographs: list[Path], before: dict, after: dict, rows: list, curves: bytes | None) -> str:
    """The page, in one file."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body.append(f"<h2>{len(photographs)} photographs that it was trained on</h2><div class=row>")
    body += [embedded(load_rgb(path), path.name) for path in photographs] + ["</div>"]
    body.append("<h2>Scores</h2><table class=scores><tr><th></th>")
    body += [f"<th>{name}</th>" for name in SCORES.values()] + ["</tr>"]
    for number, (label, cells) in enumerate(rows):
        kind = " class=after" if number == 1 else ""
        body.append(f"<tr{kind}><td>{label}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    body.append(
        "</table><p>DINO and CLIP-I: likeness to the photographs. CLIP-T: how well a picture follows its prompt.</p>"
    )
    body.append("<h2>The same prompts and seeds, before and after</h2><table class=pictures>")
    body.append("<tr><th></th><th>before</th><th>after</th></tr>")
    for prompt, pictures in after.items():
        pairs = (before.get(prompt, []), pictures)
        cells = "".join(
            "<td><div class=row>" + "".join(embedded(load_rgb(p), prompt) for p in half) + "</div></td>"
            for half in pairs
        )
        body.append(f"<tr><td class=prompt>{html.escape(prompt)}</td>{cells}</tr>")
    body.append("</table>")
    if curves is not None:
        body.append(f"<h2>Training</h2><figure>{embedded(curves, 'training curves')}</figure>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return f"{head}<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"


def as_figure(title: str, photographs: list[Path], before: dict, after: dict, rows: list, curves: dict) -> Any:
    """The same as one matplotlib figure: photographs on top, pictures on the left, scores and curves on the right."""
    from matplotlib.figure import Figure

    each = max(len(pictures) for pictures in after.values())
    columns, lines = 2 * each, len(after)
    width, height = 1.5 * (columns + 4), 1.5 * (lines + 1.25) + 0.4
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    figure.suptitle(title, fontsize=13, x=0.02, ha="left", y=1 - 0.1 / height, va="top")
    grid = figure.add_gridspec(
        1 + lines, columns, left=0.02, right=columns / (columns + 4), top=1 - 0.5 / height, bottom=0.01, hspace=0.22
    )

    def show(place: Any, path: Path, label: str = "") -> None:
        axis = figure.add_subplot(place)
        axis.imshow(load_rgb(path).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        axis.set_title(label, fontsize=8, loc="left", pad=3)
        axis.axis("off")

    top = grid[0, :].subgridspec(1, max(columns, min(len(photographs), 6)))
    for number, path in enumerate(photographs[: top.ncols]):
        show(top[0, number], path, "photographs" if number == 0 else "")
    for line, (prompt, pictures) in enumerate(after.items(), 1):
        for number, path in enumerate(before.get(prompt, [])[:each]):
            show(grid[line, number], path, f"{prompt}: before" if number == 0 else "")
        for number, path in enumerate(pictures):
            show(grid[line, each + number], path, "after" if number == 0 else "")
    side = figure.add_gridspec(
        1 + len(curves),
        1,
        left=(columns + 0.5) / (columns + 4),
        right=0.97,
        top=1 - 0.6 / height,
        bottom=0.07,
        hspace=0.7,
    )
    axis = figure.add_subplot(side[0])
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
    drawn_curves([figure.add_subplot(side[1 + i]) for i in range(len(curves))], curves)
    return figure


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def run(options: argparse.Namespace) -> None:
    picture_file = options.output.with_suffix(".png")
    for file in (options.output, picture_file):
        if file.exists():
            raise InputError(f"{file} exists already; remove it or name another --output.")
    before, after = by_prompt(options.base_dir), by_prompt(options.generated_dir)
    absent = [prompt for prompt in after if prompt not in before]
    if absent:
        raise InputError(f"--base_dir {options.base_dir} has no picture of {absent[0]!r}; generate the same prompts.")
    photographs = [photograph.path for photograph in find_photographs(options.reference_dir)]
    curves = read_curves(options.training_dir)
    scored = [
        dreambooth.score(argparse.Namespace(**(vars(options) | {"generated_dir": folder})))
        for folder in (options.base_dir, options.generated_dir)
    ]
    rows = score_rows(*scored)

    from matplotlib.figure import Figure

    drawn = None
    if curves:
        figure = Figure(figsize=(9, 2.2), dpi=110, facecolor="#fafaf8", layout="constrained")
        drawn_curves(figure.subplots(1, len(curves), squeeze=False)[0], curves)
        drawn = png(figure)
    title = f"Before and after: {shared_beginning(list(after)) or 'training'}"
    page = as_html(title, photographs, before, after, rows, drawn)
    picture = png(as_figure(title, photographs, before, after, rows, curves))
    for file, content in ((picture_file, picture), (options.output, page.encode())):
        with written_whole(file) as temporary:
            temporary.write_bytes(content)
    print(dreambooth.table(scored[1]))
    print(f"wrote {options.output} and {picture_file}; open the first in a browser")
