"""Features of many pictures: each decoded once, in worker processes, and encoded once; kept by content where asked."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from eval.metrics.encoders import ClipEncoder, DinoEncoder, view

PICTURES_AT_A_TIME = 8
"""That a worker decodes before it hands them over; few, so that large files at the end keep all workers busy."""

PICTURES_PER_WORKER = 64
"""Starting a worker process does not pay for fewer."""

PICTURES_PER_FILE = 2048
"""Of the cache, so that a stopped run loses little."""

Encoder = DinoEncoder | ClipEncoder


class _Views(Dataset):
    """What each encoder wants to see of each picture; an unreadable one is its error instead."""

    def __init__(self, paths: Sequence[Path], views: Sequence[Callable[[Image.Image], Tensor]]):
        self.paths, self.views = paths, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor] | str:
        try:
            picture = load_rgb(self.paths[index])
        except InputError as error:
            return str(error)
        return [view(picture) for view in self.views]


def _collate(samples: list[list[Tensor] | str]) -> list[Tensor] | list[str]:
    errors = [sample for sample in samples if isinstance(sample, str)]
    return errors or [torch.stack(views) for views in zip(*samples)]  # pyright: ignore[reportArgumentType]


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file."""

    def of(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(of, paths))


def embed(
    paths: Sequence[Path],
    encoders: Mapping[str, Encoder],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    cache_dir: Path | None = None,
    label: str = "encoding",
) -> dict[str, Tensor]:
    """Unit features (pictures, width) on the CPU by each encoder, by the encoder's key.

    Args:
        paths: pictures; equal files are encoded once.
        encoders: all of them see one decoding of a picture.
        batch_size: pictures at a time.
        workers: processes that decode, by default as many as there are cores and work for.
        cache_dir: where features are kept by the content of the picture and the encoder's identity.
        label: of the progress bar.

    Raises:
        InputError: pictures that cannot be read; they are counted and the first is named.
    """
    hashes = content_hashes(paths)
    known: dict[str, dict[str, Tensor]] = {key: {} for key in encoders}
    if cache_dir is not None:
        known = {key: _load(cache_dir, encoder.identity) for key, encoder in encoders.items()}
    missing = {h: path for h, path in zip(hashes, paths) if any(h not in features for features in known.values())}
    fresh: list[str] = []

    def keep() -> None:
        for key, encoder in encoders.items():
            if cache_dir is not None and fresh:
                _save(cache_dir, encoder.identity, {h: known[key][h] for h in fresh})
        fresh.clear()

    waiting = iter(missing)
    for found in _encode(list(missing.values()), encoders, batch_size, workers, label):
        some = [next(waiting) for _ in range(len(next(iter(found.values()))))]
        for key, features in found.items():
            known[key].update(zip(some, features))
        fresh += some
        if len(fresh) >= PICTURES_PER_FILE:
            keep()
    keep()
    if not paths:
        return {key: torch.empty(0, 0) for key in encoders}
    return {key: torch.stack([features[h].cpu() for h in hashes]) for key, features in known.items()}


def _encode(
    paths: list[Path], encoders: Mapping[str, Encoder], batch_size: int, workers: int | None, label: str
) -> Iterator[dict[str, Tensor]]:
    """Features of each batch in order, on the encoders' device so that nothing waits for it."""
    if workers is None:
        workers = min(os.cpu_count() or 1, len(paths) // PICTURES_PER_WORKER)
    loader = DataLoader(
        _Views(paths, [functools.partial(view, encoder.transform) for encoder in encoders.values()]),
        PICTURES_AT_A_TIME,
        num_workers=workers,
        collate_fn=_collate,
        prefetch_factor=16 if workers else None,
    )
    errors: list[Any] = []
    waiting: list[list[Tensor]] = []
    progress = tqdm(total=len(paths), desc=label, leave=False, disable=None)
    for number, views in enumerate(loader, 1):
        if isinstance(views[0], str):
            errors += views
        else:
            waiting.append(views)
        if errors or not (len(waiting) * PICTURES_AT_A_TIME >= batch_size or number == len(loader)):
            continue
        batches = [torch.cat(some) for some in zip(*waiting)]
        if torch.cuda.is_available():
            batches = [batch.pin_memory() for batch in batches]  # so that the copy need not wait for the encoders
        waiting.clear()
        yield {key: encoder.encode(batch) for (key, encoder), batch in zip(encoders.items(), batches)}
        progress.update(len(batches[0]))
    progress.close()
    if errors:
        raise InputError(f"{len(errors)} of {len(paths)} pictures cannot be scored: {errors[0]}")


def _load(cache_dir: Path, identity: str) -> dict[str, Tensor]:
    known: dict[str, Tensor] = {}
    for file in sorted(cache_dir.glob(f"{identity}-*.safetensors")):
        try:
            known |= load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}); remove it, its pictures are encoded anew.") from error
    return known


def _save(cache_dir: Path, identity: str, features: dict[str, Tensor]) -> None:
    name = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:16]
    with atomic_write(cache_dir / f"{identity}-{name}.safetensors") as temporary:
        save_file({h: vector.cpu().clone() for h, vector in features.items()}, temporary)
