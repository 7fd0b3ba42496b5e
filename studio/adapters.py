"""What can be played, compared and exported: finished runs of the workspace, and all checkpoints. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import GENERATED, read_json_lines
from delora_diffusers.names import (
    BEST_FOLDER,
    CONFIG_NAME,
    METADATA_NAME,
    WEIGHTS_NAME,
    checkpoint_folders,
    is_miniature,
)
from delora_diffusers.text_files import read_json
from studio.jobs import ROOT, short
from studio.workspace import Workspace

SHEET = ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
"""Strengths of a sheet."""


def adapters(workspace: Workspace) -> list[str]:
    """The adapters of all runs, newest run first: ``NAME``, ``NAME/best`` and ``NAME/checkpoint-20``."""
    runs = [workspace.run(name) for name in workspace.run_names()]
    runs.sort(key=lambda run: run.stat().st_mtime, reverse=True)
    return [label for run in runs for label in adapters_of(workspace, run.name)]


def adapters_of(workspace: Workspace, name: str) -> list[str]:
    """The adapters of a run: the finished one, the best, and checkpoints, latest first."""
    run = workspace.run(name)
    labels = [name] if (run / WEIGHTS_NAME).is_file() else []
    if (run / BEST_FOLDER / WEIGHTS_NAME).is_file():
        labels.append(f"{name}/{BEST_FOLDER}")
    return labels + [f"{name}/{folder.name}" for folder in reversed(checkpoints(run))]


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that contain its adapter, oldest first."""
    return [folder for folder in checkpoint_folders(run) if (folder / WEIGHTS_NAME).is_file()]


def adapter(workspace: Workspace, label: str) -> Path:
    """The folder of an adapter, as a person would type it.

    Raises:
        InputError: there is none of that name.
    """
    name, _, part = label.partition("/")
    if label not in adapters_of(workspace, name):
        raise InputError(f"there is no adapter {label!r}; choose one from the list.")
    return short(workspace.run(name) / part)


def digest(adapter: Path) -> str:
    """Of an adapter's file: a run that goes on writes another one under the same name."""
    return hashlib.sha256((adapter / WEIGHTS_NAME).read_bytes()).hexdigest()


def settings_of(run: Path) -> dict[str, Any]:
    """The flags that a run records; empty if it has not got that far."""
    try:
        recorded = read_json(run / CONFIG_NAME)
    except (OSError, InputError):
        return {}
    settings = recorded.get("arguments", recorded) if isinstance(recorded, dict) else {}
    return settings if isinstance(settings, dict) else {}


def prompt_of(workspace: Workspace, label: str | None) -> str | None:
    """The instance prompt with which an adapter was trained; None without an adapter, or if it is not recorded."""
    prompt = settings_of(workspace.run(label.partition("/")[0])).get("instance_prompt") if label else None
    return prompt if isinstance(prompt, str) and prompt else None


def photos_of(workspace: Workspace, label: str) -> str | None:
    """The set of photos on which an adapter was trained; None if its run does not record one of the workspace."""
    recorded = settings_of(workspace.run(label.partition("/")[0])).get("instance_data_dir")
    try:
        folder = workspace.within(ROOT / recorded) if isinstance(recorded, str) else None
    except InputError:
        return None
    return folder.name if folder is not None and folder.parent == workspace.photos else None


def on_miniature(run: Path) -> bool:
    """Whether a run trained the included miniature."""
    return is_miniature(settings_of(run).get("pretrained_model_name_or_path"))


def lines(text: str | None) -> list[str]:
    """The lines of a text field, without empty ones."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def flag(name: str, value: object) -> list[str]:
    """A flag and its value, or nothing if the field is empty."""
    return [] if value in (None, "", []) else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def weighted(labels: Sequence[str | None], weights: Sequence[float | None]) -> list[tuple[str, float]]:
    """The adapters of a form with their weights, without the lists that are empty.

    Raises:
        InputError: an adapter is chosen twice.
    """
    pairs = [(label, 1.0 if weight is None else weight) for label, weight in zip(labels, weights) if label]
    if len({label for label, _ in pairs}) < len(pairs):
        raise InputError("the same adapter is chosen twice; choose it once with a larger weight.")
    return pairs


def adapter_words(workspace: Workspace, used: Sequence[tuple[str, float]]) -> list[str]:
    """The flags that name adapters with their weights.

    Raises:
        InputError: one is missing.
    """
    words = ["--adapter", *(str(adapter(workspace, label)) for label, _ in used)]
    if any(weight != 1 for _, weight in used):
        words += ["--adapter_weights", *(f"{weight:g}" for _, weight in used)]
    return words


def generate_words(
    workspace: Workspace,
    used: Sequence[tuple[str, float]],
    prompts: Sequence[str],
    strengths: Sequence[str],
    settings: dict[str, object],
) -> tuple[list[str], Path]:
    """The flags of ``generate``, and its output folder, whose name follows from the other flags.

    So the same images are generated once, and other ones never meet them.

    Args:
        used: adapters with their weights; none for the base model. settings: other flags by name.

    Raises:
        InputError: there is no prompt, or an adapter is missing.
    """
    if not prompts:
        raise InputError("there is no prompt; write at least one, each on its own line.")
    words = adapter_words(workspace, used) if used else []
    digests = [digest(ROOT / adapter(workspace, label)) for label, _ in used]
    words += ["--prompt", *prompts]
    for name, value in settings.items():
        words += flag(name, value)
    words += [] if list(strengths) == ["1"] or not used else ["--strength", *strengths]
    name = hashlib.sha256(json.dumps([words, digests]).encode()).hexdigest()[:10]
    output = workspace.output(f"play-{name}")
    return [*words, "--output_dir", str(short(output))], output


def generated(folder: Path) -> list[dict[str, Any]]:
    """The records of a finished output folder of ``generate``; none if it is not finished."""
    file = folder / METADATA_NAME
    return [record for _, record in read_json_lines(file, GENERATED)] if file.is_file() else []


def count_images(folder: Path) -> int:
    """The images of prompts in a folder that fills."""
    return sum(path.suffix == ".png" and path.name[:3].isdigit() for path in folder.glob("*")) if folder.is_dir() else 0
