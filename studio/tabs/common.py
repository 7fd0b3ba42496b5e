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


def command_box(label: str = "Command") -> gr.Textbox:
    """The command of the last action, to copy."""
    return gr.Textbox(label=label, interactive=False, lines=1, max_lines=6, buttons=["copy"], elem_classes="command")


def choices(names: list[str], chosen: Any = None) -> Any:
    """An update of a dropdown: these names, and what was chosen if it is still among them, or the first."""
    value = chosen if chosen in names else names[0] if names else None
    return gr.update(choices=names, value=value)


def set_choices(workspace: Workspace, chosen: Any = None) -> Any:
    return choices(workspace.photo_sets(), chosen)
