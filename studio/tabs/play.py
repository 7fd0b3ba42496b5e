"""Play: generate with adapters at any strength, in a process that keeps the model."""

import functools
from typing import Any

import gradio as gr

from delora_diffusers.commands.generate_model import SCHEDULERS
from delora_diffusers.errors import InputError
from studio import adapters, jobs, markup
from studio.player import BY_BUTTON, Player, StoppedError
from studio.tabs.common import (
    DEFAULT,
    MOST_ADAPTERS,
    NONE,
    PRECISIONS,
    choices,
    click,
    command_box,
    more_adapters,
    reported,
    traced,
)
from studio.workspace import Workspace

PLACE = "on the beach"
FIRST_PROMPT = f"a photo of sks mug {PLACE}"
"""Until an adapter is chosen."""
NOTHING_YET = "Press Generate, or turn the dial: the images appear here."
GO_ON = "Press Generate to go on."


def build(workspace: Workspace, player: Player) -> tuple[list[Any], Any]:
    """Build the tab; returns the lists of adapters and the prompts, and the handler that fills them again."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            first = gr.Dropdown([NONE], value=None, label="Adapter", info="None is the base model.")
            others, weights = more_adapters()
            filled = gr.State(FIRST_PROMPT)
            prompts = gr.Textbox(
                FIRST_PROMPT, label="Prompts", lines=3, info="One per line. The dial uses the first.", elem_id="prompts"
            )
            dial = gr.Slider(
                0, 1.5, 1.0, step=0.05, label="Strength", elem_id="strength",
                info="0 is the base model, 1 as trained. Turning it generates one image.",
            )  # fmt: skip
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                steps = gr.Number(25, label="Steps", precision=0, minimum=1, min_width=90)
                images = gr.Number(2, label="Images", precision=0, minimum=1, min_width=90)
            with gr.Accordion("Size, guidance, scheduler, precision", open=False):
                with gr.Row():
                    width = gr.Textbox("", label="Width", placeholder="the model's", min_width=90)
                    height = gr.Textbox("", label="Height", placeholder="the model's", min_width=90)
                    guidance = gr.Textbox("", label="Guidance scale", placeholder="the model's", min_width=90)
                negative = gr.Textbox("", label="Negative prompt")
                base = gr.Textbox("", label="Base model", placeholder="the adapter's", info="Hub id or path.")
                with gr.Row():
                    schedulers = [DEFAULT, *((name, name) for name in sorted(SCHEDULERS))]
                    scheduler = gr.Dropdown(schedulers, value="", label="Scheduler", min_width=120)
                    precision = gr.Dropdown(PRECISIONS, value="", label="Precision", min_width=120)
        with gr.Column(scale=2, min_width=320):
            with gr.Row(equal_height=True):
                go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                sheet = gr.Button("Sheet of strengths", min_width=120)
                beside = gr.Button("Checkpoints side by side", min_width=120)
                stop = gr.Button("Stop", variant="stop", min_width=80)
            command = command_box("play-command")
            status = gr.HTML(elem_id="play-status")
            result = gr.HTML(markup.paragraph(NOTHING_YET), elem_id="play-result")

    used = [first, *others]
    inputs = [*used, *weights, prompts, dial, seed, steps, images, width, height, guidance, negative, base, scheduler]
    inputs.append(precision)

    def request(given: tuple, one: bool = False, strengths: list[str] | None = None, only: str | None = None):
        chosen, factors = given[:MOST_ADAPTERS], given[MOST_ADAPTERS : 2 * MOST_ADAPTERS]
        text, strength, number, step_count, count, *sizes, without, model, kind, digits = given[2 * MOST_ADAPTERS :]
        pairs = adapters.weighted(chosen, factors) if only is None else [(only, 1.0)]
        written = adapters.lines(text)[: 1 if one else None]
        settings = {
            "pretrained_model_name_or_path": model.strip(),
            "num_images": 1 if one else count,
            "seed": number,
            "num_inference_steps": step_count,
            **dict(zip(("width", "height", "guidance_scale"), sizes)),
            "negative_prompt": without,
            "scheduler": kind,
            "mixed_precision": digits,
        }
        return adapters.generate_words(workspace, pairs, written, strengths or [f"{strength:g}"], settings)

    def played(requests: list[tuple], note: str = ""):
        """Run the commands one after the other, and show what there is; until then the earlier images stay."""
        commands = [[*jobs.words_of("delora_diffusers", "generate"), *words] for _, words, _ in requests]
        shown = markup.command(jobs.shown(*commands))
        waiting = "Generating ..." if player.pid is not None else "Loading the model, then generating ..."
        finished: list[tuple] = []

        def images() -> Any:
            return results_of(workspace, finished) if finished else gr.skip()

        yield shown, markup.paragraph(waiting), images()
        for title, words, folder in requests:

            def report(title=title, folder=folder, waiting=waiting) -> str:
                made = adapters.count_images(folder)
                what = " ".join(filter(None, ["Generating", title]))
                return markup.paragraph(f"{what}: {made} images done." if made else waiting)

            try:
                for text in jobs.while_running(lambda words=words: player.generate(words), report):
                    yield shown, text, images()
            except StoppedError as stopped:
                yield shown, markup.paragraph(f"{stopped} {GO_ON}"), images()
                return
            finished.append((title, folder))
            waiting = "Generating ..."
        yield shown, markup.paragraph(note), images()

    @reported
    @functools.partial(traced, place=1, outputs=3)
    def generate(*given: Any):
        yield from played([("", *request(given))])

    @reported
    @functools.partial(traced, place=1, outputs=3)
    def turn(*given: Any):
        yield from played([("", *request(given, one=True))])

    @reported
    @functools.partial(traced, place=1, outputs=3)
    def strengths(*given: Any):
        yield from played([("", *request(given, strengths=list(adapters.SHEET)))])

    @reported
    @functools.partial(traced, place=1, outputs=3)
    def side_by_side(*given: Any):
        run = (given[0] or "").partition("/")[0]
        labels = adapters.adapters_of(workspace, run)[::-1] if run else []
        if len(labels) < 2:
            raise InputError(
                f"the run {run} has no checkpoints beside its adapter; train with smaller checkpointing_steps, and "
                "without checkpoints_total_limit."
                if run
                else "no adapter is chosen; choose one of the run whose checkpoints to compare."
            )
        yield from played(
            [(label.partition("/")[2] or "finished", *request(given, one=True, only=label)) for label in labels],
            f"Each at strength {given[2 * MOST_ADAPTERS + 1]:g}, that of the dial.",
        )

    def end():
        player.close(BY_BUTTON)
        return markup.paragraph(f"{BY_BUTTON} {GO_ON}"), *[gr.update(interactive=True)] * 3

    result_of: dict[str, Any] = {
        "outputs": [command, status, result],
        "concurrency_id": "play",
        "concurrency_limit": 4,
    }
    running: list[Any] = [
        click(go, generate, inputs, **result_of),
        # While an image is being generated, the last position counts. The event `release` is not for the keyboard.
        dial.input(turn, inputs, trigger_mode="always_last", show_progress="hidden", **result_of),
        click(sheet, strengths, inputs, **result_of),
        click(beside, side_by_side, inputs, **result_of),
    ]
    stop.click(end, None, [status, go, sheet, beside], cancels=running, queue=False)

    @reported
    def follow(label: str | None, text: str, filled: str):
        """The prompt of an adapter in a place, unless another than that of the last one was written meanwhile."""
        prompt = adapters.prompt_of(workspace, label)
        if prompt is None or text.strip() not in ("", filled):
            return text, filled
        return (f"{prompt} {PLACE}",) * 2

    first.input(follow, [first, prompts, filled], [prompts, filled], show_progress="hidden")

    def refresh(*given: str | None):
        *chosen, text, filled = given
        now = adapters.adapters(workspace)
        # Nothing has been chosen before the tab is opened; an empty choice is the base model.
        first = chosen[0] if chosen[0] is not None else (now[0] if now else None)
        lists = [choices(["", *now], name or "", NONE[0]) for name in (first, *chosen[1:])]
        return [*lists, *follow(first, text or "", filled or "")]

    return [*used, prompts, filled], refresh


def results_of(workspace: Workspace, finished: list[tuple]) -> str:
    """The images of finished output folders: a group for each prompt and seed, unless each has a single image."""
    groups: dict[str, list[str]] = {}
    for title, folder in finished:
        records = adapters.generated(folder)
        several = title or len({record["strength"] for record in records}) > 1
        for record in records:
            image = f"{record['prompt']}, seed {record['seed']}"
            strength = f"strength {record['strength']:g}" if several or record["strength"] != 1 else ""
            shown = ", ".join(filter(None, [title, strength, "" if several else image]))
            url = markup.file_url(workspace, folder / record["file_name"])
            figure = markup.figure(url, f"generated image of {record['prompt']}", shown, link=url)
            groups.setdefault(image if several else "", []).append(figure)
    return "".join(
        (markup.heading(image, 2) if image else "")
        + markup.grid(
            figures, "generated images", 200 if not image else 90 if len(figures) == len(adapters.SHEET) else 120
        )
        for image, figures in groups.items()
    )
