"""Train: what to train with, start, stop and resume, and whether it works: curves, samples, progress and the log."""

from pathlib import Path
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio import charts, flags, markup, progress, runs
from studio.player import Player
from studio.tabs.common import choices, command_box, reported, set_choices
from studio.workspace import Workspace

SECONDS = 2.0
"""Between two looks at the run."""
ACTIVE = ("starting", "training", "stopping")
NEW_RUN = "my-subject"


def build(workspace: Workspace, player: Player):
    """Build the tab; returns the lists of runs and of photo sets, and the handler that fills them again.

    Args:
        player: its memory is freed before a run starts.
    """
    offered = flags.fields()
    defaults = flags.effective({})
    with gr.Row():
        name = gr.Textbox(NEW_RUN, label="Name of the new run", info="A folder of this name is created.")
        photo_set = gr.Dropdown(
            workspace.photo_sets(), label="Photo set", info="See the tab Photos.", elem_id="train-photos"
        )
    components: dict[str, Any] = {}
    with gr.Group(), gr.Row(elem_classes="fields"):
        for field in offered:
            if field.basic:
                components[field.name] = component_of(field, defaults[field.name])
    with gr.Accordion("All other flags of the training script", open=False):
        groups = dict.fromkeys(field.group for field in offered if not field.basic)
        for group in groups:
            with gr.Accordion(group.capitalize(), open=False), gr.Row(elem_classes="fields"):
                for field in offered:
                    if field.group == group and not field.basic:
                        components[field.name] = component_of(field, defaults[field.name])
    with gr.Row():
        start = gr.Button("Start training", variant="primary", elem_id="start")
        estimate = gr.Button("Estimate memory")
    command = command_box("Command of the run")
    memory = gr.HTML(elem_id="memory")

    gr.HTML("<h2>Did it work?</h2>")
    with gr.Row():
        run = gr.Dropdown(workspace.run_names(), label="Run", elem_id="run", scale=3)
        stop = gr.Button("Stop (keeps a checkpoint)", variant="stop", scale=1)
        resume = gr.Button("Resume", scale=1)
    status = gr.HTML(elem_id="status")
    curves = gr.HTML(elem_id="curves")
    samples = gr.HTML(elem_id="samples")
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(
            label="Last lines of the log", interactive=False, lines=10, max_lines=20, buttons=["copy"], elem_id="log"
        )
    seen = gr.State()
    timer = gr.Timer(SECONDS)

    names = list(components)
    inputs = [name, photo_set, *components.values()]

    def filled(chosen_set: str | None, *given: Any) -> dict[str, Any]:
        return {**dict(zip(names, given)), runs.PHOTOS: chosen_set}

    @reported
    def begin(run_name: str, chosen_set: str | None, *given: Any):
        player.close()  # the memory of the GPU is for training
        state = runs.start(workspace, run_name, filled(chosen_set, *given))
        return choices(workspace.run_names(), run_name), state.command, None

    def show_command(run_name: str, chosen_set: str | None, *given: Any):
        try:
            return flags.shown(flags.command(runs.planned(workspace, run_name, filled(chosen_set, *given))))
        except InputError as error:  # something is still being typed
            return str(error)

    @reported
    def estimated(run_name: str, chosen_set: str | None, *given: Any):
        text = runs.estimate(workspace, filled(chosen_set, *given))
        return f'<pre tabindex="0" aria-label="memory estimate">{markup.escape(text)}</pre>'

    @reported
    def end(run_name: str | None):
        runs.stop(workspace, _chosen(run_name))

    @reported
    def go_on(run_name: str | None):
        player.close()
        runs.resume(workspace, _chosen(run_name))

    def look(run_name: str | None, before: Any):
        return looked(workspace, run_name, before)

    looking = {"fn": look, "inputs": [run, seen], "outputs": [status, curves, samples, log, seen]}
    hidden = {"show_progress": "hidden"}
    start.click(begin, inputs, [run, command, seen]).success(**looking, **hidden)
    gr.on([box.change for box in inputs], show_command, inputs, command, trigger_mode="always_last", **hidden)
    estimate.click(estimated, inputs, memory)
    stop.click(end, run).success(**looking, **hidden)
    resume.click(go_on, run).success(**looking, **hidden)
    run.change(**looking, **hidden)
    timer.tick(**looking, **hidden)
    blocks = gr.context.Context.root_block
    assert blocks is not None
    # Whoever opens the page finds the run that trains, or the latest.
    loaded = blocks.load(lambda: (choices(workspace.run_names(), newest(workspace)),), None, run, **hidden)
    loaded.then(show_command, inputs, command, **hidden)

    def refresh(run_name: str | None, chosen_set: str | None):
        return choices(workspace.run_names(), run_name or newest(workspace)), set_choices(workspace, chosen_set)

    return run, photo_set, refresh


def _chosen(name: str | None) -> str:
    if not name:
        raise InputError("no run is chosen; choose one in the list, or start one.")
    return name


def component_of(field: flags.Field, default: Any) -> Any:
    """The form's part for one flag: empty stands for the default, which is shown in grey."""
    label, shown = field.name.replace("_", " ").capitalize(), text_of(default)
    settings = {"label": label, "info": field.help, "min_width": 260, "elem_id": f"flag-{field.name}"}
    if field.kind == "bool":
        return gr.Checkbox(bool(field.default), **settings)
    if field.kind == "choice":
        empty = (f"default ({shown})" if shown else "default", "")
        return gr.Dropdown([empty, *[(choice, choice) for choice in field.choices or ()]], value="", **settings)
    lines = 2 if field.name == "validation_prompt" else 1
    hint = "one per line; " if field.kind == "list" and lines > 1 else ""
    placeholder = f"{hint}default: {shown}" if shown else f"{hint}default"
    return gr.Textbox("", placeholder=placeholder, lines=lines, **settings)


def text_of(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def newest(workspace: Workspace) -> str | None:
    """The run that trains, or else the latest."""
    states = runs.states(workspace)
    states.sort(key=lambda state: (state.status in ACTIVE, state.started), reverse=True)
    return states[0].name if states else None


def looked(workspace: Workspace, name: str | None, before: Any) -> list[Any]:
    """What the page shows of a run; what has not changed since the last look is not sent again."""
    if not name:
        nothing = markup.paragraph("No run yet: fill in the form and press Start training.")
        return [nothing, "", "", "", None]
    try:
        state = runs.state(workspace, name)
        folder = workspace.run(name)
        parts = [
            status_of(state),
            curves_of(progress.curves(folder), progress.samples(folder)),
            samples_of(workspace, progress.samples(folder)),
            state.log_tail,
        ]
    except InputError as error:
        parts = [markup.paragraph(str(error), "failed"), "", "", ""]
    seen = [name, *map(hash, parts)]
    shown = [gr.skip() if before and old == new else part for part, old, new in zip(parts, (before or [])[1:], seen[1:])]
    return [*(shown if before and before[0] == name else parts), seen]


def status_of(state: runs.RunState) -> str:
    """Progress, time left and what happened, for people who look once in a while."""
    left = ""
    if state.seconds_left is not None and state.status in ACTIVE:
        left = f", about {markup.duration(state.seconds_left)} left"
    line = f"{state.status.capitalize()}: step {state.step} of {state.steps}{left}"
    kind = {"failed": "failed", "lost": "failed", "finished": "done"}.get(state.status, "")
    return (
        f'<p class="status {kind}" role="status">{markup.escape(line)}</p>'
        + markup.progress(f"training of {state.name}", state.step, state.steps)
        + markup.paragraph(state.message, kind)
    )


def curves_of(curves: list[progress.Curve], samples: list[progress.Samples]) -> str:
    """The curves of the log, and the scores of each validation's samples."""
    parts = [charts.line_chart(curve.title, {curve.title: (curve.steps, curve.values)}) for curve in curves]
    for title, key in (("DINO of the samples (subject)", "dino"), ("CLIP-T of the samples (prompt)", "clip_t")):
        scored = [(sample.step, getattr(sample, key)) for sample in samples if getattr(sample, key) is not None]
        if scored:
            steps, values = zip(*scored)
            parts.append(charts.line_chart(title, {title: (steps, values)}))
    if not parts:
        return markup.paragraph("The curves begin with the first logged step.")
    return f'<div class="charts">{"".join(parts)}</div>'


def samples_of(workspace: Workspace, samples: list[progress.Samples]) -> str:
    """The images of each validation, newest first."""
    parts = []
    for sample in reversed(samples):
        scores = [f"DINO {sample.dino:.3f}"] if sample.dino is not None else []
        scores += [f"CLIP-T {sample.clip_t:.3f}"] if sample.clip_t is not None else []
        title = f"Samples at step {sample.step}" + (f" ({', '.join(scores)})" if scores else "")
        figures = [
            markup.figure(markup.file_url(workspace, Path(path)), f"sample of {prompt}", f"{prompt}, seed {seed}")
            for path, prompt, seed in sample.images
        ]
        parts.append(markup.heading(title) + markup.grid(figures, title, 150))
    return "".join(parts)
