"""What every tab needs: mistakes shown as a sentence, commands that can be copied, lists that follow the workspace."""

import functools
import inspect
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio import markup
from studio.uploads import FULL, is_full
from studio.workspace import Workspace


def sentence(error: InputError) -> str:
    """Its message, which begins with a small letter for the command line."""
    text = str(error)
    return text[:1].upper() + text[1:]


def reported(function: Callable) -> Callable:
    """An event handler whose ``InputError`` the page shows; gradio renders messages as HTML, so this escapes it."""

    def shown(error: InputError) -> gr.Error:
        return gr.Error(escape(sentence(error)), duration=20, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*arguments: Any, **named: Any):
            try:
                yield from function(*arguments, **named)
            except InputError as error:
                raise shown(error) from error
            except OSError as error:
                raise shown(_full_disk(error)) from error

        return generator

    @functools.wraps(function)
    def handler(*arguments: Any, **named: Any):
        try:
            return function(*arguments, **named)
        except InputError as error:
            raise shown(error) from error
        except OSError as error:
            raise shown(_full_disk(error)) from error

    return handler


def traced(function: Callable, place: int, outputs: int) -> Callable:
    """A generating event handler whose mistakes stay in one of its outputs, after the message on the page is gone."""

    @functools.wraps(function)
    def generator(*arguments: Any):
        try:
            yield from function(*arguments)
        except InputError as error:
            updates: list[Any] = [gr.skip()] * outputs
            updates[place] = markup.notes([sentence(error)])
            yield updates
            raise

    return generator


def click(button: gr.Button, function: Callable, inputs: Any, outputs: list[Any], **settings: Any) -> Any:
    """An event of a button that cannot be pressed again until its generating handler has ended.

    Whatever cancels the event has to enable the button, too.
    """

    @functools.wraps(function)
    def generator(*arguments: Any):
        updates: Any = [gr.skip()] * len(outputs)
        yield *updates, gr.update(interactive=False)
        try:
            for updates in function(*arguments):
                yield *updates, gr.skip()
        except Exception:
            yield *updates, gr.update(interactive=True)
            raise
        yield *updates, gr.update(interactive=True)

    return button.click(generator, inputs, [*outputs, button], show_progress="hidden", **settings)


def _full_disk(error: OSError) -> InputError:
    """The sentence for a full disk; any other error is a fault of the program, and raised again."""
    if not is_full(error):
        raise error
    return InputError(FULL)


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


MOST_ADAPTERS = 3
NONE = ("none", "")
"""The choice of no adapter."""
DEFAULT = ("default", "")
"""The choice of what the command itself would use."""
PRECISIONS = [DEFAULT, ("fp32", "no"), ("fp16", "fp16"), ("bf16", "bf16")]
"""Of ``--mixed_precision``."""


def more_adapters() -> tuple[list[gr.Dropdown], list[gr.Number]]:
    """What is folded away beside the list of the first adapter: lists of others, and the weights of all."""
    with gr.Accordion("More adapters and weights", open=False):
        weights, others = [gr.Number(1.0, label="Weight of the adapter", min_width=90)], []
        for number in range(2, MOST_ADAPTERS + 1):
            with gr.Row():
                others.append(gr.Dropdown([NONE], value="", label=f"Adapter {number}", min_width=170))
                weights.append(gr.Number(1.0, label=f"Weight {number}", min_width=90))
    return others, weights


def choices(names: list[str], chosen: Any = None, empty: str = "") -> Any:
    """An update of a dropdown: these names, and what was chosen if it is still among them, or the first.

    Args:
        empty: how an empty name is shown.
    """
    value = chosen if chosen in names else names[0] if names else None
    return gr.update(choices=[(name or empty, name) for name in names], value=value)


def set_choices(workspace: Workspace, chosen: Any = None) -> Any:
    return choices(workspace.photo_sets(), chosen)
