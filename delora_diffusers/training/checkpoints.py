"""Checkpoints that are written completely or not at all, and the flags that a resumed run must not change."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from delora_diffusers.errors import InputError
from delora_diffusers.names import CHECKPOINT_PREFIX, CONFIG_NAME, is_checkpoint, list_checkpoints

MAY_CHANGE = {
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_prompt",
    "validation_steps",
    "num_validation_images",
    "validation_inference_steps",
    "logging_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "config",
    "allow_tf32",
    "cuda_graph",
    "gradient_checkpointing",
}
"""Flags that may change when a run is resumed; all others must stay the same."""


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None) -> None:
    """Save a run under a temporary name, rename it, and delete the oldest checkpoints beyond ``total_limit``."""
    final = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    temporary = output_dir / f".{final.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{final} could not be written ({' '.join(str(error).split())}); free some space, then use "
            "--resume_from_checkpoint latest."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            shutil.rmtree(old)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint for ``--resume_from_checkpoint``; None to start from the beginning.

    Raises:
        InputError: the given checkpoint does not exist.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        return (list_checkpoints(output_dir) or [None])[-1]
    path = Path(resume_from_checkpoint)
    candidates = [p for p in (path, output_dir / path) if p.is_dir() and is_checkpoint(p)]
    if not candidates:
        available = ", ".join(p.name for p in list_checkpoints(output_dir)) or "no checkpoint"
        raise InputError(f"--resume_from_checkpoint {path} does not exist; {output_dir} has {available}.")
    return candidates[0]


def check_same_run(output_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a run whose settings have changed.

    Raises:
        InputError: a flag differs; the message names the first.
    """
    file = output_dir / CONFIG_NAME
    if not file.is_file():
        return
    before = json.loads(file.read_text())["arguments"]
    for key in sorted(before.keys() & settings.keys() - MAY_CHANGE):
        if before[key] != settings[key]:
            raise InputError(
                f"{output_dir} was trained with --{key} {before[key]}, but --{key} is now {settings[key]}; give the "
                "same value, or a new --output_dir."
            )
