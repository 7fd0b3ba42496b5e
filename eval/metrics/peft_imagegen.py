"""The scores of PEFT's image benchmark (``method_comparison/image-gen`` in PEFT's repository).

Each image is compared with the held-out photo whose caption is its prompt, by the cosine of DINOv2's CLS features. The
drift compares images for other prompts with those of the base model for the same seeds: ``(1 - mean cosine) / 2``.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.photographs import Photo
from delora_diffusers.errors import LOADING_ERRORS, InputError, reason
from eval.metrics.embedding import embed
from eval.metrics.encoders import Encoder
from eval.metrics.generated import Generated, by_prompt
from eval.metrics.protocols import PEFT_IMAGEGEN

DINO = "facebook/dinov2-base"
SOURCE = "PEFT's method_comparison/image-gen: cosine with the held-out photo of the same caption; drift (1 - cos) / 2"


class Dinov2Encoder(Encoder):
    """CLS features of a DINOv2, of norm 1, with the preprocessing that the model comes with.

    Args:
        name: hub id or folder of a transformers model with its image processor.
        device: where to run.
        precision: ``fp32`` or ``bf16``; features are float32.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str, precision: str = "fp32"):
        super().__init__(device, precision)
        from transformers import AutoImageProcessor, AutoModel

        try:
            self.model = AutoModel.from_pretrained(name).eval().to(device, self.dtype)
            self.processor: Any = AutoImageProcessor.from_pretrained(name)
        except LOADING_ERRORS as error:
            raise InputError(
                f"--dino {name} could not be loaded ({reason(error)}); give a transformers DINOv2, as folder or hub id."
            ) from error
        self.transform = self.processor.to_json_string()
        self.view = functools.partial(processed, self.processor)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Unit features (batch, width) of processed images (batch, 3, height, width)."""
        pixels = batch.to(self.device, self.dtype, non_blocking=True)
        return self.unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])


def processed(processor: Any, image: Image.Image) -> Tensor:
    """An image as the model takes it, (3, height, width)."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def photo_of_each(generated: Generated, references: Sequence[Photo]) -> list[Path]:
    """The held-out photo of each image.

    Raises:
        InputError: a photo has no caption or that of another photo; a prompt is no caption; a caption has no image.
    """
    by_caption: dict[str, Path] = {}
    for photo in references:
        if photo.caption is None:
            raise InputError(f"{photo.path} has no caption; protocol {PEFT_IMAGEGEN} compares images by caption.")
        if photo.caption in by_caption:
            raise InputError(f"{photo.path} and {by_caption[photo.caption]} have one caption; change one of them.")
        by_caption[photo.caption] = photo.path
    for path, prompt in generated:
        if prompt not in by_caption:
            raise InputError(f"{path} was generated for {prompt!r}, which is no photo's caption; use the captions.")
    prompts = {prompt for _, prompt in generated}
    missing = next((caption for caption in by_caption if caption not in prompts), None)
    if missing is not None:
        raise InputError(f"there is no image of {missing!r}, the caption of {by_caption[missing]}; generate it.")
    return [by_caption[prompt] for _, prompt in generated]


def drift_pairs(drift: Generated, base: Generated) -> list[tuple[Path, Path]]:
    """Each image and the base model's image for the same prompt, in order.

    Raises:
        InputError: the base model has other prompts, or another number of images of a prompt.
    """
    adapted, unadapted = by_prompt(drift), by_prompt(base)
    for prompt, paths in adapted.items():
        if len(unadapted.get(prompt, [])) != len(paths):
            raise InputError(
                f"--base_dir has {len(unadapted.get(prompt, []))} images of {prompt!r} and --drift_dir {len(paths)}; "
                "generate the same prompts and seeds with the adapter and without."
            )
    return [pair for prompt, paths in adapted.items() for pair in zip(paths, unadapted[prompt])]


def score(
    generated: Generated,
    photos: Sequence[Path],
    drift: Sequence[tuple[Path, Path]],
    encoder: Dinov2Encoder,
    name: str,
    batch_size: int,
) -> dict[str, Any]:
    """The scores, the model they were computed with, and the scores of each image.

    Args:
        photos: of each image, from ``photo_of_each``. drift: from ``drift_pairs``; may be empty.
        name: of the encoder.

    Raises:
        InputError: an image cannot be read.
    """
    images = [path for path, _ in generated]
    files = list(dict.fromkeys([*images, *photos, *(path for pair in drift for path in pair)]))
    features = dict(zip(files, embed(files, {"dino": encoder}, batch_size=batch_size)["dino"].double()))
    cosines = [float(features[path] @ features[photo]) for path, photo in zip(images, photos)]
    drifts = [float(features[adapted] @ features[base]) for adapted, base in drift]
    return {
        "protocol": PEFT_IMAGEGEN,
        "source": SOURCE,
        "scores": {
            "dino": sum(cosines) / len(cosines),
            "drift": (1 - sum(drifts) / len(drifts)) / 2 if drifts else None,
        },
        "counts": {"generated": len(images), "reference": len(set(photos)), "drift": len(drifts)},
        "models": {"dino": name, "dino_transform": encoder.transform, "precision": encoder.precision},
        "pictures": [
            {"file_name": path.name, "prompt": prompt, "photo": photo.name, "dino": round(cosine, 6)}
            for (path, prompt), photo, cosine in zip(generated, photos, cosines)
        ],
    }
