"""Compare: several adapters at the same prompts and seeds, their scores beside real images, and paired differences."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from delora_diffusers.names import METADATA_NAME
from eval.metrics.protocols import PROTOCOLS
from studio import adapters, charts, comparison, jobs, markup
from studio.player import BY_BUTTON, Player, StoppedError
from studio.tabs.common import PRECISIONS, click, command_box, reported, set_choices, traced
from studio.workspace import Workspace

SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
REAL = "real images"
GO_ON = "Press Compare to go on."


def build(workspace: Workspace, player: Player):
    """Build the tab; returns what is looked at when it is opened, what is filled in then besides, and the handler."""
    names = adapters.adapters(workspace)
    with gr.Row():
        labels = gr.Dropdown(
            names, value=[], multiselect=True, label="Adapters", info="Two or more.", elem_id="compared", scale=2
        )
        photo_set = gr.Dropdown(workspace.photo_sets(), label="Photos of the subject", scale=1)
        protocol = gr.Dropdown(
            ["toybox", "dreambooth", "delora"], value="toybox", label="Protocol", scale=1,
            info="toybox has the miniature's encoders; the others download theirs.",
        )  # fmt: skip
    other_subject = gr.HTML(elem_id="other-subject")
    filled = gr.State()
    prompts = gr.Textbox(
        comparison.default_prompts(workspace, names[0] if names else None),
        label="Prompts",
        lines=4,
        info="One per line.",
    )
    with gr.Row():
        images = gr.Number(2, label="Images per prompt", precision=0, minimum=1)
        seed = gr.Number(0, label="Seed", precision=0)
        steps = gr.Number(25, label="Steps", precision=0, minimum=1)
        precision = gr.Dropdown(PRECISIONS, value="", label="Precision")
    with gr.Row(equal_height=True):
        go = gr.Button("Compare", variant="primary", elem_id="compare")
        pages = gr.Button("Write a report of each adapter")
        stop = gr.Button("Stop", variant="stop")
    command = command_box("compare-command")
    links = gr.HTML(elem_id="compare-pages")
    result = gr.HTML(markup.paragraph("Press Compare: scores and images appear here."), elem_id="compare-result")
    with gr.Accordion("Benchmarks: methods on many subjects", open=False):
        gr.HTML(
            markup.paragraph(
                "A benchmark trains, generates and scores every subject of a list, in a terminal. Its report shows all "
                "images, and two of them paired differences over subjects."
            )
            + markup.command(jobs.shown(comparison.benchmark_words(workspace)), "Command of a benchmark")
        )
        benchmarks = gr.Dropdown(
            comparison.benchmarks(workspace), value=[], multiselect=True, label="Benchmark runs", info="One or two.",
            elem_id="benchmarks",
        )  # fmt: skip
        report = gr.Button("Write the report")
        report_command = command_box("report-command")
        report_link = gr.HTML(elem_id="report")

    inputs = [labels, photo_set, protocol, prompts, images, seed, steps, precision]

    def prepared(chosen: list[str], name: str | None, text: str, *settings: Any) -> tuple[Path, Path, list[str]]:
        if not name:
            raise InputError("no photos are chosen; choose the set of the subject.")
        count, number, step_count, digits = settings
        words: list[str] = []
        values = {"num_images": count, "seed": number, "num_inference_steps": step_count, "mixed_precision": digits}
        for flag, value in values.items():
            words += adapters.flag(flag, value)
        folder = comparison.requests(workspace, chosen, adapters.lines(text), words)
        return (
            folder,
            workspace.photo_set(name),
            ["--requests_file", str(jobs.short(folder / "requests.jsonl")), *words],
        )

    @reported
    @functools.partial(traced, place=1, outputs=3)
    def compare(chosen: list[str], name: str | None, kind: str, text: str, *settings: Any):
        folder, photos, words = prepared(chosen, name, text, *settings)
        compared = [comparison.BASE, *chosen]
        scoring = {label: comparison.score_words(folder, label, photos, kind) for label in compared}
        generating = [*jobs.words_of("delora_diffusers", "generate"), *words]
        shown = markup.command(jobs.shown(generating, *scoring.values()), "Commands")
        total = len(compared) * len(adapters.lines(text)) * int(settings[0] or 1)

        def progress() -> str:
            made = sum(adapters.count_images(comparison.images_of(folder, label)) for label in compared)
            return markup.paragraph(f"Generating: {made} of {total} images.") + markup.progress(
                "generating", made, total
            )

        try:
            for html in jobs.while_running(lambda: player.generate(words), progress):
                yield shown, html, ""
        except StoppedError as stopped:
            yield shown, markup.paragraph(f"{stopped} {GO_ON}"), ""
            return
        grid = images_of(workspace, folder, compared)
        for label, command in scoring.items():
            if not comparison.scores_file(folder, label, photos, kind).exists():
                for _ in jobs.run(command):
                    yield shown, markup.paragraph(f"Scoring {label} ...") + grid, ""
        scores = comparison.read_scores(folder, chosen, photos, kind)
        yield shown, results_of(scores, comparison.write_differences(folder, scores)) + grid, ""

    @reported
    @functools.partial(traced, place=1, outputs=2)
    def write_pages(chosen: list[str], name: str | None, kind: str, text: str, *settings: Any):
        folder, photos, words = prepared(chosen, name, text, *settings)
        for label in (comparison.BASE, *chosen):
            if not (comparison.images_of(folder, label) / METADATA_NAME).is_file():
                raise InputError(f"this comparison has no images of {label} yet; press Compare first.")
        requests = [
            comparison.page_words(folder, label, photos, kind, workspace.run(label.partition("/")[0]))
            for label in chosen
        ]
        shown = markup.command(jobs.shown(*(words for words, _ in requests)), "Commands")
        links = ""
        yield shown, links
        for (words, page), label in zip(requests, chosen):
            if not page.exists():
                for _ in jobs.run(words):
                    yield shown, markup.paragraph(f"Writing the report of {label} ...") + links
            links += markup.link(workspace, page, f"Report of {label}")
        yield shown, links

    @reported
    @functools.partial(traced, place=1, outputs=2)
    def write_report(names: list[str]):
        words, page = comparison.report_words(workspace, names or [])
        shown = markup.command(jobs.shown(words))
        if not page.exists():
            for _ in jobs.run(words):
                yield shown, markup.paragraph("Writing the report ...")
        yield shown, markup.link(workspace, page, f"Report of {' and '.join(names)}")

    def end():
        player.close(BY_BUTTON)
        return markup.paragraph(f"{BY_BUTTON} {GO_ON}"), *[gr.update(interactive=True)] * 2

    hidden: dict[str, Any] = {"show_progress": "hidden"}
    running: list[Any] = [
        click(go, compare, inputs, [command, result, links]),
        click(pages, write_pages, inputs, [command, links]),
    ]
    stop.click(end, None, [result, go, pages], cancels=running, queue=False)
    click(report, write_report, benchmarks, [report_command, report_link])

    @reported
    def follow(chosen: list[str], name: str | None, text: str, run: str | None):
        """The photos and the prompts of the first adapter, and a warning.

        Args:
            run: for which they were filled in the last time; what was chosen since then is kept.
        """
        first = chosen[0] if chosen else None
        if first is not None and first.partition("/")[0] != run:
            if not text.strip() or text in (comparison.default_prompts(workspace, label) for label in (run, None)):
                text = comparison.default_prompts(workspace, first)
            trained = adapters.photos_of(workspace, first)
            name, run = trained if trained in workspace.photo_sets() else name, first.partition("/")[0]
        sets = set_choices(workspace, name)
        return sets, text, run, warned(chosen, sets["value"])

    @reported
    def warned(chosen: list[str], name: str | None) -> str:
        return markup.notes(list(filter(None, [comparison.other_subject(workspace, chosen or [], name)])))

    followed = [photo_set, prompts, filled, other_subject]
    labels.input(follow, [labels, *followed[:3]], followed, **hidden)
    photo_set.change(warned, [labels, photo_set], other_subject, **hidden)

    def refresh(chosen: list[str], name: str | None, text: str, run: str | None):
        now = adapters.adapters(workspace)
        of_runs = {label.partition("/")[0]: label for label in reversed(now)}
        kept = [label for label in chosen or [] if label in now] or list(of_runs.values())[::-1][:2]
        of_benchmarks = gr.update(choices=comparison.benchmarks(workspace))
        return gr.update(choices=now, value=kept), *follow(kept, name, text, run), of_benchmarks

    return [labels, *followed[:3]], [other_subject, benchmarks], refresh


def results_of(scores: dict[str, dict[str, Any]], differences: list[tuple[str, str, dict]]) -> str:
    """The scores beside real images, the frontier of both, and the differences."""

    def cells(row: dict[str, float | None]) -> list[str]:
        return ["-" if row.get(key) is None else f"{row[key]:.3f}" for key in SCORES]

    rows = [[label, *cells(result["scores"])] for label, result in scores.items()]
    first = next(iter(scores.values()))
    rows.append([REAL, *cells(first["real"])])
    counts, kind = first["counts"], PROTOCOLS[first["protocol"]].name
    caption = f"Scores by protocol {kind}: {counts['generated']} images each, {counts['reference']} photos"
    parts = [markup.table(["adapter", *SCORES.values()], rows, caption)]
    points = {label: (result["scores"]["dino"], result["scores"]["clip_t"]) for label, result in scores.items()}
    title = "Subject fidelity (DINO) against prompt fidelity (CLIP-T); up and right is better"
    limit = None if first["real"].get("dino") is None else (REAL, first["real"]["dino"])
    chart = charts.scatter_chart(title, points, "DINO", "CLIP-T", limit)
    parts.append(f'<div class="charts wide">{chart}</div>')
    rows = [
        [f"{first} - {second}", SCORES[key], f"{value['mean']:+.3f}", f"{value['low']:+.3f} to {value['high']:+.3f}",
         f"{value['higher']} of {value['subjects']}"]
        for first, second, found in differences for key, value in found.items() if key in SCORES
    ]  # fmt: skip
    if rows:
        header = ["adapters", "score", "difference", "95% interval", "prompts where the first is higher"]
        parts.append(
            markup.table(
                header, rows, "Paired differences over prompts; an interval that contains 0 is not significant"
            )
        )
    return "".join(parts)


def images_of(workspace: Workspace, folder: Path, labels: list[str]) -> str:
    """A row per prompt and seed, a column per adapter."""
    records = {label: adapters.generated(comparison.images_of(folder, label)) for label in labels}
    rows = []
    for index, record in enumerate(records[labels[0]]):
        cells = []
        for label in labels:
            path = comparison.images_of(folder, label) / records[label][index]["file_name"]
            url = markup.file_url(workspace, path)
            cells.append(f'<td><img src="{markup.escape(url)}" alt="{markup.escape(label)}" loading="lazy"></td>')
        prompt = markup.escape(f"{record['prompt']}, seed {record['seed']}")
        rows.append(f'<tr><th scope="row">{prompt}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{markup.escape(label)}</th>' for label in labels)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="images"><table class="images">'
        f'<thead><tr><th scope="col">prompt</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
