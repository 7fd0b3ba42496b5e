"""Validation images during training: a labelled grid on disk and in the tracker."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from delora_diffusers.adapter.control import Control
from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.image_grid import labelled_grid
from delora_diffusers.maps import paint
from delora_diffusers.memory import explain_out_of_memory
from delora_diffusers.pipelines.conditions import conditions, family_in, guided
from delora_diffusers.pipelines.sampling import sample_images
from delora_diffusers.training.encoding import PromptTable
from delora_diffusers.training.held_out import BestAdapter

Rows = list[tuple[str, list[Image.Image]]]
"""(label, images) per row of a grid."""
Conditions = Callable[[list[str]], dict[str, Tensor]]
"""Encodes prompts; see ``conditions.conditions`` for the result."""


@dataclasses.dataclass(frozen=True)
class TrainedConditions:
    """Conditions while text encoders are trained.

    Attributes:
        table: the tokens for these, and the outputs of the other text encoders. config: the denoiser's.
    """

    pipeline: Any
    table: PromptTable
    config: Any

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        return conditions(self.pipeline, self.table.lookup(prompts), self.config)


class Validation(Protocol):
    """Generates validation images."""

    def __call__(self, step: int) -> None:
        """Generate them after this step and write them."""
        ...

    def is_done(self, step: int) -> bool:
        """Whether those of this step are written."""
        ...

    def resume(self, checkpoint: Path | None) -> None:
        """Continue a run from this checkpoint; None at its start."""
        ...


@dataclasses.dataclass(frozen=True)
class SubjectValidation:
    """Computes the loss on held-out photos, and generates ``args.num_validation_images`` images per validation prompt.

    Attributes:
        pipeline: with the adapted UNet; its autoencoder may be on the CPU and is moved to the device while needed.
        conditions_of: encodes the prompts and the family's empty prompt.
        prompts: to generate images from.
        held_out: computes the loss on held-out photos; None if there are none.
        similarity: the similarity of generated images to the photos, or None.
        best: keeps the best adapter, or None.
    """

    accelerator: Accelerator
    pipeline: Any
    conditions_of: Conditions
    args: argparse.Namespace
    prompts: Sequence[str]
    held_out: Callable[[], float] | None = None
    similarity: Callable[[list[Image.Image]], float] | None = None
    best: BestAdapter | None = None

    def is_done(self, step: int) -> bool:
        """Whether its last file is written."""
        has_readings = self.held_out is not None or self.similarity is not None
        files = [readings_file] * has_readings + [grid_file] * bool(self.prompts)
        return all(file(self.args.output_dir, step).exists() for file in files)

    def resume(self, checkpoint: Path | None) -> None:
        if self.best is not None and self.accelerator.is_main_process:
            self.best.resume(checkpoint)

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Log the held-out loss, write the grid for this step, and one image per prompt for the model card."""
        if self.accelerator.is_main_process:
            readings = {}
            if self.held_out is not None:
                with explain_out_of_memory("computing the loss on held-out photos", ["a smaller --train_batch_size"]):
                    readings["loss"] = self.held_out()
            rows = self._generate() if self.prompts else []
            if self.similarity is not None:
                readings["dino"] = self.similarity([image for _, images in rows for image in images])
            if self.best is not None:
                self.best.offer(step, readings)
            if readings:
                self.accelerator.log({f"validation/{name}": value for name, value in readings.items()}, step=step)
                text = json.dumps({"step": step, **readings}) + "\n"
                write_text(readings_file(self.args.output_dir, step), text)
            if rows:
                save_samples(self.args.output_dir / "samples", rows)
                save_grid(self.accelerator, rows, self.args.output_dir, step)
        self.accelerator.wait_for_everyone()

    def _generate(self) -> Rows:
        parked = (self.pipeline.vae.device, self.pipeline.vae.dtype)
        self.pipeline.vae.to(self.accelerator.device)
        savings = ["--num_validation_images 1", "a smaller --resolution", "no --validation_prompt"]
        with explain_out_of_memory("generating validation images", savings):
            rows = [(prompt, self._sample(prompt)) for prompt in self.prompts]
        self.pipeline.vae.to(*parked)
        return rows

    def _sample(self, prompt: str) -> list[Image.Image]:
        seeds = list(range(self.args.seed, self.args.seed + self.args.num_validation_images))
        empty, side = family_in(self.pipeline).NO_PROMPT, self.args.resolution
        return sample_images(
            self.pipeline,
            seeds,
            (self.args.validation_width or side, self.args.validation_height or side),
            **guided(self.pipeline, self.conditions_of([prompt]), self.conditions_of([empty]), count=len(seeds)),
            num_inference_steps=self.args.validation_inference_steps,
            guidance_scale=self.args.guidance_scale,
        )


@dataclasses.dataclass(frozen=True)
class MapValidation:
    """Generates an image from each example's map; each row of the grid shows the map, this image and the real image.

    Attributes:
        pipeline: with the adapted UNet and its control signal; its autoencoder may be on the CPU.
        conditions_of: encodes the captions and the empty prompt.
        control: the control signal. examples: (caption, map, image).
    """

    accelerator: Accelerator
    pipeline: Any
    conditions_of: Conditions
    control: Control
    examples: Sequence[tuple[str, np.ndarray, Image.Image]]
    args: argparse.Namespace

    def is_done(self, step: int) -> bool:
        return grid_file(self.args.output_dir, step).exists()

    def resume(self, checkpoint: Path | None) -> None:
        pass

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Write the grid for this step."""
        if self.accelerator.is_main_process:
            parked = (self.pipeline.vae.device, self.pipeline.vae.dtype)
            self.pipeline.vae.to(self.accelerator.device)
            by_size: dict[tuple[int, ...], list[int]] = {}
            for number, (_, values, _) in enumerate(self.examples):
                by_size.setdefault(values.shape[:2], []).append(number)
            images: dict[int, Image.Image] = {}
            savings = ["--num_validation_images 1", "a smaller --resolution"]
            with explain_out_of_memory("generating validation images", savings):
                for numbers in by_size.values():
                    images |= zip(numbers, self._sample(numbers))
            self.pipeline.vae.to(*parked)
            rows = []
            for number, (caption, values, target) in enumerate(self.examples):
                painted = Image.fromarray(paint(values, self.control.palette))
                rows.append((f"{caption}: map, generated, real", [painted, images[number], target]))
            save_grid(self.accelerator, rows, self.args.output_dir, step)
        self.accelerator.wait_for_everyone()

    def _sample(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Generate from examples of the same size."""
        captions, maps, _ = zip(*(self.examples[number] for number in numbers))
        return sample_images(
            self.pipeline,
            [self.args.seed + number for number in numbers],
            None,
            maps=maps,
            **guided(self.pipeline, self.conditions_of([*captions]), self.conditions_of([""] * len(captions))),
            num_inference_steps=self.args.validation_inference_steps,
            guidance_scale=self.args.guidance_scale,
        )


def save_samples(folder: Path, rows: Rows) -> None:
    """Write the first image of each prompt, for the model card."""
    for number, (_, images) in enumerate(rows):
        with atomic_write(folder / f"{number:02}.png") as temporary:
            images[0].save(temporary, format="PNG")


def readings_file(output_dir: Path, step: int) -> Path:
    """The held-out loss and other readings of a step, as JSON."""
    return output_dir / "validation" / f"step-{step:06}.json"


def grid_file(output_dir: Path, step: int) -> Path:
    """The validation images of a step; the last file that the validation writes."""
    return output_dir / "validation" / f"step-{step:06}.png"


def save_grid(accelerator: Accelerator, rows: Rows, output_dir: Path, step: int) -> None:
    """Write ``validation/step-N.png`` and log it to every tracker that accepts images."""

    grid = labelled_grid(rows, title=f"step {step}")
    with atomic_write(grid_file(output_dir, step)) as temporary:
        grid.save(temporary, format="PNG")
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, **layout)
