"""On-disk cache for training on maps, computed once: latent posteriors, maps and caption embeddings.

The folder of a cache is named by a hash of everything it depends on, and each shard is renamed into place once it is
complete. A killed run therefore continues where it stopped, and changed settings never reuse an old cache.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.atomic import atomic_write

SHARD = 64
"""Pairs per shard."""

Views = Callable[[int], list[tuple[np.ndarray, np.ndarray]]]
"""Returns the views of pair i: (image (height, width, 3), map (height, width) or (height, width, 3)), uint8."""


@dataclasses.dataclass
class PairBatch:
    """Tensors of a batch of pairs, on the CPU.

    Attributes:
        mean, std: of the latent posteriors, (batch, channels, height, width), unscaled.
        maps: (batch, height, width) class indices or (batch, height, width, 3) colours, uint8.
        embeddings: of the captions, (batch, tokens, width).
    """

    mean: Tensor
    std: Tensor
    maps: Tensor
    embeddings: Tensor


class DiskCache:
    """A complete set of shards.

    Args:
        buckets: the pairs of each size; a batch is of one. views: of each pair.
    """

    def __init__(self, folder: Path, buckets: Sequence[Sequence[int]], views: int):
        self.folder = folder
        self.buckets = buckets
        self.views = views
        self._places = {
            pair: (shard, row) for shard, members in enumerate(shards_of(buckets)) for row, pair in enumerate(members)
        }
        self._open = functools.lru_cache(maxsize=256)(lambda shard: safe_open(shard_file(folder, shard), "pt"))

    def read(self, pairs: Sequence[int], seed: int) -> PairBatch:
        """Read a random view of each pair, all of one size; the seed chooses the views."""
        random = np.random.default_rng(seed)
        rows = []
        for pair in pairs:
            number, index = self._places[pair]
            shard = self._open(number)
            view = index * self.views + int(random.integers(self.views))
            row = {name: shard.get_slice(name)[view : view + 1] for name in ("mean", "std", "maps")}
            rows.append(row | {"embeddings": shard.get_slice("embeddings")[index : index + 1]})
        return PairBatch(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def shards_of(buckets: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The pairs of each shard; all of a shard have the same size."""
    return [pairs[start : start + SHARD] for pairs in buckets for start in range(0, len(pairs), SHARD)]


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


def fingerprint(settings: dict[str, Any]) -> str:
    """The folder name of the cache for these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_stamp(path: Path) -> tuple[str, int, int]:
    """A file's path, size and modification time, which change when the file does."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


@torch.no_grad()
def build_cache(
    accelerator: Accelerator,
    folder: Path,
    buckets: Sequence[Sequence[int]],
    views: Views,
    captions: Sequence[str],
    encode_images: Callable[[Tensor], tuple[Tensor, Tensor]],
    encode_captions: Callable[[list[str]], Tensor],
) -> DiskCache:
    """Compute the missing shards, split across processes, and open the cache.

    Args:
        folder: of this cache; see ``fingerprint``.
        buckets: the pairs of each size.
        views: returns equally many views for every pair.
        captions: one per pair.
        encode_images: returns the posterior's mean and standard deviation of images (batch, 3, height, width), -1 to 1.
        encode_captions: returns embeddings (captions, tokens, width).
    """
    shards = shards_of(buckets)
    missing = [shard for shard in range(len(shards)) if not shard_file(folder, shard).exists()]
    accelerator.wait_for_everyone()  # all processes list the missing shards before any process writes one
    share = missing[accelerator.process_index :: accelerator.num_processes]
    for shard in tqdm(share, desc="encoding pairs", disable=not accelerator.is_local_main_process or not share):
        tensors: dict[str, list[Tensor]] = {"mean": [], "std": [], "maps": []}
        for pair in shards[shard]:
            images, maps = (np.stack(arrays) for arrays in zip(*views(pair)))
            mean, std = encode_images(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
            tensors["mean"].append(mean.float().cpu())
            tensors["std"].append(std.float().cpu())
            tensors["maps"].append(torch.from_numpy(maps))
        contents = {name: torch.cat(parts).contiguous() for name, parts in tensors.items()}
        contents["embeddings"] = encode_captions([captions[pair] for pair in shards[shard]]).cpu().contiguous()
        with atomic_write(shard_file(folder, shard)) as temporary:
            save_file(contents, temporary)
    accelerator.wait_for_everyone()
    return DiskCache(folder, buckets, len(views(buckets[0][0])))
