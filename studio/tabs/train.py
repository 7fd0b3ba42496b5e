"""Train: what to train with, start, stop and resume, and whether it works: curves, samples, progress and the log."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio import charts, flags, markup, progress, runs
from studio.player import Player
from studio.scorer import Scorer
from studio.tabs.common import choices, command_box, reported, set_choices
from studio.workspace import FIRST_SET, Workspace

SECONDS = 2.0
"""Between two looks at the run."""
ACTIVE = ("starting", "training", "stopping")
NEW_RUN = "my-subject"
DEPENDED_ON = ("pretrained_model_name_or_path", "recipe", "method", "optimizer")
"""Flags that change the defaults of others."""
FIRST = {"instance_prompt": "a photo of sks mug", "validation_prompt": "a photo of sks mug on the beach"}
"""The prompts for the toy that is there at the first start; photos of another subject need other ones."""
EXAMPLES = {
    "instance_prompt": "for example: a photo of sks dog",
    "validation_prompt": "one per line, for example: a photo of sks dog on the beach",
}
"""Placeholders of the prompts, which have no default."""
SCORE_SPAN = 0.1
"""The least length of the axes of DINO and CLIP-T, so that small differences look small."""
SHOW_RUN = "() => document.getElementById('run').scrollIntoView()"
SHOW_MEMORY = "() => document.getElementById('memory').scrollIntoView({block: 'nearest'})"


def build(workspace: Workspace, player: Player, scorer: Scorer):
    """Build the tab; returns the lists of runs and of photo sets, and the handler that fills them again.

    Args:
        player: its memory is freed before a run starts.
    """
    offered = flags.fields()
    defaults = flags.effective({})
    components: dict[str, Any] = {}
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=4, min_width=320):
            gr.HTML('<h2>New run</h2><p class="narrow"><a href="#run">Go to the runs and their curves</a></p>')
            name = gr.Textbox(NEW_RUN, label="Name of the run", info="A folder of this name is created.")
            sets = workspace.photo_sets()
            first_set = sets[0] if sets else None
            photo_set = gr.Dropdown(
                sets, value=first_set, label="Photo set", info="See the tab Photos.", elem_id="train-photos"
            )
            with gr.Group(), gr.Row(elem_classes="fields"):
                for field in offered:
                    if field.basic:
                        components[field.name] = component_of(field, defaults[field.name])
            for field_name, text in FIRST.items() if first_set == FIRST_SET else ():
                components[field_name].value = text
            with gr.Accordion("All other flags of the training script", open=False):
                for group in dict.fromkeys(field.group for field in offered if not field.basic):
                    with gr.Accordion(group.capitalize(), open=False):
                        for field in offered:
                            if field.group == group and not field.basic:
                                components[field.name] = component_of(field, defaults[field.name])
            command = command_box("train-command")
            with gr.Row(elem_classes="sticky", equal_height=True):
                start = gr.Button("Start training", variant="primary", elem_id="start", min_width=140)
                estimate = gr.Button("Estimate memory", min_width=140)
            memory = gr.HTML(elem_id="memory")
        with gr.Column(scale=7, min_width=320):
            gr.HTML("<h2>Did it work?</h2>")
            run = gr.Dropdown([], label="Run", elem_id="run")
            with gr.Row(equal_height=True):
                stop = gr.Button("Stop, keeping a checkpoint", variant="stop", min_width=140, interactive=False)
                resume = gr.Button("Resume", min_width=140, interactive=False)
            status = gr.HTML(elem_id="status")
            curves = gr.HTML(elem_id="curves")
            samples = gr.HTML(elem_id="samples")
            with gr.Accordion("Log", open=False):
                log = gr.HTML(elem_id="log")
            download = gr.Checkbox(
                False,
                label="Download DINO and CLIP, to score the samples of other models",
                info="Once, from the hub; they run on the CPU. Included encoders score the miniature's samples.",
            )
    seen, hints = gr.State(), gr.State(defaults)
    timer = gr.Timer(SECONDS)

    names, by_name = list(components), {field.name: field for field in offered}
    inputs = [name, photo_set, *components.values()]

    def filled(chosen_set: str | None, *given: Any) -> dict[str, Any]:
        return {**dict(zip(names, given)), runs.PHOTOS: chosen_set}

    @reported
    def begin(run_name: str, chosen_set: str | None, *given: Any):
        runs.start(workspace, run_name, filled(chosen_set, *given))
        player.close()  # the memory of the GPU is for training, which takes seconds until it needs it
        warn_of_others(workspace, run_name)
        return run_choices(workspace, run_name), runs.free_name(workspace, run_name), None

    def show_command(run_name: str, chosen_set: str | None, *given: Any):
        try:
            values = runs.planned(workspace, run_name, filled(chosen_set, *given))
            return markup.command(flags.shown(flags.command(values)))
        except InputError as error:  # something is still being typed
            return markup.paragraph(str(error), "failed")

    def adapt(shown: dict[str, Any], *given: Any):
        """Show the defaults that follow from the flags in ``DEPENDED_ON``."""
        values = dict(zip(names, given))
        try:
            now = flags.effective({name: values[name] for name in DEPENDED_ON})
        except InputError:  # something is still being typed
            return [gr.skip()] * (1 + len(names))
        hints = [
            gr.skip() if now[field.name] == shown[field.name] else gr.update(**hint_of(field, now[field.name]))
            for field in (by_name[name] for name in names)
        ]
        return [now, *hints]

    @reported
    def estimated(run_name: str, chosen_set: str | None, *given: Any):
        yield ""  # not that of other flags
        text = runs.estimate(workspace, filled(chosen_set, *given))
        yield markup.text_block(text, "memory estimate")

    @reported
    def end(run_name: str | None):
        runs.stop(workspace, _chosen(run_name))

    @reported
    def go_on(run_name: str | None):
        runs.resume(workspace, _chosen(run_name))
        player.close()
        warn_of_others(workspace, run_name)

    def look(run_name: str | None, download: bool, before: Any):
        return looked(workspace, scorer, run_name, download, before)

    looking: dict[str, Any] = {
        "fn": look,
        "inputs": [run, download, seen],
        "outputs": [status, curves, samples, log, stop, resume, seen],
    }
    hidden: dict[str, Any] = {"show_progress": "hidden"}
    begun = start.click(begin, inputs, [run, name, seen])
    begun.success(**looking, **hidden)
    begun.success(None, js=SHOW_RUN)
    gr.on([box.change for box in inputs], show_command, inputs, command, trigger_mode="always_last", **hidden)
    gr.on(
        [components[name].change for name in DEPENDED_ON],
        adapt,
        [hints, *components.values()],
        [hints, *components.values()],
        trigger_mode="always_last",
        **hidden,
    )
    prompts = [components[name] for name in FIRST]
    photo_set.change(prompts_for, [photo_set, *prompts], prompts, **hidden)
    estimating = estimate.click(estimated, inputs, memory)
    estimating.success(None, js=SHOW_MEMORY)
    changes = [box.change for box in components.values()]
    gr.on(changes, None, None, memory, js="() => ''", cancels=estimating, **hidden)
    stop.click(end, run).success(**looking, **hidden)
    resume.click(go_on, run).success(**looking, **hidden)
    run.change(**looking, **hidden)
    timer.tick(**looking, **hidden)
    blocks = gr.context.Context.root_block
    assert blocks is not None
    # Whoever opens the page finds the run that trains, or the latest.
    loaded = blocks.load(
        lambda: (run_choices(workspace, None), runs.free_name(workspace, NEW_RUN)), None, [run, name], **hidden
    )
    loaded.then(show_command, inputs, command, **hidden)

    def refresh(run_name: str | None, chosen_set: str | None, shown_set: str | None, followed: str | None):
        # The set that was opened last in the tab Photos is the one to train on, until another is chosen here.
        wanted = shown_set if shown_set != followed else chosen_set
        return run_choices(workspace, run_name), set_choices(workspace, wanted), shown_set

    return run, photo_set, refresh


def _chosen(name: str | None) -> str:
    if not name:
        raise InputError("no run is chosen; choose one in the list, or start one.")
    return name


def prompts_for(chosen_set: str | None, *prompts: str) -> list[Any]:
    """The prompts for a set of photos: those of the toy are there with the toy only; what was typed stays."""
    if chosen_set == FIRST_SET:
        return [prompt or text for prompt, text in zip(prompts, FIRST.values())]
    return ["" if prompt == text else gr.skip() for prompt, text in zip(prompts, FIRST.values())]


def warn_of_others(workspace: Workspace, name: str | None) -> None:
    """Say which other runs train while this one starts."""
    others = [state.name for state in runs.states(workspace) if state.status in ACTIVE and state.name != name]
    if others:
        are, all_of_them = ("is", "both") if len(others) == 1 else ("are", "all of them")
        gr.Warning(
            f"{escape(' and '.join(others))} {are} training too; {all_of_them} share the machine's memory.", duration=20
        )


def component_of(field: flags.Field, default: Any) -> Any:
    """The form's part for one flag: empty stands for the default, which is shown in grey."""
    label = field.name.replace("_", " ").capitalize()
    settings = {"label": label, "min_width": 150, "elem_id": f"flag-{field.name}"}
    settings |= hint_of(field, default)
    if field.kind == "bool":
        return gr.Checkbox(bool(field.default), **settings)
    if field.kind == "choice":
        return gr.Dropdown(value="", **settings)
    return gr.Textbox("", lines=2 if field.name == "validation_prompt" else 1, **settings)


def hint_of(field: flags.Field, default: Any) -> dict[str, Any]:
    """How the form's part for a flag explains it and shows its default, which the explanation then leaves out."""
    shown = text_of(default)
    info = flags.without_default(field.help) if shown else field.help
    if field.kind == "bool":
        return {"info": field.help}
    if field.kind == "choice":
        empty = "default" if shown in ("", "default") else f"{shown} (default)"
        return {"choices": [(empty, ""), *((choice, choice) for choice in field.choices or ())], "info": info}
    if shown:
        return {"placeholder": f"default: {shown}", "info": info}
    explained = info != flags.without_default(info)  # the default, which is not a value
    return {"placeholder": EXAMPLES.get(field.name, "default" if explained else ""), "info": info}


def text_of(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_choices(workspace: Workspace, chosen: str | None) -> Any:
    """All runs, those that train first, then the newest. The first is chosen unless there is another choice.

    A run is there from the moment it is started, before training creates its folder.
    """
    states = sorted(runs.states(workspace), key=lambda state: (state.status not in ACTIVE, -state.started))
    return choices([state.name for state in states], chosen)


def looked(workspace: Workspace, scorer: Scorer, name: str | None, download: bool, before: Any) -> list[Any]:
    """What the page shows of a run; what has not changed since the last look is not sent again."""
    if not name:
        nothing = markup.paragraph("No run yet: fill in the form and press Start training.")
        return [nothing, "", "", "", *buttons_of(None), None]
    try:
        state = runs.state(workspace, name)
        folder = workspace.run(name)
        samples = progress.samples(folder)
        parts = [
            status_of(state, samples),
            curves_of(progress.curves(folder), scorer.look(folder, samples, download), state.steps),
            samples_of(workspace, samples),
            markup.text_block(state.log_tail, "last lines of the log", "tail") if state.log_tail else "",
            *buttons_of(state.status),
        ]
    except InputError as error:
        parts = [markup.paragraph(str(error), "failed"), "", "", "", *buttons_of(None)]
    seen = [name, *(hash(str(part)) for part in parts)]
    shown = [
        gr.skip() if before and old == new else part for part, old, new in zip(parts, (before or [])[1:], seen[1:])
    ]
    return [*(shown if before and before[0] == name else parts), seen]


def buttons_of(status: str | None) -> list[Any]:
    """Which of Stop and Resume can be pressed."""
    return [gr.update(interactive=status in ACTIVE), gr.update(interactive=status in ("stopped", "failed", "lost"))]


def status_of(state: runs.RunState, samples: list[progress.Samples]) -> str:
    """What happens, how far it is and the time left, for people who look once in a while; at the end, what came out."""
    left = ""
    if state.status == "finished":
        left = verdict_of(samples)
    if state.seconds_left is not None and state.status in ACTIVE:
        left = f" About {markup.duration(state.seconds_left)} left."
    kind = {"failed": "failed", "lost": "failed", "finished": "done"}.get(state.status, "")
    return (
        f'<p class="status {kind}" role="status">{markup.escape(state.message + left)}</p>'
        + markup.progress(f"training of {state.name}: step {state.step} of {state.steps}", state.step, state.steps)
        + markup.paragraph(f"Step {state.step} of {state.steps}", "small")
    )


def verdict_of(samples: list[progress.Samples]) -> str:
    """How close the last samples come to the photos, and where to go on."""
    verdict = ""
    if samples and samples[-1].dino is not None:
        verdict = f" DINO {samples[-1].dino:.2f}"
        if samples[-1].photos_dino is not None:
            verdict += f", {progress.OF_PHOTOS} {samples[-1].photos_dino:.2f}"
        verdict += "."
    return f"{verdict} Try it in the tab Play."


def curves_of(curves: list[progress.Curve], note: str, steps: int) -> str:
    """The curves of the log and of the samples' scores over all steps of the run, and a note about scoring."""
    if not curves:
        return markup.paragraph("The curves begin with the first logged step.")
    parts = [
        charts.line_chart(
            curve.title,
            {curve.title: (curve.steps, curve.values)},
            x_end=steps,
            least=SCORE_SPAN if curve.tag in progress.SCORE_TITLES else 0,
            reference=curve.reference,
        )
        for curve in curves
    ]
    return f'<div class="charts">{"".join(parts)}</div>' + markup.paragraph(note)


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
