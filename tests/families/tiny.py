"""The tiny pipelines of the transformer families, written once and opened by us and by diffusers."""

from pathlib import Path
from typing import Any

import torch

from data.tiny_pipelines import KINDS as ALL_KINDS
from data.tiny_pipelines import write
from delora_diffusers.families.loading import OpenModel, open_model

KINDS = tuple(ALL_KINDS)


class TinyModels:
    """Tiny pipelines by kind, each written when it is first asked for.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: Path):
        self.root = root

    def folder(self, kind: str) -> Path:
        folder = self.root / kind
        return folder if folder.exists() else write(folder, kind)

    def opened(self, kind: str) -> OpenModel:
        """The model as the library opens it, with all parts loaded."""
        model = open_model(str(self.folder(kind)))
        for component in model.skeletons:
            model.load(component, torch.float32)
        return model

    def stock(self, kind: str) -> Any:
        return stock_pipeline(self.folder(kind), kind)


def stock_pipeline(folder: Path, kind: str) -> Any:
    """A pipeline as diffusers loads it."""
    from diffusers import DiffusionPipeline

    absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3-no-t5" else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
