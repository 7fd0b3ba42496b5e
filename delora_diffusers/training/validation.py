"""Pictures drawn while training: a labelled grid, to disk and to the tracker."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from delora_diffusers.conditions import guided
from delora_diffusers.control import attached_control, painted
from delora_diffusers.images import labelled_grid
from delora_diffusers.sampling import sample_pictures


def validator(
    accelerator: Accelerator,
    pipeline,
    conditions_of: Callable[[list[str]], dict[str, Tensor]],
    args: argparse.Namespace,
) -> Callable[[int], None]:
    """A function that draws ``args.num_validation_images`` pictures of each validation prompt at a step.

    Args:
        pipeline: with the adapted UNet; its autoencoder may be on the CPU and is moved for the while.
        conditions_of: gives the prompts' conditions, see ``conditions.encode_tokens``.
    """

    @torch.no_grad()
    def validate(step: int) -> None:
        if accelerator.is_main_process:
            device = pipeline.vae.device
            pipeline.vae.to(accelerator.device)
            seeds = list(range(args.seed, args.seed + args.num_validation_images))
            negative = conditions_of([""])
            rows = []
            for prompt in args.validation_prompt:
                count = len(seeds)
                told: dict[str, Any] = guided(pipeline, conditions_of([prompt]), negative)
                pictures = sample_pictures(
                    pipeline,
                    seeds,
                    args.resolution,
                    **{name: one.repeat(count, *[1] * (one.ndim - 1)) for name, one in told.items()},
                    num_inference_steps=args.validation_inference_steps,
                    guidance_scale=args.guidance_scale,
                )
                rows.append((prompt, pictures))
            pipeline.vae.to(device)
            save_grid(accelerator, rows, args.output_dir / "validation" / f"step-{step:06}.png", step)
            save_samples(args.output_dir / "samples", rows)
        accelerator.wait_for_everyone()

    return validate


def save_samples(folder: Path, rows: list[tuple[str, list[Image.Image]]]) -> None:
    """Write the newest picture of each prompt, which the model card shows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, pictures) in enumerate(rows):
        pictures[0].save(folder / f"{number:02}.png")


def map_validator(
    accelerator: Accelerator,
    pipeline,
    conditions_of: Callable[[list[str]], dict[str, Tensor]],
    examples: list[tuple[str, np.ndarray, Image.Image]],
    args: argparse.Namespace,
) -> Callable[[int], None]:
    """A function that draws a picture for each map at a step, beside the map and the real picture.

    Args:
        pipeline: with the adapted UNet and its control signal; its autoencoder may be on the CPU.
        conditions_of: gives the prompts' conditions, see ``conditions.encode_tokens``.
        examples: (caption, map, picture), all of one size.
    """
    control = attached_control(pipeline.unet)
    assert control is not None

    @torch.no_grad()
    def validate(step: int) -> None:
        if accelerator.is_main_process:
            device = pipeline.vae.device
            pipeline.vae.to(accelerator.device)
            captions, maps, targets = (list(column) for column in zip(*examples))
            pictures = sample_pictures(
                pipeline,
                [args.seed + number for number in range(len(examples))],
                None,
                maps=maps,
                **guided(pipeline, conditions_of(captions), conditions_of([""] * len(captions))),
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.guidance_scale,
            )
            pipeline.vae.to(device)
            shown = [Image.fromarray(painted(one, control.palette)) for one in maps]
            rows = [
                (f"{caption}: map, drawn, real", [semantic, picture, target])
                for caption, semantic, picture, target in zip(captions, shown, pictures, targets)
            ]
            save_grid(accelerator, rows, args.output_dir / "validation" / f"step-{step:06}.png", step)
        accelerator.wait_for_everyone()

    return validate


def save_grid(accelerator: Accelerator, rows: list[tuple[str, list[Image.Image]]], path: Path, step: int) -> None:
    """Write a grid to disk and to every tracker that takes pictures."""
    grid = labelled_grid(rows, title=f"step {step}")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, **layout)
