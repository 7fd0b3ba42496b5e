"""Checkpoints that are written completely or not at all, and what must not change when a run is continued."""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from delora_diffusers.errors import LOADING_ERRORS, InputError, reason
from delora_diffusers.names import (
    CHECKPOINT_PREFIX,
    CHECKPOINT_SIZES,
    CHECKPOINT_STATE,
    CONFIG_NAME,
    WEIGHTS_NAME,
    checkpoint_folders,
    checkpoint_step,
    is_checkpoint,
    list_checkpoints,
)
from delora_diffusers.text_files import read_json
from delora_diffusers.training.adapter_files import AdapterFiles
from delora_diffusers.training.defaults import RECIPES

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "keep_checkpoint_adapters",
    "resume_from_checkpoint",
    "validation_prompt",
    "validation_steps",
    "num_validation_images",
    "validation_inference_steps",
    "validation_width",
    "validation_height",
    "logging_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "config",
    "allow_tf32",
    "cuda_graph",
    "gradient_checkpointing",
    "init_adapter",  # its contents may not: they are compared with the data
}
"""Flags that may change when a run is resumed; all others must stay the same."""

NEW_FLAGS: dict[str, Any] = {
    "caption_dropout": 0.0,
    "shuffle_tags": False,
    "use_masks": False,
    "with_output_preservation": False,
    "validation_split": 0.0,
    "concepts_list": None,
    "max_prompt_chunks": 1,
    "init_adapter": None,
    "optimizer": "adamw",
    "use_ema": False,
    "loss_type": "l2",
    "debiased_estimation_loss": False,
    "prediction_type": None,
    "rescale_betas_zero_snr": None,
}
"""Flags that the first version did not have, with their defaults; a run of it can only be continued with these."""

WITHOUT_END = ("constant", "constant_with_warmup", "piecewise_constant")
"""Schedules of the learning rate that do not depend on the number of steps, so that a run can be made longer."""
FULL = 2**20
"""Bytes of free space below which a disk is called full."""


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    files: AdapterFiles | None,
    total_limit: int | None,
    keep_adapters: bool = False,
    saved_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Save a run under a temporary name, rename it, and delete the oldest checkpoints beyond ``total_limit``.

    Args:
        files: writes the adapter of each subject.
        keep_adapters: whether the adapters of checkpoints beyond the limit are kept.
        saved_weights: gives the adapters, inside, the weights to write to these files.
    """
    final = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    temporary = output_dir / f".{final.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if files is not None:
                with saved_weights():
                    files.write_checkpoint(step, final, temporary)
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir()) if path.is_file()}
            (temporary / CHECKPOINT_SIZES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    except LOADING_ERRORS as error:  # torch.save raises RuntimeError, and says nothing of the disk
        problem = "the disk is full" if shutil.disk_usage(output_dir).free < FULL else reason(error)
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{final} could not be written ({problem}); free some space, then use --resume_from_checkpoint latest."
        ) from error
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        if total_limit is not None:
            others = [] if files is None else [args.output_dir for args in files.subjects]
            for folder in {output_dir.resolve(), *(other.resolve() for other in others)}:
                for old in checkpoint_folders(folder)[:-total_limit]:
                    remove_checkpoint(old, keep_adapters)


def remove_checkpoint(checkpoint: Path, keep_adapter: bool) -> None:
    """Remove a checkpoint, or only its training state; a run that is killed here leaves nothing that looks complete."""
    if not keep_adapter or not (checkpoint / WEIGHTS_NAME).is_file():
        leftover = checkpoint.with_name(f".{checkpoint.name}.part")
        os.rename(checkpoint, leftover)
        shutil.rmtree(leftover)
        return
    # The files that mark a checkpoint from which training can continue come first.
    for path in (checkpoint / CHECKPOINT_SIZES, checkpoint / CHECKPOINT_STATE, *sorted(checkpoint.iterdir())):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != WEIGHTS_NAME:
            path.unlink(missing_ok=True)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint for ``--resume_from_checkpoint``; None to start from the beginning.

    Raises:
        InputError: the given checkpoint does not exist, or a file of it is missing or cut short.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        checkpoint = (list_checkpoints(output_dir) or [None])[-1]
        without_state = checkpoint_folders(output_dir)
        if checkpoint is None and without_state:
            raise _without_state(without_state[-1], "give a new --output_dir")
    else:
        path = Path(resume_from_checkpoint)
        candidates = [p for p in (path, output_dir / path) if p.is_dir() and is_checkpoint(p)]
        if not candidates:
            available = ", ".join(p.name for p in list_checkpoints(output_dir)) or "no checkpoint"
            raise InputError(f"--resume_from_checkpoint {path} does not exist; {output_dir} has {available}.")
        checkpoint = candidates[0]
        if checkpoint not in list_checkpoints(checkpoint.parent):
            available = ", ".join(p.name for p in list_checkpoints(checkpoint.parent)) or "there is none"
            raise _without_state(checkpoint, f"use another checkpoint ({available})")
    if checkpoint is not None and (checkpoint / CHECKPOINT_SIZES).is_file():
        _check_sizes(checkpoint)
    return checkpoint


def _without_state(checkpoint: Path, remedy: str) -> InputError:
    return InputError(
        f"{checkpoint} contains the adapter but no training state, so training cannot continue from it; {remedy}."
    )


def _check_sizes(checkpoint: Path) -> None:
    sizes = read_json(checkpoint / CHECKPOINT_SIZES)
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        file = checkpoint / name
        if not file.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(checkpoint, f"{name} has {file.stat().st_size} of {size} bytes")


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore a run.

    Raises:
        InputError: a file of the checkpoint is missing or damaged.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except LOADING_ERRORS as error:
        raise _damaged(checkpoint, reason(error)) from error


def _damaged(checkpoint: Path, problem: str) -> InputError:
    step = checkpoint_step(checkpoint)
    earlier = [other for other in list_checkpoints(checkpoint.parent) if checkpoint_step(other) < step]
    remedy = f"--resume_from_checkpoint {earlier[-1].name}" if earlier else "another checkpoint, or a new --output_dir"
    return InputError(f"the checkpoint {checkpoint} is damaged ({problem}); use {remedy}.")


def _same_path(before: Any, now: Any) -> bool:
    """Whether two flags name the same existing file or folder, one perhaps relative."""
    both = isinstance(before, str) and isinstance(now, str) and os.path.exists(before) and os.path.exists(now)
    return both and os.path.samefile(before, now)


def keep_earlier_defaults(args: argparse.Namespace) -> None:
    """Continue a run with the defaults that it started with: before ``--path auto`` existed, the path was ``fast``,
    before ``--square`` existed, photos were cropped square, and before ``--recipe`` existed, it was ``paper``."""
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    file = (args.output_dir if checkpoint is None else checkpoint.parent) / CONFIG_NAME
    config = read_json(file) if file.is_file() else {}
    before = config.get("arguments") if isinstance(config, dict) else None
    if isinstance(before, dict):
        args.path = "fast" if args.path == "auto" and before.get("path") == "fast" else args.path
        args.square = args.square or "square" not in before
        if "recipe" not in before and getattr(args, "recipe", "paper") != "paper":
            args.recipe = "paper"
            if args.relative_bound is None:  # the checkpoint has its boundaries anyway
                args.relative_bound = RECIPES["paper"]


def check_same_run(
    output_dir: Path, resume_from_checkpoint: str | None, settings: dict[str, Any], data: dict[str, str]
) -> None:
    """Refuse to resume a run whose settings or data have changed, or that has already done more steps.

    Args:
        settings: the flags. data: a digest of each file that is trained on, by name; see ``run_folder.data_digests``.

    Raises:
        InputError: the message names the first difference.
    """
    checkpoint = find_checkpoint(output_dir, resume_from_checkpoint)
    folder = output_dir if checkpoint is None else checkpoint.parent
    if checkpoint is not None and checkpoint_step(checkpoint) > settings["max_train_steps"]:
        raise InputError(
            f"{checkpoint} has finished {checkpoint_step(checkpoint)} steps, more than --max_train_steps "
            f"{settings['max_train_steps']}; give at least as many, or resume from an earlier checkpoint."
        )
    file = folder / CONFIG_NAME
    if not file.is_file():
        return
    config = read_json(file)
    before = config.get("arguments") if isinstance(config, dict) else None
    if not isinstance(before, dict):
        raise InputError(f"{file} is damaged, so this run cannot be continued; restore it, or give a new --output_dir.")
    # A run that continues another run in a new folder lists the same subjects in another file.
    may_change = MAY_CHANGE if folder.resolve() == output_dir.resolve() else MAY_CHANGE | {"subjects_file"}
    for key in sorted(before.keys() & settings.keys() - may_change):
        if before[key] != settings[key] and not _same_path(before[key], settings[key]):
            raise InputError(
                f"{folder} was trained with --{key} {before[key]}, but --{key} is now {settings[key]}; give the "
                "same value, or a new --output_dir."
            )
    for key, default in NEW_FLAGS.items():
        if key not in before and settings.get(key, default) != default:
            raise InputError(
                f"{folder} was trained by an earlier version without --{key}; leave it out, or give a new --output_dir."
            )
    recorded = config.get("data", data)
    if not isinstance(recorded, dict):
        raise InputError(f"{file} is damaged, so this run cannot be continued; restore it, or give a new --output_dir.")
    steps, scheduler = settings["max_train_steps"], settings.get("lr_scheduler", "constant")
    if before.get("max_train_steps", steps) != steps and scheduler not in WITHOUT_END:
        logger.warning(
            "--lr_scheduler %s depends on --max_train_steps, which was %s and is now %s: the run goes on at the rates "
            "of its new length, so it does not end as one that began with them",
            scheduler,
            before["max_train_steps"],
            steps,
        )
    for name in sorted({*recorded, *data}):
        if recorded.get(name) != data.get(name):
            change = "is new" if name not in recorded else "is gone" if name not in data else "has changed"
            raise InputError(
                f"{name} {change} since {folder} was trained; restore the data, or give a new --output_dir."
            )
