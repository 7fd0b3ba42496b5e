"""All randomness of a run as a pure function of the seed and the micro-batch's index.

Exact resumption therefore needs no saved random state, and samples do not depend on how a global batch is split: one
process with two accumulation steps sees the same micro-batches as two processes.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """Mix several small numbers into a 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


@functools.lru_cache(maxsize=32)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def sample_indices(seed: int, microbatch: int, batch_size: int, dataset_size: int) -> list[int]:
    """Indices of the samples in a micro-batch; each epoch is one shuffled pass over the dataset."""
    counters = range(microbatch * batch_size, (microbatch + 1) * batch_size)
    return [sample_index(seed, counter, dataset_size) for counter in counters]


def sample_index(seed: int, counter: int, dataset_size: int) -> int:
    """Index of sample number ``counter`` of endless shuffled passes over the dataset."""
    return int(_permutation(seed, counter // dataset_size, dataset_size)[counter % dataset_size])


@functools.lru_cache(maxsize=4)
def _bucket_order(seed: int, round_number: int, sizes: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng((seed, round_number, 5)).permutation(np.repeat(np.arange(len(sizes)), sizes))


def bucket_of(seed: int, microbatch: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The bucket of a micro-batch, and which of the bucket's micro-batches it is, from 0.

    A round has as many micro-batches of each bucket as the bucket has samples, in random order. With batches of n, the
    shuffled passes of ``sample_indices`` then show every sample of every bucket exactly n times in a round.

    Args:
        sizes: the number of samples in each bucket, at least one.
    """
    if len(sizes) == 1:
        return 0, microbatch
    round_number, position = divmod(microbatch, sum(sizes))
    buckets = _bucket_order(seed, round_number, tuple(sizes))
    bucket = int(buckets[position])
    return bucket, round_number * sizes[bucket] + int((buckets[:position] == bucket).sum())


def first_of_buckets(seed: int, sizes: Sequence[int]) -> list[int]:
    """The first micro-batch of each bucket; none if there is only one bucket. See ``bucket_of``."""
    if len(sizes) == 1:
        return []
    found: dict[int, int] = {}
    for microbatch in range(sum(sizes)):
        found.setdefault(bucket_of(seed, microbatch, sizes)[0], microbatch)
    return list(found.values())


def generator(seed: int, microbatch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator for a micro-batch's noise, timesteps and latent samples."""

    return torch.Generator(device).manual_seed(mixed_seed(seed, microbatch))
