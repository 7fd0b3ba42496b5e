"""The adapter files of a training run: one per subject, in every checkpoint and in the finished output folder."""

import argparse
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.files.writing import save_adapter
from delora_diffusers.names import BEST_FOLDER, BEST_WEIGHTS_NAME, WEIGHTS_NAME, recorded_model_name

RECORDED_FLAGS = ("max_train_steps", "train_batch_size", "learning_rate", "resolution", "seed")
"""Flags that are recorded in the adapter file."""


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """The adapters of a run and how they are saved.

    Attributes:
        adapters: by component (``"unet"``, ``"text_encoder"``); that of the denoiser is the first.
        subjects: the flags of each subject, including its output folder.
        prompts: an example prompt of each subject.
        parts: further arguments of ``save_adapter``.
    """

    adapters: Mapping[str, Adapter]
    subjects: Sequence[argparse.Namespace]
    prompts: Sequence[str]
    parts: Mapping[str, Any]

    @property
    def denoiser(self) -> Adapter:
        """The denoiser's adapter."""
        return next(iter(self.adapters.values()))

    def is_finite(self, subject: int) -> bool:
        """Whether all tensors of a subject's adapter are finite."""
        tensors = (tensor for adapter in self.adapters.values() for _, tensor in adapter.named_tensors(subject))
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def write(
        self, subject: int, folder: Path, step: int | None = None, readings: Mapping[str, float] | None = None
    ) -> Path:
        """Write a subject's adapter to a folder, completely or not at all; returns the file.

        Args:
            step: of a checkpoint, whose file also records the mean distance ``|W' - W|_F``.
            readings: further values to record.
        """
        args, prompt = self.subjects[subject], self.prompts[subject]
        training = {name: getattr(args, name) for name in RECORDED_FLAGS} | {"prompt": prompt}
        if args.init_adapter is not None:
            training["init_adapter"] = str(args.init_adapter)
        if step is not None:
            distance = self.denoiser.all_distances()[subject].mean().item()
            training |= {"step": step, "distance": round(distance, 6), **(readings or {})}
        (component, denoiser), *text_encoders = self.adapters.items()
        return save_adapter(
            denoiser,
            folder,
            component=component,
            text_encoders=dict(text_encoders),
            base_model=recorded_model_name(args.pretrained_model_name_or_path),
            revision=args.revision,
            variant=args.variant,
            model_config=None if args.model_config is None else recorded_model_name(args.model_config),
            prediction_type=args.prediction_type,
            rescale_betas_zero_snr=args.rescale_betas_zero_snr,
            training=training,
            subject=subject,
            **self.parts,
        )

    def write_checkpoint(self, step: int, checkpoint: Path, state: Path) -> None:
        """Write the adapters of a checkpoint: to ``state``, where the training state is being written, or, for
        subjects trained together, to the folder of the same name in each subject's output folder.

        Args:
            checkpoint: the checkpoint's folder when it is complete.
        """
        best = checkpoint.parent / BEST_FOLDER / WEIGHTS_NAME
        if best.is_file():
            shutil.copyfile(best, state / BEST_WEIGHTS_NAME)
        for subject, args in enumerate(self.subjects):
            if self.is_finite(subject):
                alone = args.output_dir.resolve() == checkpoint.parent.resolve()
                self.write(subject, state if alone else args.output_dir / checkpoint.name, step)
