"""Export: adapters for other tools, merged models, the model card, and the upload to the hub."""

import shutil
import sys
from pathlib import Path

import gradio as gr

from delora_diffusers.commands.export import DTYPES, FORMATS
from delora_diffusers.errors import InputError
from delora_diffusers.names import NOT_UPLOADED, WEIGHTS_NAME
from delora_diffusers.text_files import read_text
from studio import adapters, jobs, markup
from studio.tabs.common import choices, command_box, reported
from studio.workspace import Workspace

MERGES = {
    "merged folder": "a complete pipeline for diffusers, without this project",
    "merged file": "one .safetensors of Stable Diffusion 1.x, 2.x or XL for AUTOMATIC1111 and ComfyUI",
}
CARD_NAME = "README.md"


def build(workspace: Workspace):
    """Build the tab; returns the event that fills its list of adapters again."""
    readers = {**FORMATS, **MERGES}
    with gr.Row():
        label = gr.Dropdown([], label="Adapter", elem_id="export-adapter")
        name = gr.Textbox("", label="Name of the export", placeholder="the adapter's name with the format's")
    kind = gr.Radio(
        [(f"{name}: for {reader}", name) for name, reader in readers.items()],
        value="diffusers",
        label="Format",
        info="Who reads it.",
        elem_id="format",
    )
    with gr.Row():
        dtype = gr.Dropdown(list(DTYPES), value=DTYPES[0], label="Precision")
        rank = gr.Textbox("", label="Rank", placeholder="full rank, without loss", info="Truncates to this rank.")
    go = gr.Button("Export", variant="primary", elem_id="export")
    command = command_box("export-command")
    message = gr.HTML(elem_id="export-message")
    gr.HTML("<h2>Model card</h2>")
    card = gr.HTML(elem_id="card")
    gr.HTML("<h2>Push to the hub</h2>")
    with gr.Row():
        repository = gr.Textbox("", label="Repository", placeholder="me/my-adapter", info="Needs `hf auth login`.")
        sure = gr.Checkbox(False, label="Upload this run; others may be able to download it")
    push = gr.Button("Push to the hub")
    push_command = command_box("push-command")
    push_message = gr.HTML(elem_id="push-message")

    @reported
    def export(label: str | None, kind: str, dtype: str, rank: str, name: str):
        words, output = export_words(workspace, label, kind, dtype, rank, name)
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
        text = read_text(run / CARD_NAME) if (run / CARD_NAME).is_file() else "This run has no card."
        return markup.text_block(text, "model card"), markup.command(
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

    go.click(export, [label, kind, dtype, rank, name], [command, message])
    gr.on(
        [label.change, repository.change], show_card, [label, repository], [card, push_command], show_progress="hidden"
    )
    push.click(upload, [label, repository, sure], [push_command, push_message])

    def refresh(chosen: str | None, repository: str):
        update = choices(adapters.adapters(workspace), chosen)
        return update, *show_card(update["value"], repository)

    return {"fn": refresh, "inputs": [label, repository], "outputs": [label, card, push_command]}


def export_words(
    workspace: Workspace, label: str | None, kind: str, dtype: str, rank: str, name: str
) -> tuple[list[str], Path]:
    """The command of an export, and what it writes.

    Raises:
        InputError: nothing is chosen, or the name cannot be used.
    """
    if not label:
        raise InputError("no adapter is chosen; train one first, or choose one in the list.")
    source = adapters.adapter(workspace, label)
    output = workspace.output(name.strip() or f"{label.replace('/', '-')}-{kind.replace(' ', '-')}")
    if kind in MERGES:
        flag = "--output_dir" if kind == "merged folder" else "--single_file"
        if flag == "--single_file":
            output = output.with_name(output.name + ".safetensors")
        words = ["merge", "--adapter", str(source), flag, str(jobs.short(output))]
    else:
        if kind == "kohya":
            output = output.with_name(output.name + ".safetensors")
        words = ["export", "--adapter", str(source), "--format", kind, "--output", str(jobs.short(output))]
        words += ["--dtype", dtype] if dtype != DTYPES[0] else []
        words += adapters.flag("rank", rank.strip())
    return jobs.words_of("delora_diffusers", *words), output


def exported(workspace: Workspace, output: Path) -> str:
    """What an export wrote, with links."""
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    items = [
        f'<li><a href="{markup.escape(markup.file_url(workspace, file))}" target="_blank" rel="noopener">'
        f"{markup.escape(file.relative_to(workspace.outputs).as_posix())}</a> "
        f"({file.stat().st_size / 2**20:.2f} MiB)</li>"
        for file in files[:50]
    ]
    return markup.paragraph(f"Wrote {output}.", "done") + f"<ul>{''.join(items)}</ul>"


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
    return ["hf", "upload", repository, str(folder), *(word for p in NOT_UPLOADED for word in ("--exclude", p))]
