"""Train: what to train with, start, stop and resume, and whether it works: curves, samples, progress and the log."""

from html import escape
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio import flags, markup, runs
from studio.player import Player
from studio.scorer import Scorer
from studio.tabs import run_view
from studio.tabs.common import choices, command_box, reported, set_choices
from studio.workspace import FIRST_SET, Workspace

SECONDS = 2.0
"""Between two looks at the run."""
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
SHOW_FORM = "() => document.getElementById('new-run').scrollIntoView()"
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
            gr.HTML(
                '<h2 id="new-run">New run</h2><p class="narrow"><a href="#run">Go to the runs and their curves</a></p>'
            )
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
                resume = gr.Button("Resume", min_width=100, interactive=False)
                steps = gr.Textbox(
                    label="Resume up to step", placeholder="as before", min_width=130, elem_id="resume-steps"
                )
                reuse = gr.Button("Use its settings", min_width=140, elem_id="reuse")
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
    def go_on(run_name: str | None, steps: str | None):
        runs.resume(workspace, _chosen(run_name), steps_in(steps))
        player.close()
        warn_of_others(workspace, run_name)
        return ""

    @reported
    def fill(run_name: str | None):
        """The settings of a run in the form, under a name that is free."""
        values = runs.form_values(workspace, _chosen(run_name))
        empty = {field.name: bool(field.default) if field.kind == "bool" else "" for field in offered}
        return (
            runs.free_name(workspace, _chosen(run_name)),
            set_choices(workspace, values.get(runs.PHOTOS)),
            *(values.get(name, empty[name]) for name in names),
        )

    def look(run_name: str | None, download: bool, before: Any):
        return run_view.looked(workspace, scorer, run_name, download, before)

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
    resume.click(go_on, [run, steps], steps).success(**looking, **hidden)
    reuse.click(fill, run, inputs).success(None, js=SHOW_FORM)
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


def steps_in(text: str | None) -> int | None:
    """The number of steps that was typed, None for none; a page that the server has forgotten gives None.

    Raises:
        InputError
    """
    typed = (text or "").strip()
    if not typed:
        return None
    if not typed.isdecimal():
        raise InputError(f"Resume up to step is {typed}; give a whole number, or leave it empty.")
    return int(typed)


def prompts_for(chosen_set: str | None, *prompts: str) -> list[Any]:
    """The prompts for a set of photos: those of the toy are there with the toy only; what was typed stays."""
    if chosen_set == FIRST_SET:
        return [prompt or text for prompt, text in zip(prompts, FIRST.values())]
    return ["" if prompt == text else gr.skip() for prompt, text in zip(prompts, FIRST.values())]


def warn_of_others(workspace: Workspace, name: str | None) -> None:
    """Say which other runs train while this one starts."""
    others = [state.name for state in runs.states(workspace) if state.status in run_view.ACTIVE and state.name != name]
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
    states = sorted(runs.states(workspace), key=lambda state: (state.status not in run_view.ACTIVE, -state.started))
    return choices([state.name for state in states], chosen)
