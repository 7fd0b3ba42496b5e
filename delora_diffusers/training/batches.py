"""The micro-batches of both training scripts: everything random in a step, as a function of its index."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from delora_diffusers.adapter.control import as_signal
from delora_diffusers.families.latents import LatentScale
from delora_diffusers.training import order
from delora_diffusers.training.cuda_graph import Batch
from delora_diffusers.training.disk_cache import DiskCache
from delora_diffusers.training.encoding import LatentCache, PromptTable, device_index
from delora_diffusers.training.noising import Noising


@dataclasses.dataclass(frozen=True)
class SubjectData:
    """The encoded data of a subject.

    Attributes:
        seed: for every random choice of this subject.
        prompts: one per photo. latents: of the photos.
        class_prompt, class_latents: for prior preservation, else None.
    """

    seed: int
    prompts: Sequence[str]
    latents: LatentCache
    class_prompt: str | None = None
    class_latents: LatentCache | None = None


@dataclasses.dataclass(frozen=True)
class SubjectBatches:
    """Micro-batches for DreamBooth with the same number of samples per subject, ordered by subject.

    Attributes:
        noising: of the base model.
        subjects: one, or several that are trained at once.
        table: the conditions of each prompt, or what they are computed from if text encoders are trained.
        batch_size: photos per subject; with prior preservation, as many class images are added.
        prior_loss_weight: weight of the class images' loss.
    """

    noising: Noising
    subjects: Sequence[SubjectData]
    table: PromptTable
    batch_size: int
    prior_loss_weight: float
    device: torch.device

    def __call__(self, microbatch: int) -> Batch:
        """The tensors of a micro-batch, by name."""
        parts = [self._part(subject, microbatch) for subject in self.subjects]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]

    @property
    def have_same_shape(self) -> bool:
        """Whether the tensors of all micro-batches have the same shapes, and none is a mask."""
        prompts = [prompt for subject in self.subjects for prompt in subject.prompts]
        classes = [subject.class_prompt or "" for subject in self.subjects if subject.class_latents is not None]
        return self.table.have_same_length([*prompts, *classes])

    def _part(self, subject: SubjectData, microbatch: int) -> dict[str, Tensor]:
        generator = order.generator(subject.seed, microbatch, self.device)
        seed = order.mixed_seed(subject.seed, microbatch, 1)
        photos = order.sample_indices(subject.seed, microbatch, self.batch_size, len(subject.latents))
        latents = subject.latents.sample(photos, generator, seed)
        sizes = subject.latents.sizes_of(photos, seed, self.device)
        prompts, weights = [subject.prompts[photo] for photo in photos], None
        if subject.class_latents is not None:
            images = order.sample_indices(subject.seed + 1, microbatch, self.batch_size, len(subject.class_latents))
            latents = torch.cat((latents, subject.class_latents.sample(images, generator, seed + 1)))
            sizes += subject.class_latents.sizes_of(images, seed + 1, self.device)
            prompts += [subject.class_prompt or ""] * len(images)
            # Each half of the batch contributes its mean loss, and the two means are added.
            weights = torch.tensor([2.0] * len(photos) + [2.0 * self.prior_loss_weight] * len(images))
            weights = weights.to(self.device, non_blocking=True)
        batch = self.noising(latents, generator, weights)
        if sizes:
            batch["time_ids"] = torch.cat(sizes)
        return batch | self.table.lookup(prompts)


@dataclasses.dataclass(frozen=True)
class MapBatches:
    """Micro-batches of semantic maps and their images.

    Attributes:
        noising: of the base model.
        cache: the encoded pairs. scale: the autoencoder's.
        empty_prompt: embedding (tokens, width) of the empty prompt, which replaces a caption with probability
            ``proportion_empty_prompts``.
        palette: colours for index maps, or None for maps in colour.
    """

    noising: Noising
    cache: DiskCache
    scale: LatentScale
    empty_prompt: Tensor
    palette: np.ndarray | None
    seed: int
    batch_size: int
    proportion_empty_prompts: float
    device: torch.device

    def __call__(self, microbatch: int) -> Batch:
        """The tensors of a micro-batch, by name."""
        generator = order.generator(self.seed, microbatch, self.device)
        seed = order.mixed_seed(self.seed, microbatch, 1)
        pairs = order.sample_indices(self.seed, microbatch, self.batch_size, len(self.cache))
        batch = self.cache.read(pairs, seed)
        mean, std = batch.mean.to(self.device, non_blocking=True), batch.std.to(self.device, non_blocking=True)
        noise = torch.randn(mean.shape, generator=generator, device=self.device)
        latents = self.scale.scaled(mean + std * noise)
        embeddings = batch.embeddings.to(self.device, non_blocking=True)
        unprompted = np.random.default_rng((seed, 2)).uniform(size=len(mean)) < self.proportion_empty_prompts
        if unprompted.any():
            rows = device_index(unprompted.nonzero()[0].tolist(), self.device)
            embeddings[rows] = self.empty_prompt.to(embeddings.dtype)
        maps = as_signal(list(batch.maps.numpy()), self.palette).to(self.device, non_blocking=True)
        return self.noising(latents, generator) | {"encoder_hidden_states": embeddings, "maps": maps}
