"""The loss on photos that are not trained on, and the adapter for which it, or the similarity to photos, is best."""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from delora_diffusers.atomic import atomic_write
from delora_diffusers.files.reading import read_header
from delora_diffusers.names import BEST_FOLDER, BEST_WEIGHTS_NAME, WEIGHTS_NAME, checkpoint_step
from delora_diffusers.training import order
from delora_diffusers.training.adapter_files import AdapterFiles
from delora_diffusers.training.batches import Bucket, Sample
from delora_diffusers.training.cuda_graph import Batch
from delora_diffusers.training.encoding import PromptTable
from delora_diffusers.training.noising import Noising
from delora_diffusers.training.objective import Losses

NOISE_SAMPLES = 16
"""Samples of noise and timestep for each photo, the same in every call."""
DIRECTIONS = {"loss": -1, "dino": 1}
"""Whether a reading is better when it is higher or lower."""


def split(count: int, share: float, seed: int) -> list[int]:
    """The numbers of the photos to hold out: about this share of them, at least one, and not all."""
    held = min(max(1, round(count * share)), count - 1)
    random = torch.Generator().manual_seed(order.mixed_seed(seed, count, 11))
    return sorted(torch.randperm(count, generator=random)[:held].tolist())


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss of photos with fixed noise and timesteps.

    Attributes:
        buckets: the photos. table: the conditions of their prompts. losses: with the model and its adapter.
    """

    buckets: Sequence[Bucket]
    noising: Noising
    table: PromptTable
    losses: Losses
    batch_size: int
    device: torch.device

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss, which has the same noise and timesteps in every call."""
        sums = [(self.losses(**batch).sum() * count, count) for batch, count in self._batches()]
        return float(sum(loss for loss, _ in sums)) / sum(count for _, count in sums)

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        for bucket in self.buckets:
            for number in range(NOISE_SAMPLES):
                for start in range(0, len(bucket.samples), self.batch_size):
                    samples = bucket.samples[start : start + self.batch_size]
                    noised = [self._noised(bucket, sample, number) for sample in samples]
                    batch = {name: torch.cat([single[name] for single in noised]) for name in noised[0]}
                    yield batch | self.table.lookup([sample.prompts[0] for sample in samples]), len(samples)

    def _noised(self, bucket: Bucket, sample: Sample, number: int) -> Batch:
        """A photo with noise that does not depend on the batch that it is in."""
        seed = order.mixed_seed(sample.image, number, 3)
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = self.noising(bucket.latents.sample([sample.image], generator, seed), generator)
        return batch | bucket.latents.of_views([sample.image], seed, self.device)


@dataclasses.dataclass
class BestAdapter:
    """Keeps the adapter with the best reading so far in ``best/`` of the output folder.

    Attributes:
        by: the reading, ``loss`` or ``dino``. best: its value so far, None if there is none.
    """

    files: AdapterFiles
    by: str
    best: float | None = None

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.files.subjects[0].output_dir / BEST_FOLDER

    def resume(self, checkpoint: Path | None) -> None:
        """Continue with the best adapter of the steps up to a checkpoint; None at the start of a run."""
        if checkpoint is None:
            return
        kept = (folder / WEIGHTS_NAME for folder in (self.folder, checkpoint.parent / BEST_FOLDER))
        for file in (*kept, checkpoint / BEST_WEIGHTS_NAME):
            training = read_header(file)["training"] if file.is_file() else {}
            if training.get("step", math.inf) <= checkpoint_step(checkpoint):
                self.best = training[f"validation_{self.by}"]
                if file.parent != self.folder:
                    with atomic_write(self.folder / WEIGHTS_NAME) as temporary:
                        shutil.copyfile(file, temporary)
                return

    def offer(self, step: int, readings: Mapping[str, float]) -> None:
        """Keep the current adapter if its reading is better than all before."""
        value = readings[self.by]
        better = self.best is None or DIRECTIONS[self.by] * (value - self.best) > 0
        if better and self.files.is_finite(0):
            self.best = value
            self.files.write(0, self.folder, step, {f"validation_{self.by}": value})
