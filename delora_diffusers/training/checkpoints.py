"""Checkpoints that are whole or not there at all, and what a resumed run must have in common with its start."""

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
"""Flags that a resumed run may set anew; every other one must be what it was."""


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None) -> None:
    """Save the state of a run under a temporary name, then rename; then drop the oldest beyond ``total_limit``."""
    final = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    temporary = output_dir / f".{final.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError of a full disk
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
    """The checkpoint that ``--resume_from_checkpoint`` means; None to start from the beginning.

    Raises:
        InputError: the named checkpoint does not exist.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        return (list_checkpoints(output_dir) or [None])[-1]
    named = Path(resume_from_checkpoint)
    candidates = [p for p in (named, output_dir / named) if p.is_dir() and is_checkpoint(p)]
    if not candidates:
        there = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        raise InputError(f"there is no checkpoint {named}; {output_dir} has {there}.")
    return candidates[0]


def check_same_run(output_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Raises:
        InputError: naming the first flag that differs.
    """
    file = output_dir / CONFIG_NAME
    if not file.is_file():
        return
    before = json.loads(file.read_text())["arguments"]
    for key in sorted(before.keys() & settings.keys() - MAY_CHANGE):
        if before[key] != settings[key]:
            raise InputError(
                f"{output_dir} was trained with --{key} {before[key]}, now it is {settings[key]}; give the same value, "
                "or a new --output_dir."
            )
