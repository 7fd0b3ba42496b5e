"""How well pictures agree with maps: confusion matrices, and the scores made of them."""

import dataclasses

import torch
from torch import Tensor


def confusion_matrix(truth: Tensor, found: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    """How many pixels of each true class (row) were found to be of each class (column), (classes, classes) int64.

    Args:
        truth: class indices of any shape; those equal to ``ignore_index`` do not count.
        found: likewise, from 0 to classes - 1.
    """
    truth, found = truth.flatten().long(), found.flatten().long()
    counted = truth != ignore_index
    joint = truth[counted] * classes + found[counted]
    return torch.bincount(joint, minlength=classes * classes).view(classes, classes)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Scores of one confusion matrix, each 0 to 1.

    Attributes:
        miou: mean intersection over union of the classes that occur in truth or in what was found.
        mean_accuracy: mean recall of the classes that occur in truth.
        pixel_accuracy: share of the pixels that are right.
        iou, recall: (classes,), NaN where the class does not occur.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: Tensor
    recall: Tensor


def agreement(confusion: Tensor) -> Agreement:
    """The scores of a confusion matrix (classes, classes), rows true."""
    counts = confusion.double()
    right, true, found = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou, recall = right / (true + found - right), right / true  # NaN where 0 / 0
    return Agreement(
        miou=float(iou.nanmean()),
        mean_accuracy=float(recall.nanmean()),
        pixel_accuracy=float(right.sum() / true.sum()),
        iou=iou,
        recall=recall,
    )
