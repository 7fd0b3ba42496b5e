"""Score images generated from semantic maps: mIoU, accuracies, and the Frechet distance to real images."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from data.maps import MapPair, pair_views
from data.palettes import indices_of
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from delora_diffusers.maps import IGNORED
from delora_diffusers.text_files import read_json
from eval.metrics.encoders import DinoEncoder
from eval.metrics.frechet import Inception, frechet_distance
from eval.metrics.segmentation import Agreement, Segmenter, agreement, confusion_matrix

if TYPE_CHECKING:
    from accelerate import Accelerator

GeneratedFromMaps = Sequence[tuple[Path, MapPair]]
"""(image, the pair whose map it was generated from)."""
KINDS = ("generated", "real")


def read_label_map(file: Path | None) -> dict[int, int]:
    """Read ``--label_map``: class of the maps to class of the segmenter, for those that differ.

    Raises:
        InputError: the file is not a JSON object of integers.
    """
    if file is None:
        return {}
    try:
        label_map = {int(ours): int(theirs) for ours, theirs in read_json(file).items()}
        if not all(0 <= label <= IGNORED for pair in label_map.items() for label in pair):
            raise ValueError("a class is not between 0 and 255")
        return label_map
    except InputError:
        raise
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise InputError(
            f'--label_map {file} is not a JSON object like {{"0": 2, "1": 1}} ({error}); fix it.'
        ) from error


@dataclasses.dataclass(frozen=True)
class Truth:
    """The maps as the segmenter's class indices, cropped to the images.

    Attributes:
        reduce_labels: index 0 means no class, index i class i - 1.
        ignore_index: of the maps; such pixels do not count.
        palette: of maps in colour. label_map: class of the maps to class of the segmenter.
    """

    reduce_labels: bool
    ignore_index: int
    palette: np.ndarray | None
    label_map: dict[int, int]

    def of(self, pair: MapPair, side: int) -> tuple[np.ndarray, Image.Image | None]:
        """(class indices (side, side), the real image cropped in the same way or None)."""
        values = pair.load_map(self.reduce_labels)
        if values.ndim == 3:
            if self.palette is None:
                raise InputError(f"the map of {pair.name} is in colour; give its --palette.")
            values = indices_of(values, self.palette, f"the map of {pair.name}")
        image = pair.load_image() if pair.image is not None else Image.new("RGB", values.shape[1::-1])
        cropped, semantic = pair_views(image, values, (side, side), None, False)[0]
        lookup = np.arange(256, dtype=np.uint8)
        for map_class, segmenter_class in self.label_map.items():
            lookup[map_class] = segmenter_class
        truth = np.where(semantic == self.ignore_index, IGNORED, lookup[semantic])
        return truth, None if pair.image is None else Image.fromarray(cropped)


@dataclasses.dataclass(frozen=True)
class MapModels:
    """The models that score images.

    Attributes:
        features: ``inception``, ``dino`` or ``none``. encode: features (images, width) of images; None for ``none``.
        distance_name: name of the Frechet distance on these features; with Inception it is the FID.
    """

    segmenter: Segmenter
    features: str
    encode: Callable[[Sequence[Image.Image]], Tensor] | None
    distance_name: str | None


def load_map_models(
    segmenter: str, features: str, dino: str, inception_weights: Path | None, device: torch.device
) -> MapModels:
    """Load the models.

    Raises:
        InputError: a model cannot be loaded.
    """
    loaded = Segmenter(segmenter, device)
    if features == "none":
        return MapModels(loaded, features, None, None)
    if features == "inception":
        return MapModels(loaded, features, Inception(inception_weights, device).encode, "FID")
    encoder = DinoEncoder(dino, "straight", device)

    def encode(images: Sequence[Image.Image]) -> Tensor:
        views: Any = [encoder.transform(image) for image in images]
        return encoder.encode(torch.stack(views)).cpu()

    return MapModels(loaded, features, encode, f"Frechet distance on {dino}")


class Counts:
    """Everything that the scores are computed from, accumulated over batches and then over processes.

    Attributes:
        confusion: (classes, classes), rows are the true classes, of generated and of real images.
        accuracies: (number of the image, share of its pixels that are correct) of the generated images.
        features: (number of the image, features) of both kinds.
    """

    def __init__(self, classes: int):
        self.confusion = {kind: torch.zeros(classes, classes, dtype=torch.long) for kind in KINDS}
        self.accuracies: list[tuple[int, float]] = []
        self.features: dict[str, list[tuple[int, Tensor]]] = {kind: [] for kind in KINDS}

    def add(
        self, kind: str, numbers: Sequence[int], images: list[Image.Image], truths: list[np.ndarray], models: MapModels
    ) -> None:
        """Count one batch of images of one size."""
        classes = models.segmenter.classes
        for number, truth, labels in zip(numbers, truths, models.segmenter(images)):
            matrix = confusion_matrix(torch.from_numpy(truth), torch.from_numpy(labels), classes, IGNORED)
            self.confusion[kind] += matrix
            if kind == "generated":
                self.accuracies.append((number, float(matrix.diagonal().sum() / matrix.sum().clamp(min=1))))
        if models.encode is not None:
            self.features[kind] += list(zip(numbers, models.encode(images)))

    def gather(self, accelerator: "Accelerator") -> None:
        """Sum over the processes. Each image was counted by one process, and sums of integers are exact."""
        for kind, matrix in self.confusion.items():
            total = accelerator.reduce(matrix.to(accelerator.device), "sum")
            assert isinstance(total, Tensor)
            self.confusion[kind] = total.cpu()
        self.accuracies = sorted(gather_object(self.accuracies))
        self.features = {
            kind: sorted(gather_object(rows), key=lambda row: row[0]) for kind, rows in self.features.items()
        }

    def agreements(self) -> dict[str, Agreement]:
        """The scores of generated images, and of real images if there are any."""
        return {kind: agreement(matrix) for kind, matrix in self.confusion.items() if matrix.sum() > 0}

    def frechet(self) -> float | None:
        """The Frechet distance between generated and real images; None without features of both."""
        if not self.features["real"]:
            return None
        stacked = {kind: torch.stack([features for _, features in rows]) for kind, rows in self.features.items()}
        return frechet_distance(stacked["real"], stacked["generated"])


def count(
    generated: GeneratedFromMaps, truth: Truth, models: MapModels, batch_size: int, accelerator: "Accelerator"
) -> Counts:
    """Segment and encode all images, spread over the processes of ``accelerate launch``.

    Raises:
        InputError: an image cannot be read or is not a square, a map has a class that the segmenter does not have.
    """
    counts = Counts(models.segmenter.classes)
    share = range(accelerator.process_index, len(generated), accelerator.num_processes)
    batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
    for batch in tqdm(batches, desc="segmenting", disable=not accelerator.is_local_main_process):
        images = [load_rgb(generated[number][0]) for number in batch]
        sizes = {image.size for image in images}
        if len(sizes) > 1 or any(width != height for width, height in sizes):
            folder = generated[batch[0]][0].parent
            raise InputError(
                f"the images of {folder} are not squares of one size; generate all of them at the same --resolution."
            )
        truths, real_images = [], []
        for number, image in zip(batch, images):
            pair = generated[number][1]
            labels, real = truth.of(pair, image.width)
            check_classes(labels, pair, models.segmenter)
            truths.append(labels)
            real_images += [] if real is None else [real]
        counts.add("generated", batch, images, truths, models)
        if len(real_images) == len(batch):
            counts.add("real", batch, real_images, truths, models)
    counts.gather(accelerator)
    return counts


def check_classes(labels: np.ndarray, pair: MapPair, segmenter: Segmenter) -> None:
    """Reject a map with a class that the segmenter does not have.

    Raises:
        InputError
    """
    highest = int(labels[labels != IGNORED].max(initial=0))
    if highest >= segmenter.classes:
        raise InputError(
            f"the map of {pair.name} has class {highest}, but {segmenter.name} has {segmenter.classes} classes; "
            "give --label_map or --ignore_index."
        )


def summarize(counts: Counts, generated: GeneratedFromMaps, models: MapModels, truth: Truth) -> dict[str, Any]:
    """The scores over all images, per class and per image."""
    agreements = counts.agreements()
    overall = {
        kind: {name: getattr(values, name) for name in ("miou", "mean_accuracy", "pixel_accuracy")}
        for kind, values in agreements.items()
    }
    labels = models.segmenter.labels
    folder = os.path.commonpath([path.parent for path, _ in generated])
    return {
        "scores": overall["generated"] | {"frechet": counts.frechet()},
        "real": overall.get("real"),
        "frechet": {
            "name": models.distance_name,
            "features": models.features,
            "pictures": len(counts.features["generated"]),
        },
        "segmenter": models.segmenter.name,
        "label_map": truth.label_map,
        "ignore_index": truth.ignore_index,
        "counts": {"pictures": len(generated), "pixels": int(counts.confusion["generated"].sum())},
        "classes": [
            {
                "class": index,
                "name": labels.get(index, str(index)),
                "pixels": int(counts.confusion["generated"][index].sum()),
                **{f"{kind}_iou": _number(values.iou[index]) for kind, values in agreements.items()},
                **{f"{kind}_accuracy": _number(values.recall[index]) for kind, values in agreements.items()},
            }
            for index in range(models.segmenter.classes)
        ],
        "pictures": [
            {
                "file_name": generated[number][0].relative_to(folder).as_posix(),
                "map": generated[number][1].name,
                "pixel_accuracy": round(accuracy, 6),
            }
            for number, accuracy in counts.accuracies
        ],
    }


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else number
