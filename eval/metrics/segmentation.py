"""Segment images, and compare the result with maps: confusion matrices and the scores computed from them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor

from delora_diffusers.errors import LOADING_ERRORS, InputError


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    """Pixels of each true class (row) that were predicted as each class (column), (classes, classes) int64.

    Args:
        truth: class indices of any shape; pixels with ``ignore_index`` do not count.
        predicted: class indices of the same shape, 0 to classes - 1.
    """
    truth, predicted = truth.flatten().long(), predicted.flatten().long()
    counted = truth != ignore_index
    joint = truth[counted] * classes + predicted[counted]
    return torch.bincount(joint, minlength=classes * classes).view(classes, classes)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Scores of a confusion matrix, each from 0 to 1.

    Attributes:
        miou: mean intersection over union, over the classes that occur in the ground truth or the prediction.
        mean_accuracy: mean recall, over the classes that occur in the ground truth.
        pixel_accuracy: share of the pixels that are correct.
        iou, recall: (classes,), NaN where the class does not occur.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: Tensor
    recall: Tensor


def agreement(confusion: Tensor) -> Agreement:
    """The scores of a confusion matrix (classes, classes) whose rows are the true classes."""
    counts = confusion.double()
    correct, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou, recall = correct / (true + predicted - correct), correct / true  # NaN where 0 / 0
    return Agreement(
        miou=float(iou.nanmean()),
        mean_accuracy=float(recall.nanmean()),
        pixel_accuracy=float(correct.sum() / true.sum()),
        iou=iou,
        recall=recall,
    )


class Segmenter:
    """A transformers semantic-segmentation model with its preprocessing.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str):
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        try:
            self.model: Any = AutoModelForSemanticSegmentation.from_pretrained(name).float().eval().to(device)
            self.processor: Any = AutoImageProcessor.from_pretrained(name)
        except (*LOADING_ERRORS, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"--segmenter {name} could not be loaded ({reason}); give a folder or hub id of a transformers "
                "segmentation model."
            ) from error
        self.name = name
        self.classes = int(self.model.config.num_labels)
        self.labels: dict[int, str] = self.model.config.id2label
        self.device = device

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Class indices (images, height, width) of images of one size."""
        sizes = [(image.height, image.width) for image in images]
        with torch.inference_mode():
            output = self.model(**self.processor(images=list(images), return_tensors="pt").to(self.device))
            labels = self.processor.post_process_semantic_segmentation(output, sizes)
        return torch.stack(labels).cpu().numpy()
