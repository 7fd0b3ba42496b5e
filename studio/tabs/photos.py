"""Photos: the sets of the workspace, each photo as training will read it, captions, masks and warnings."""

from pathlib import Path
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio import markup, photos
from studio.tabs.common import reported, sentence, set_choices
from studio.workspace import Workspace


def build(workspace: Workspace, resolution: int, bucket_step: int) -> gr.Dropdown:
    """Build the tab; returns the list of sets, which other tabs follow.

    Args:
        resolution, bucket_step: of the included miniature, with which the page opens.
    """
    sets = workspace.photo_sets()
    with gr.Row():
        name = gr.Dropdown(
            sets,
            value=sets[0] if sets else "",
            label="Photo set",
            info="Choose a set, or type the name of a new one and add photos.",
            allow_custom_value=True,
            scale=2,
        )
        side = gr.Number(
            resolution, label="Resolution", info="Side in pixels that training uses.", precision=0, minimum=8, scale=1
        )
        step = gr.Number(
            bucket_step, label="Bucket step", info="Photos keep their shape in steps of so many pixels.", precision=0,
            minimum=8, scale=1,
        )  # fmt: skip
        square = gr.Checkbox(False, label="Crop to squares", info="Instead of keeping each photo's shape.", scale=1)
    with gr.Row():
        files = gr.File(
            label="Add photos (images or a .zip)",
            file_count="multiple",
            height=170,
            scale=2,
        )
        folder = gr.UploadButton("Choose a folder of photos", file_count="directory", scale=1)
    uploaded = gr.HTML(elem_id="photos-message")
    overview = gr.HTML(elem_id="photos-overview")
    with gr.Accordion("Edit a photo: caption, mask, remove", open=True), gr.Row():
        with gr.Column():
            file = gr.Dropdown([], label="Photo")
            caption = gr.Textbox(
                label="Caption",
                lines=2,
                info="What the photo shows; saved as a text file beside it. Empty: the instance prompt is used.",
            )
            save = gr.Button("Save caption", variant="primary")
        with gr.Column():
            mask = gr.File(label="Mask (white on the subject)", file_count="single", file_types=["image"], height=170)
            with gr.Row():
                remove = gr.Button("Remove this photo", variant="stop")
                undo = gr.Button("Undo the last removal", visible=False)
            message = gr.HTML(elem_id="edit-message")

    @reported
    def show(name: str, side: int, step: int, square: bool, chosen: str | None):
        if not name or name not in workspace.photo_sets():
            return new_set(workspace, name), gr.update(choices=[], value=None), "", removable(name)
        info = photos.inspect_set(workspace, name, int(side or 0), square, int(step or 0))
        names = [photo.file for photo in info.photos]
        selected = chosen if chosen in names else names[0] if names else None
        return (
            overview_of(workspace, info),
            gr.update(choices=names, value=selected),
            caption_of(info, selected),
            removable(name),
        )

    def removable(name: str) -> Any:
        try:
            return gr.update(visible=bool(name) and photos.has_removed(workspace, name))
        except InputError:
            return gr.update(visible=False)

    @reported
    def choose(name: str, side: int, step: int, square: bool, chosen: str | None):
        if not chosen or name not in workspace.photo_sets():
            return ""
        return caption_of(photos.inspect_set(workspace, name, int(side or 0), square, int(step or 0)), chosen)

    @reported
    def add(name: str, paths: list[str] | None):
        if not name:
            raise InputError("the set has no name; type one, then add the photos again.")
        try:
            added = photos.import_photos(workspace, name, [Path(path) for path in paths or []])
        except InputError as error:
            return set_choices(workspace, name), None, markup.notes([sentence(error)])
        done = markup.paragraph(f"Added {', '.join(added.files)} to {name}." if added.files else "", "done")
        return set_choices(workspace, name), None, done + markup.notes(added.refused)

    @reported
    def store(name: str, file: str | None, text: str):
        photos.save_caption(workspace, name, _chosen(file), text)
        return markup.paragraph(f"Saved the caption of {file}.", "done")

    @reported
    def store_mask(name: str, file: str | None, path: str | None):
        try:
            photos.save_mask(workspace, name, _chosen(file), Path(path or ""))
        except InputError as error:
            return None, markup.notes([sentence(error)])
        return None, markup.paragraph(f"Saved the mask of {file}; train with --use_masks.", "done")

    @reported
    def discard(name: str, file: str | None):
        photos.remove_photo(workspace, name, _chosen(file))
        return markup.paragraph(f"Removed {file}, with its caption and mask.", "done")

    @reported
    def restore(name: str):
        return markup.paragraph(f"Restored {photos.restore_photo(workspace, name)}.", "done")

    shape = [name, side, step, square]
    shown: dict[str, Any] = {
        "fn": show,
        "inputs": [*shape, file],
        "outputs": [overview, file, caption, undo],
        "show_progress": "hidden",
    }
    gr.on([name.change, side.change, step.change, square.change], **shown)
    file.input(choose, [*shape, file], caption, show_progress="hidden")
    files.upload(add, [name, files], [name, files, uploaded]).then(**shown)
    folder.upload(add, [name, folder], [name, folder, uploaded]).then(**shown)
    save.click(store, [name, file, caption], message).success(**shown)
    mask.upload(store_mask, [name, file, mask], [mask, message]).success(**shown)
    remove.click(discard, [name, file], message).success(**shown)
    undo.click(restore, name, message).success(**shown)
    blocks = gr.context.Context.root_block
    assert blocks is not None
    blocks.load(lambda chosen: set_choices(workspace, chosen), name, name, show_progress="hidden").then(**shown)
    return name


def _chosen(file: str | None) -> str:
    if not file:
        raise InputError("no photo is chosen; choose one in the list.")
    return file


def new_set(workspace: Workspace, name: str) -> str:
    """What is shown of a set that does not exist: that photos create it, unless its name cannot be used."""
    if not name:
        return markup.paragraph("Choose a photo set.")
    try:
        workspace.photo_set(name)
    except InputError as error:
        return markup.notes([sentence(error)])
    return markup.paragraph(f"{name} is a new set: add photos to create it.")


def caption_of(info: photos.SetInfo, file: str | None) -> str:
    """The caption of a photo of a set."""
    return next((photo.caption or "" for photo in info.photos if photo.file == file), "")


def overview_of(workspace: Workspace, info: photos.SetInfo) -> str:
    """All photos of a set, with what training makes of them."""
    figures = []
    for photo in info.photos:
        if photo.problem is not None:
            figures.append(
                '<figure><div class="unreadable" role="img" aria-label="unreadable"></div>'
                f"<figcaption>{markup.escape(photo.file)}"
                f'<span class="note">{markup.escape(photo.problem)}</span></figcaption></figure>'
            )
            continue
        size = f"{photo.width} x {photo.height}, trained as {photo.view[0]} x {photo.view[1]}"
        caption = f"{photo.file}: {size}" + (f". “{photo.caption}”" if photo.caption else "")
        caption += ". Has a mask" if photo.mask else ""
        version = (workspace.photo_set(info.name) / photo.file).stat().st_mtime_ns
        url = markup.photo_url(info.name, photo.file, photo.crop, version)
        figures.append(markup.figure(url, f"photo {photo.file}", caption, photo.warnings))
    count = f"{len(info.photos)} photos" if len(info.photos) != 1 else "1 photo"
    return (
        markup.heading(f"{info.name}: {count}", 2)
        + markup.notes(info.warnings)
        + markup.grid(figures, f"photos of {info.name}", 190)
    )
