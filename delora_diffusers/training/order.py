"""All randomness of a run as a pure function of the seed and the micro-batch's index.

Exact resumption therefore needs no saved random state, and samples do not depend on how a global batch is split: one
process with two accumulation steps sees the same micro-batches as two processes.
"""

import functools

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """Mix several small numbers into a 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def sample_indices(seed: int, microbatch: int, batch_size: int, dataset_size: int) -> list[int]:
    """Indices of the samples in a micro-batch; each epoch is one shuffled pass over the dataset."""
    counters = range(microbatch * batch_size, (microbatch + 1) * batch_size)
    return [int(_permutation(seed, c // dataset_size, dataset_size)[c % dataset_size]) for c in counters]


def generator(seed: int, microbatch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator for a micro-batch's noise, timesteps and latent samples."""

    return torch.Generator(device).manual_seed(mixed_seed(seed, microbatch))
