"""What every tab needs: mistakes shown as a sentence, commands that can be copied, lists that follow the workspace."""

import functools
import inspect
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio.workspace import Workspace


def reported(function: Callable) -> Callable:
    """An event handler whose ``InputError`` the page shows; gradio renders messages as HTML, so this escapes it."""

    def shown(error: InputError) -> gr.Error:
        return gr.Error(escape(str(error)), duration=20, title="Not done", print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*arguments: Any, **named: Any):
            try:
                yield from function(*arguments, **named)
            except InputError as error:
                raise shown(error) from error

        return generator

    @functools.wraps(function)
    def handler(*arguments: Any, **named: Any):
        try:
            return function(*arguments, **named)
        except InputError as error:
            raise shown(error) from error

    return handler


COPY = """
element.addEventListener("click", (event) => {
  if (!event.target.matches(".copy")) return;
  const code = element.querySelector("code");
  getSelection().selectAllChildren(code);
  // The clipboard is only there on this machine or with TLS; elsewhere the text is selected.
  navigator.clipboard?.writeText(code.innerText).then(() => {
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy"; }, 2000);
  }, () => {});
});
"""


def command_box(elem_id: str) -> gr.HTML:
    """Where the command of an action is shown, to copy; see ``markup.command``.

    Gradio's text fields would do, but their label belongs to the copy button, and what is in them cannot be reached
    with the keyboard.
    """
    return gr.HTML(elem_id=elem_id, js_on_load=COPY)


def choices(names: list[str], chosen: Any = None) -> Any:
    """An update of a dropdown: these names, and what was chosen if it is still among them, or the first."""
    value = chosen if chosen in names else names[0] if names else None
    return gr.update(choices=names, value=value)


def set_choices(workspace: Workspace, chosen: Any = None) -> Any:
    return choices(workspace.photo_sets(), chosen)
