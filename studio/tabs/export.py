"""Export: adapters for other tools, merged models, the model card, and the upload to the hub."""

import shutil
import sys
from pathlib import Path
from typing import Any

import gradio as gr

from delora_diffusers.commands.export import DTYPES, FORMATS
from delora_diffusers.errors import InputError
from delora_diffusers.names import CONFIG_NAME, NOT_UPLOADED, WEIGHTS_NAME
from delora_diffusers.text_files import read_text
from studio import adapters, jobs, markup
from studio.tabs.common import MOST_ADAPTERS, NONE, choices, click, command_box, more_adapters, reported
from studio.workspace import Workspace

MERGES = {
    "merged folder": "diffusers, as a complete pipeline",
    "merged file": "AUTOMATIC1111, ComfyUI; a complete Stable Diffusion 1.x, 2.x or XL in one file",
}
CARD_NAME = "README.md"


def build(workspace: Workspace):
    """Build the tab; returns the event that fills its list of adapters again."""
    readers = {**FORMATS, **MERGES}
    with gr.Row():
        label = gr.Dropdown([], label="Adapter", elem_id="export-adapter")
        name = gr.Textbox("", label="Name of the export", placeholder="adapter and format, such as mug-kohya")
    others, weights = more_adapters()
    kind = gr.Radio(
        [(f"{name}: {reader}", name) for name, reader in readers.items()],
        value="diffusers",
        label="Format, and what reads it",
        elem_id="format",
    )
    with gr.Row() as of_adapters:
        dtype = gr.Dropdown(list(DTYPES), value=DTYPES[0], label="Precision")
        rank = gr.Textbox(
            "",
            label="Rank",
            placeholder="full rank, without loss",
            info="A lower rank makes a smaller file, which is less exact.",
        )
    go = gr.Button("Export", variant="primary", elem_id="export")
    command = command_box("export-command")
    message = gr.HTML(elem_id="export-message")
    gr.HTML("<h2>Model card</h2>")
    card = gr.HTML(elem_id="card")
    gr.HTML("<h2>Push to the hub</h2>")
    with gr.Row():
        repository = gr.Textbox("", label="Repository", placeholder="me/my-adapter", info="Needs `hf auth login`.")
        sure = gr.Checkbox(
            False, label="Yes, upload this run to the Hugging Face Hub, where others may be able to download it"
        )
    push = gr.Button("Push to the hub")
    push_command = command_box("push-command")
    push_message = gr.HTML(elem_id="push-message")

    @reported
    def export(kind: str, dtype: str, rank: str, name: str, *used: Any):
        pairs = adapters.weighted(used[:MOST_ADAPTERS], used[MOST_ADAPTERS:])
        words, output = export_words(workspace, pairs, kind, dtype, rank, name)
        shown = markup.command(jobs.shown(words))
        for text in jobs.run(words):
            yield shown, markup.text_block(text, "output of the export")
        yield shown, exported(workspace, output)

    @reported
    def show_card(label: str | None, repository: str):
        if not label:
            return "", ""
        run = workspace.run(label.partition("/")[0])
        if not (run / WEIGHTS_NAME).is_file():
            return markup.paragraph("The card is written when the run finishes; only finished runs are uploaded."), ""
        return card_of(workspace, run), markup.command(
            jobs.shown(push_words(workspace, label, repository.strip() or "me/my-adapter"))
        )

    @reported
    def upload(label: str | None, repository: str, sure: bool):
        words = push_words(workspace, label, repository.strip())
        if not repository.strip():
            raise InputError("there is no repository; give one, such as me/my-adapter.")
        if not sure:
            raise InputError("the upload is not confirmed; tick the box beside the repository first.")
        beside = Path(sys.executable).parent / "hf"
        program = str(beside) if beside.is_file() else shutil.which("hf")
        if program is None:
            raise InputError("the command hf is missing; run `pip install huggingface_hub`.")
        for text in jobs.run(words, program):
            yield markup.command(jobs.shown(words)), markup.text_block(text, "output of the upload")

    hidden: dict[str, Any] = {"show_progress": "hidden"}
    kind.change(lambda kind: gr.update(visible=kind not in MERGES), kind, of_adapters, **hidden)
    click(go, export, [kind, dtype, rank, name, label, *others, *weights], [command, message])
    gr.on(
        [label.change, repository.change], show_card, [label, repository], [card, push_command], show_progress="hidden"
    )
    click(push, upload, [label, repository, sure], [push_command, push_message])

    def refresh(chosen: str | None, repository: str, *more: str | None):
        now = adapters.adapters(workspace)
        update = choices(now, chosen)
        lists = [choices(["", *now], name or "", NONE[0]) for name in more]
        return update, *show_card(update["value"], repository), *lists

    return {"fn": refresh, "inputs": [label, repository, *others], "outputs": [label, card, push_command, *others]}


def export_words(
    workspace: Workspace, used: list[tuple[str, float]], kind: str, dtype: str, rank: str, name: str
) -> tuple[list[str], Path]:
    """The command of an export, and what it writes.

    Args:
        used: adapters with their weights, whose updates are added.

    Raises:
        InputError: nothing is chosen, or the name cannot be used.
    """
    if not used:
        raise InputError("no adapter is chosen; train one first, or choose one in the list.")
    source = adapters.adapter_words(workspace, used)
    named = "-and-".join(label.replace("/", "-") for label, _ in used)
    output = workspace.output(name.strip() or f"{named}-{kind.replace(' ', '-')}")
    if kind in MERGES:
        flag = "--output_dir" if kind == "merged folder" else "--single_file"
        if flag == "--single_file":
            output = output.with_name(output.name + ".safetensors")
        words = ["merge", *source, flag, str(jobs.short(output))]
    else:
        if kind == "kohya":
            output = output.with_name(output.name + ".safetensors")
        words = ["export", *source, "--format", kind, "--output", str(jobs.short(output))]
        words += ["--dtype", dtype] if dtype != DTYPES[0] else []
        words += adapters.flag("rank", rank.strip())
    return jobs.words_of("delora_diffusers", *words), output


def exported(workspace: Workspace, output: Path) -> str:
    """What an export wrote, with links."""
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    items = [
        f'<li><a href="{markup.escape(markup.file_url(workspace, file))}" target="_blank" rel="noopener">'
        f"{markup.escape(file.relative_to(workspace.outputs).as_posix())}</a> "
        f"({markup.size(file.stat().st_size)})</li>"
        for file in files[:50]
    ]
    return markup.paragraph(f"Wrote {output}.", "done") + f"<ul>{''.join(items)}</ul>"


def card_of(workspace: Workspace, run: Path) -> str:
    """A run's model card, and the images that it shows.

    Raises:
        InputError: it is not text, or a link to a file outside the workspace.
    """
    file = workspace.within(run / CARD_NAME)
    text = read_text(file) if file.is_file() else "This run has no card."
    figures = [
        markup.figure(markup.file_url(workspace, file), f"sample {file.name}", file.name)
        for file in sorted((run / "samples").glob("*.png"))
    ]
    return markup.text_block(text, "model card") + markup.grid(figures, "images of the model card", 120)


def push_words(workspace: Workspace, label: str | None, repository: str) -> list[str]:
    """The command that uploads a run without its checkpoints, logs and class images, as ``--push_to_hub`` does.

    Raises:
        InputError: no adapter is chosen.
    """
    if not label:
        raise InputError("no adapter is chosen; train one first, or choose one in the list.")
    if repository.startswith("-"):
        raise InputError(f"{repository} is not the name of a repository; give one, such as me/my-adapter.")
    folder = adapters.adapter(workspace, label.partition("/")[0])
    kept_here = (*NOT_UPLOADED, CONFIG_NAME)  # config.json names folders of this machine
    return ["hf", "upload", repository, str(folder), *(word for p in kept_here for word in ("--exclude", p))]
