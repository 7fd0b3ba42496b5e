"""The process that generates for the page and keeps the model from one command to the next.

It reads the words of one ``generate`` command per line from standard input, as a JSON list, and answers each with a
line of JSON. The images are those of the command: this runs the command's own code and only keeps what that loads. It
ends with the process that started it, and after a while without commands, which frees the GPU.
"""

import argparse
import json
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from delora_diffusers.commands import generate, generate_model
from delora_diffusers.commands.generate_requests import scaled
from delora_diffusers.errors import InputError, reason
from delora_diffusers.memory import ANYWHERE, is_out_of_memory, out_of_memory_sentence

MOST_PROMPTS = 64
"""How many sets of encoded prompts are kept."""


class KeptModel:
    """``load_model`` of ``generate`` for several commands in one process: what does not change is not loaded again."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._key: Any = None
        self._model: Any = None
        self._scheduler: Any = None
        self._adapted: Any = None
        self._adapters: Any = None
        self._prompts: OrderedDict[Any, Any] = OrderedDict()

    def load(self, options: argparse.Namespace, base_model, adapters: list[Path], batches, accelerator):
        """The same as ``generate_model.load_model``."""
        import copy

        from delora_diffusers.adapter.control import attached_control, detach_control
        from delora_diffusers.pipelines.adapted_pipeline import AdaptedModel

        key = (base_model, options.base_precision, accelerator.mixed_precision)
        if options.offload or key != self._key:
            self._forget()
            _empty_caches()
        if options.offload:  # the blocks carry hooks, which belong to one set of adapters
            return generate_model.load_model(options, base_model, adapters, batches, accelerator)
        if self._model is None:
            self._model = base_model.open()
            self._scheduler = self._model.pipeline.scheduler
        model = self._model
        # A scheduler remembers the last images; the command begins with a new one.
        model.pipeline.scheduler = copy.deepcopy(self._scheduler)
        generate_model.check_placement(options, batches, accelerator.device)
        generate_model.check_model(model, options, base_model, batches, accelerator)
        files = _versions(adapters)
        prompts = self._encoded(options, adapters, files, batches, accelerator)
        if self._adapted is None:
            self._adapted = generate_model.load_denoiser(model, options, adapters, accelerator)
        elif files != self._adapters:
            denoiser = self._adapted.model
            self._adapted.use([])
            if attached_control(denoiser) is not None:
                detach_control(denoiser)
            self._adapted = AdaptedModel(denoiser, model.family.DENOISER, adapters)
        self._adapters, self._key = files, key
        return generate_model.Loaded(model, self._adapted, prompts)

    def _encoded(self, options: argparse.Namespace, adapters: list[Path], files, batches, accelerator):
        """The encoded prompts; with a text encoder that is adapted they depend on the adapters and their strengths."""
        from delora_diffusers.pipelines.adapted_pipeline import adapted_components

        of_encoders = set(adapted_components(adapters)) - {self._model.family.DENOISER}
        used = tuple(
            (record["prompt"], tuple(scaled(batch)) if of_encoders else ())
            for batch in batches
            for record in batch.records
        )
        key = (used, options.negative_prompt, options.max_prompt_chunks, files if of_encoders else ())
        if key not in self._prompts:
            self._prompts[key] = generate_model.encode_prompts(self._model, options, adapters, batches, accelerator)
        self._prompts.move_to_end(key)
        if len(self._prompts) > MOST_PROMPTS:
            self._prompts.popitem(last=False)
        return self._prompts[key]


def _versions(adapters: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Each adapter's file with its time and size: a run that goes on writes it again under the same name."""
    from delora_diffusers.files.reading import adapter_path

    states = [(path, adapter_path(path).stat()) for path in adapters]
    return tuple((str(path), state.st_mtime_ns, state.st_size) for path, state in states)


def _empty_caches() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str):
        raise InputError(f"the command does not fit `generate`: {message}.")


def run_command(words: list[str], kept: KeptModel) -> str | None:
    """Run a ``generate`` command; returns a sentence if it failed because of its input or of memory."""
    parser = Parser(prog="generate")
    generate.add_arguments(parser)
    try:
        generate.run(parser.parse_args(words), kept.load)
    except InputError as error:
        return str(error)
    except Exception as error:
        kept._forget()  # in an unknown state
        if is_out_of_memory(error):
            return out_of_memory_sentence("generating", ANYWHERE)
        import traceback

        traceback.print_exc()
        return f"generating failed ({reason(error)}); the terminal of the page shows where."
    return None


def serve(commands: TextIO, answers: TextIO, idle_seconds: float) -> None:
    """Run commands until ``commands`` ends, or until none came for a while.

    A thread reads them, so that this process also ends while it generates if the one that started it is gone.
    """
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def read() -> None:
        for line in commands:
            waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    kept = KeptModel()
    while True:
        try:
            words = waiting.get(timeout=idle_seconds)
        except queue.Empty:
            return
        error = run_command(words, kept)
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


def main() -> None:
    # What the command prints goes to the terminal of the page, and only answers to standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers, float(sys.argv[1]))
    os._exit(0)  # the reading thread waits for input


if __name__ == "__main__":
    main()
