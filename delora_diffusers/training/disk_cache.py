"""What is computed once before training on maps, kept on disk: latents' posteriors, maps and prompts' embeddings.

A cache lies in a folder named by a hash of all that it was made from, in shards that are renamed into place when whole.
So a killed run continues where it stopped, and changed settings never meet an old cache.
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
"""Pairs in a shard."""

Views = Callable[[int], list[tuple[np.ndarray, np.ndarray]]]
"""The views of pair number i: (picture (side, side, 3), map (side, side) or (side, side, 3)), uint8."""


@dataclasses.dataclass
class PairBatch:
    """Tensors of some pairs, on the CPU.

    Attributes:
        mean, std: of the latents' posterior, (batch, channels, height, width), unscaled.
        maps: (batch, side, side) class indices or (batch, side, side, 3) colours, uint8.
        embeddings: of the captions, (batch, tokens, width).
    """

    mean: Tensor
    std: Tensor
    maps: Tensor
    embeddings: Tensor


class DiskCache:
    """The shards of a set of ``count`` pairs with ``views`` views each, all of them there."""

    def __init__(self, folder: Path, count: int, views: int):
        self.folder = folder
        self.count = count
        self.views = views
        self._open = functools.lru_cache(maxsize=256)(lambda shard: safe_open(shard_file(folder, shard), "pt"))

    def __len__(self) -> int:
        return self.count

    def read(self, pairs: Sequence[int], seed: int) -> PairBatch:
        """A view of each pair, chosen by the seed."""
        choice = np.random.default_rng(seed)
        rows = []
        for pair in pairs:
            shard, place = self._open(pair // SHARD), pair % SHARD
            view = place * self.views + int(choice.integers(self.views))
            one = {name: shard.get_slice(name)[view : view + 1] for name in ("mean", "std", "maps")}
            rows.append(one | {"embeddings": shard.get_slice("embeddings")[place : place + 1]})
        return PairBatch(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


def fingerprint(settings: dict[str, Any]) -> str:
    """A name for a cache made with these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


@torch.no_grad()
def build_cache(
    accelerator: Accelerator,
    folder: Path,
    count: int,
    views: Views,
    captions: Sequence[str],
    encode_picture: Callable[[Tensor], Any],
    encode_captions: Callable[[list[str]], Tensor],
) -> DiskCache:
    """Make the shards that are missing, spread over the processes, and open the cache.

    Args:
        folder: of this cache; see ``fingerprint``.
        count: pairs.
        views: as many for each pair.
        captions: one for each pair.
        encode_picture: the posterior of pictures (batch, 3, side, side), -1 to 1.
        encode_captions: embeddings (captions, tokens, width).
    """
    shards = range((count + SHARD - 1) // SHARD)
    missing = [shard for shard in shards if not shard_file(folder, shard).exists()]
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for shard in tqdm(mine, desc="encoding pairs", disable=not accelerator.is_local_main_process or not mine):
        members = range(shard * SHARD, min(count, (shard + 1) * SHARD))
        tensors: dict[str, list[Tensor]] = {"mean": [], "std": [], "maps": []}
        for pair in members:
            pictures, maps = (np.stack(half) for half in zip(*views(pair)))
            posterior = encode_picture(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
            tensors["mean"].append(posterior.mean.float().cpu())
            tensors["std"].append(posterior.std.float().cpu())
            tensors["maps"].append(torch.from_numpy(maps))
        whole = {name: torch.cat(parts).contiguous() for name, parts in tensors.items()}
        whole["embeddings"] = encode_captions([captions[pair] for pair in members]).cpu().contiguous()
        with atomic_write(shard_file(folder, shard)) as temporary:
            save_file(whole, temporary)
    accelerator.wait_for_everyone()
    each = len(views(0))
    return DiskCache(folder, count, each)
