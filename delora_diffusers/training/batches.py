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
from delora_diffusers.training.objective import BASE, PRESERVED


@dataclasses.dataclass(frozen=True)
class Sample:
    """A photo to train on.

    Attributes:
        image: its number in the latents of its bucket.
        prompts: one of them is chosen at random.
        class_prompt: of its concept. weight: of its loss.
        class_images: the first and the number of its concept's class images in those of the bucket.
    """

    image: int
    prompts: Sequence[str]
    class_prompt: str | None = None
    weight: float = 1.0
    class_images: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Samples of one size, which can be in a batch together.

    Attributes:
        samples: each is seen equally often. latents: of their photos.
        class_latents: of class images of the same size, for prior preservation, else None.
    """

    samples: Sequence[Sample]
    latents: LatentCache
    class_latents: LatentCache | None = None


@dataclasses.dataclass(frozen=True)
class SubjectData:
    """The encoded data of a subject.

    Attributes:
        seed: for every random choice of this subject.
        buckets: one of them in each micro-batch. Several subjects have one bucket each.
    """

    seed: int
    buckets: Sequence[Bucket]


@dataclasses.dataclass(frozen=True)
class SubjectBatches:
    """Micro-batches for DreamBooth with the same number of samples per subject, ordered by subject.

    A subject's samples are ``batch_size`` photos; with prior preservation, as many class images; with output
    preservation, the photos again, with the same noise and with their class prompts. Each part contributes its mean
    loss, and these are added.

    Attributes:
        noising: of the base model.
        subjects: one, or several that are trained at once.
        table: the conditions of each prompt, or what they are computed from if text encoders are trained.
        batch_size: photos per subject.
        prior_loss_weight: weight of the class images' loss.
        preservation_weight: weight of output preservation; None without it.
        base_table: the conditions of the class prompts in the base model, if text encoders are trained.
        caption_dropout: probability of training a photo with ``no_prompt`` instead of its prompt.
    """

    noising: Noising
    subjects: Sequence[SubjectData]
    table: PromptTable
    batch_size: int
    prior_loss_weight: float
    device: torch.device
    preservation_weight: float | None = None
    base_table: PromptTable | None = None
    caption_dropout: float = 0.0
    no_prompt: str = ""

    def __call__(self, microbatch: int) -> Batch:
        """The tensors of a micro-batch, by name."""
        parts = [self._part(subject, microbatch) for subject in self.subjects]
        if len(parts) == 1:
            return parts[0]
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if PRESERVED in batch:  # rows of the subject's part, which become rows of the whole
            starts = range(0, len(batch["noisy"]), len(parts[0]["noisy"]))
            batch[PRESERVED] = torch.cat([part[PRESERVED] + start for part, start in zip(parts, starts)])
        return batch

    @property
    def have_same_length(self) -> bool:
        """Whether the prompts of all micro-batches have the same number of tokens."""
        prompts = [p for sample in self._samples() for p in (*sample.prompts, *self._class_prompt(sample))]
        return self.table.have_same_length(prompts + [self.no_prompt] * (self.caption_dropout > 0))

    @property
    def examples(self) -> list[int]:
        """A micro-batch of each size of images; none if there is only one size."""
        subject = self.subjects[0]
        return order.first_of_buckets(subject.seed, [len(bucket.samples) for bucket in subject.buckets])

    def _samples(self) -> list[Sample]:
        return [sample for subject in self.subjects for bucket in subject.buckets for sample in bucket.samples]

    def _class_prompt(self, sample: Sample) -> list[str]:
        """The class prompt of a sample, if it is used."""
        used = sample.class_images[1] or self.preservation_weight is not None
        return [sample.class_prompt or ""] if used else []

    def _part(self, subject: SubjectData, microbatch: int) -> dict[str, Tensor]:
        generator = order.generator(subject.seed, microbatch, self.device)
        seed = order.mixed_seed(subject.seed, microbatch, 1)
        sizes = [len(bucket.samples) for bucket in subject.buckets]
        number, position = order.bucket_of(subject.seed, microbatch, sizes)
        bucket = subject.buckets[number]
        rows = order.sample_indices(subject.seed, position, self.batch_size, len(bucket.samples))
        samples = [bucket.samples[row] for row in rows]
        photos = [sample.image for sample in samples]
        latents = [bucket.latents.sample(photos, generator, seed)]
        of_views = [bucket.latents.of_views(photos, seed, self.device)]
        prompts = self._prompts(samples, seed)
        weights = [sample.weight for sample in samples]
        if bucket.class_latents is not None:
            counters = range(position * self.batch_size, (position + 1) * self.batch_size)
            images = [
                sample.class_images[0] + order.sample_index(subject.seed + 1, counter, sample.class_images[1])
                for sample, counter in zip(samples, counters)
            ]
            latents.append(bucket.class_latents.sample(images, generator, seed + 1))
            of_views.append(bucket.class_latents.of_views(images, seed + 1, self.device))
            prompts += [sample.class_prompt or "" for sample in samples]
            weights += [self.prior_loss_weight] * len(samples)
        batch = self.noising(torch.cat(latents), generator) | _joined(of_views)
        if self.preservation_weight is not None:
            batch = self._with_preserved(batch, samples)
            prompts += [sample.class_prompt or "" for sample in samples]
            weights += [self.preservation_weight] * len(samples)
        parts = len(weights) // len(samples)
        if parts > 1 or set(weights) != {1.0}:
            # The loss is the mean over the batch: each part contributes its mean loss, and the means are added.
            sample_weights = torch.tensor([parts * weight for weight in weights])
            batch["weights"] = batch["weights"] * sample_weights.to(self.device, non_blocking=True)
        return batch | self.table.lookup(prompts)

    def _prompts(self, samples: Sequence[Sample], seed: int) -> list[str]:
        """The prompt of each sample: one of its captions, or none."""
        random = np.random.default_rng((seed, 2))
        dropped = random.uniform(size=len(samples)) < self.caption_dropout
        chosen = [sample.prompts[int(random.integers(len(sample.prompts)))] for sample in samples]
        return [self.no_prompt if drop else prompt for drop, prompt in zip(dropped, chosen)]

    def _with_preserved(self, batch: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The batch with its first samples once more, for output preservation; the target is computed in the step."""
        count, total = len(samples), len(batch["noisy"])
        batch = {name: torch.cat((tensor, tensor[:count])) for name, tensor in batch.items()}
        if "pixel_weights" in batch:
            batch["pixel_weights"][total:] = 1
        batch[PRESERVED] = device_index(list(range(total, total + count)), self.device)
        if self.base_table is not None:
            prompts = [sample.class_prompt or "" for sample in samples]
            batch |= {BASE + name: tensor for name, tensor in self.base_table.lookup(prompts).items()}
        return batch


def _joined(of_views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What belongs to the views of all parts; those without masks count everywhere."""
    joined = {}
    for name, tensor in of_views[0].items():
        rest = [part.get(name, torch.ones_like(tensor)) for part in of_views[1:]]
        joined[name] = torch.cat([tensor, *rest])
    return joined


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

    @property
    def examples(self) -> list[int]:
        """A micro-batch of each size of images; none if there is only one size."""
        return order.first_of_buckets(self.seed, [len(pairs) for pairs in self.cache.buckets])

    def __call__(self, microbatch: int) -> Batch:
        """The tensors of a micro-batch, by name."""
        generator = order.generator(self.seed, microbatch, self.device)
        seed = order.mixed_seed(self.seed, microbatch, 1)
        buckets = self.cache.buckets
        number, position = order.bucket_of(self.seed, microbatch, [len(pairs) for pairs in buckets])
        rows = order.sample_indices(self.seed, position, self.batch_size, len(buckets[number]))
        batch = self.cache.read([buckets[number][row] for row in rows], seed)
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
