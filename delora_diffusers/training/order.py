"""Every random draw of a run as a pure function of the seed and a counter.

Nothing needs to be saved to resume exactly, and the draws do not depend on how a global batch is spread: one process
with two accumulation steps sees the very micro-batches that two processes see.
"""

import functools

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def sample_indices(seed: int, microbatch: int, batch_size: int, dataset_size: int) -> list[int]:
    """Which samples micro-batch number ``microbatch`` holds: each epoch is one shuffled pass over the dataset."""
    counters = range(microbatch * batch_size, (microbatch + 1) * batch_size)
    return [int(_permutation(seed, c // dataset_size, dataset_size)[c % dataset_size]) for c in counters]


def generator(seed: int, microbatch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of a micro-batch's noise, timesteps and latent samples."""
    return torch.Generator(device).manual_seed(mixed_seed(seed, microbatch))
