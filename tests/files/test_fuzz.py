"""Good files, mutated at random: whatever reads them succeeds or gives a one-sentence error, quickly and cleanly.

A mutation depends only on the base file and a seed, so each failure can be repeated; the mutated file is also kept in
pytest's temporary folder, whose path is in the failure.
"""

import contextlib
import io
import re
import shutil
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from delora_diffusers import AdapterConfig, InputError, attach, detach, load_adapter, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.adapter.attach import attached_adapter
from delora_diffusers.adapter.control import attach_control, attached_control, detach_control, new_encoder
from delora_diffusers.files import merging
from delora_diffusers.files.formats import PEFT_FILES, read_peft_delora
from delora_diffusers.files.loading import load_control
from tests.files.mutations import (
    BASES,
    INJECTED,
    LIMIT,
    PEFT_BASES,
    PEFT_SETTINGS_MUTATIONS,
    TARGETS,
    TEXT_TARGET,
    XL,
    mutated,
)
from tests.helpers import PALETTE, randomize


@pytest.fixture(scope="module")
def adapters(tiny_sd) -> dict[str, bytes]:
    """The bytes of a good adapter file of every kind."""
    return {name: adapter_file(tiny_sd, name, settings) for name, settings in BASES.items()}


def adapter_file(tiny_sd: Path, name: str, settings: dict[str, Any]) -> bytes:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    adapter = attach(unet, AdapterConfig(rank=2, targets=TARGETS, **settings), generator)
    randomize(adapter)
    more: dict[str, Any] = {"training": {"steps": 6, "instance_prompt": "a sks dog", "rates": [1e-3, 2e-2]}}
    if "control" in name:
        palette = PALETTE[:2] if "palette" in name else None
        more["control"] = attach_control(unet, new_encoder(unet, 2, generator), palette)
    if "text encoder" in name:
        text_encoder = CLIPTextModel.from_pretrained(tiny_sd, subfolder="text_encoder")
        config = AdapterConfig(rank=2, targets=(TEXT_TARGET,), **settings)
        more["text_encoders"] = {"text_encoder": attach(text_encoder, config, generator)}
    if "SDXL" in name:
        more["pipeline"] = XL
    return save_adapter(adapter, tiny_sd.parent / "fuzz.safetensors", base_model="some/model", **more).read_bytes()


@pytest.fixture(scope="module")
def weights(tiny_sd, tmp_path_factory) -> Path:
    """A pipeline folder with only a few weights of the UNet and the text encoder."""
    folder = tmp_path_factory.mktemp("weights")
    for component, names in (
        ("unet", [f"{target}.weight" for target in TARGETS] + ["conv_in.weight", "conv_in.bias"]),
        ("text_encoder", [f"{prefix}{TEXT_TARGET}.weight" for prefix in ("", "text_model.")]),
    ):
        (folder / component).mkdir()
        tensors = load_file(next((tiny_sd / component).glob("*.safetensors")))
        save_file({n: t for n, t in tensors.items() if n in names}, folder / component / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def peft_folders(tiny_sd, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of good DeloraConfig folders, by name."""
    folder = tmp_path_factory.mktemp("peft")
    folders = {}
    for name, settings in PEFT_BASES.items():
        file, exported = folder / "a.safetensors", folder / name
        file.write_bytes(adapter_file(tiny_sd, name, settings))
        main(["export", "--adapter", str(file), "--format", "peft-delora", "--output", str(exported)])
        folders[name] = {path.name: path.read_bytes() for path in exported.iterdir()}
    return folders


Actions = dict[str, Callable[[], object]]


def actions_on(file: Path, output: Path, weights: Path, unet: nn.Module) -> Actions:
    """Everything that reads an adapter file; what is written is written to ``output``."""
    export = ["export", "--adapter", str(file), "--output", str(output), "--format"]

    def load_and_detach() -> None:
        load_adapter(unet, file)
        detach(unet)

    def load_and_detach_control() -> None:
        if load_control(unet, file) is not None:
            detach_control(unet)

    return {
        "info": lambda: main(["info", str(file)]),
        "export as peft": lambda: main([*export, "peft"]),
        "export as peft-delora": lambda: main([*export, "peft-delora"]),
        "export as kohya": lambda: main([*export, "kohya"]),
        "export with another rank": lambda: main([*export, "diffusers", "--rank", "1", "--dtype", "fp16"]),
        "merge": lambda: merging.merge_folder(weights, [(file, 1.0)], output),
        "load_adapter": load_and_detach,
        "load_control": load_and_detach_control,
    }


def problems_of(actions: Actions, output: Path) -> Iterator[str]:
    """What is wrong with the outcome of each action; nothing, if all succeed or fail as they should."""
    start = time.process_time()
    slowest = ("", 0.0)
    for name, action in actions.items():
        before = time.process_time()
        succeeded, text, problem = outcome(action)
        slowest = max(slowest, (name, time.process_time() - before), key=lambda pair: pair[1])
        problem = problem or unclean(text)
        left = sorted(path.name for path in output.parent.iterdir())
        if not succeeded and left and not problem:
            problem = f"fails and leaves {left}"
        if problem:
            yield f"{name}: {problem}"
        shutil.rmtree(output.parent)
        output.parent.mkdir()
    seconds = time.process_time() - start
    if seconds > LIMIT:
        yield f"takes {seconds:.1f} s of processor time, of which {slowest[0]} {slowest[1]:.1f} s"


def outcome(action: Callable[[], object]) -> tuple[bool, str, str]:
    """Whether an action succeeds, what it prints and what its error says, and what is wrong with that."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    message, problem = None, ""
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            action()
        except InputError as error:
            message = str(error)
        except SystemExit as stop:
            message = str(stop.code)
            problem = "" if message.startswith("error: ") else f"exits with {message!r}"
        except KeyboardInterrupt:
            raise
        except BaseException:  # Rust's panics are no exceptions
            problem = traceback.format_exc(limit=-3)
    assert isinstance(stream.buffer, io.BytesIO)
    text = stream.buffer.getvalue().decode()
    if message is not None and "\n" in message:
        problem = f"an error of several lines: {message!r}"
    return not problem and message is None, f"{text}\n{message or ''}", problem


def unclean(text: str) -> str:
    """What a terminal would not simply print, or a line that a value in the file has added; empty if neither."""
    for line in text.split("\n"):
        if line.startswith(INJECTED):
            return "a value of the file starts a new line"
        if not line.isprintable():
            bad = [c for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\u200d"]
            if bad:
                return f"prints {bad[0]!r} in {line[:300]!r}"
    return ""


@pytest.fixture
def output(tmp_path) -> Path:
    """A new name in an empty folder."""
    (tmp_path / "output").mkdir()
    return tmp_path / "output" / "new"


@pytest.fixture
def fuzz_adapters(adapters, weights, unet, output, tmp_path, monkeypatch) -> Callable[[str, range], list[str]]:
    """Mutate the good file of a name with every seed; returns what is wrong."""
    monkeypatch.setattr(merging, "tqdm", lambda files, **_: files)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def fuzz(name: str, seeds: range) -> list[str]:
        problems = []
        for seed in seeds:
            content, changes = mutated(adapters[name], Random(f"{name} {seed}"))
            file = tmp_path / f"{name}-{seed}.safetensors"
            file.write_bytes(content)
            found = list(problems_of(actions_on(file, output, weights, unet), output))
            problems += [f"{file} ({name}, seed {seed}: {changes}): {problem}" for problem in found]
            assert attached_adapter(unet) is None and attached_control(unet) is None, f"{file} leaves the UNet adapted"
            if not found:
                file.unlink()
        after = unet.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and len(after) == len(before)
        return problems

    return fuzz


@pytest.fixture
def fuzz_peft(peft_folders, unet, output, tmp_path) -> Callable[[str, range], list[str]]:
    """Mutate the good PEFT folder of a name with every seed; returns what is wrong."""
    linears = {name: module.weight.detach() for name, module in unet.named_modules() if isinstance(module, nn.Linear)}

    def fuzz(name: str, seeds: range) -> list[str]:
        problems = []
        for seed in seeds:
            folder = tmp_path / f"{name}-{seed}"
            changes = write_mutated_folder(folder, peft_folders[name], Random(f"{name} {seed}"))
            convert = partial(read_peft_delora, folder, linears, {"base_model": "some/model"}, "unet", output)
            found = list(problems_of({"import": convert}, output))
            problems += [f"{folder} ({name}, seed {seed}: {changes}): {problem}" for problem in found]
            if not found:
                shutil.rmtree(folder)
        return problems

    return fuzz


def write_mutated_folder(folder: Path, files: dict[str, bytes], random: Random) -> str:
    """Write a PEFT folder with a mutation in its settings, or with one to three in its weights; returns their names."""
    settings, weights = PEFT_FILES
    if random.random() < 0.3:
        mutation = random.choice(PEFT_SETTINGS_MUTATIONS)
        files = files | {settings: mutation(random, files[settings])}
        changes = mutation.__name__
    else:
        content, changes = mutated(files[weights], random)
        files = files | {weights: content}
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return changes


def report(problems: list[str]) -> str:
    """The problems, with one example of those that end alike."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        end = problem.strip().rpartition("\n")[2].rpartition("): ")[2]
        kinds.setdefault(re.sub(r"[\d.]+", "", end)[:60], []).append(problem)
    return f"{len(problems)} problems\n" + "\n".join(f"{len(alike)} like this: {alike[0]}" for alike in kinds.values())


@pytest.mark.integration
def test_a_few_hundred_mutations(fuzz_adapters, fuzz_peft):
    """Some of every kind of file; ``test_any_mutation_of_an_adapter_file`` says what must hold."""
    problems = [problem for name in BASES for problem in fuzz_adapters(name, range(25))]
    problems += [problem for name in PEFT_BASES for problem in fuzz_peft(name, range(75))]
    assert not problems, report(problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_any_mutation_of_an_adapter_file(fuzz_adapters, name):
    """``info``, ``export``, merging and loading succeed or raise InputError, whatever is in the file.

    No other exception ever; at most two seconds for all of them together; no control characters and no lines of the
    file's own making on the terminal; after a failure no output and an unchanged model.
    """
    problems = fuzz_adapters(name, range(1200))
    assert not problems, report(problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT_BASES)
def test_any_mutation_of_a_peft_folder(fuzz_peft, name):
    """Importing it, as above."""
    problems = fuzz_peft(name, range(1000))
    assert not problems, report(problems)
