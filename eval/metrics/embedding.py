"""Features of many images: each image is decoded once, in a worker process, and encoded once; optionally cached."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
from delora_diffusers.memory import explain_out_of_memory
from eval.metrics.encoders import Encoder

IMAGES_PER_CHUNK = 8
"""A worker decodes this many before it hands them over; few, so that large files at the end keep all workers busy."""

IMAGES_PER_WORKER = 64
"""With fewer images, starting another worker process takes longer than it saves."""

IMAGES_PER_FILE = 2048
"""Images per file of the cache, so that a stopped run loses little."""


class _Views(Dataset):
    """Each image preprocessed for each encoder; for an unreadable image the error message instead."""

    def __init__(self, paths: Sequence[Path], views: Sequence[Callable[[Image.Image], Tensor]]):
        self.paths, self.views = paths, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor] | str:
        try:
            image = load_rgb(self.paths[index])
        except InputError as error:
            return str(error)
        return [view(image) for view in self.views]


def _collate(samples: list[list[Tensor] | str]) -> list[Tensor] | list[str]:
    errors = [sample for sample in samples if isinstance(sample, str)]
    return errors or [torch.stack(views) for views in zip(*samples)]  # pyright: ignore[reportArgumentType]


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file."""

    def content_hash(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(content_hash, paths))


def embed(
    paths: Sequence[Path],
    encoders: Mapping[str, Encoder],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    cache_dir: Path | None = None,
    label: str = "encoding",
) -> dict[str, Tensor]:
    """Unit features (images, width) on the CPU, by the encoder's key.

    Args:
        paths: image files; files with the same content are encoded once.
        encoders: by key; an image is decoded once for all of them.
        batch_size: images per batch.
        workers: number of processes that decode; by default one per core, fewer if there are few images.
        cache_dir: folder that caches features by the content of the image and the identity of the encoder.
        label: of the progress bar.

    Raises:
        InputError: images cannot be read; gives their number and the first error.
    """
    hashes = content_hashes(paths)
    known: dict[str, dict[str, Tensor]] = {key: {} for key in encoders}
    if cache_dir is not None:
        known = {key: _load(cache_dir, encoder.identity) for key, encoder in encoders.items()}
    missing = {h: path for h, path in zip(hashes, paths) if any(h not in features for features in known.values())}
    unsaved: list[str] = []

    def save_new() -> None:
        for key, encoder in encoders.items():
            if cache_dir is not None and unsaved:
                _save(cache_dir, encoder.identity, {h: known[key][h] for h in unsaved})
        unsaved.clear()

    remaining = iter(missing)
    with explain_out_of_memory(f"encoding {batch_size} images at once", ["a smaller --batch_size", "--precision bf16"]):
        for batch in _encode(list(missing.values()), encoders, batch_size, workers, label):
            encoded = [next(remaining) for _ in range(len(next(iter(batch.values()))))]
            for key, features in batch.items():
                known[key].update(zip(encoded, features))
            unsaved += encoded
            if len(unsaved) >= IMAGES_PER_FILE:
                save_new()
    save_new()
    if not paths:
        return {key: torch.empty(0, 0) for key in encoders}
    return {key: torch.stack([features[h].cpu() for h in hashes]) for key, features in known.items()}


def _encode(
    paths: list[Path], encoders: Mapping[str, Encoder], batch_size: int, workers: int | None, label: str
) -> Iterator[dict[str, Tensor]]:
    """Features of each batch in order, left on the encoders' device so that nothing waits for the GPU."""
    if workers is None:
        workers = min(os.cpu_count() or 1, len(paths) // IMAGES_PER_WORKER)
    loader = DataLoader(
        _Views(paths, [encoder.view for encoder in encoders.values()]),
        IMAGES_PER_CHUNK,
        num_workers=workers,
        collate_fn=_collate,
        prefetch_factor=16 if workers else None,
    )
    errors: list[str] = []
    chunks: list[list[Tensor]] = []
    progress = tqdm(total=len(paths), desc=label, leave=False, disable=None)
    for number, chunk in enumerate(loader, 1):
        if isinstance(chunk[0], str):
            errors += chunk
        else:
            chunks.append(chunk)
        if errors or not (len(chunks) * IMAGES_PER_CHUNK >= batch_size or number == len(loader)):
            continue
        batches = [torch.cat(views) for views in zip(*chunks)]
        if torch.cuda.is_available():
            batches = [batch.pin_memory() for batch in batches]  # so that the copy need not wait for the encoders
        chunks.clear()
        yield {key: encoder.encode(batch) for (key, encoder), batch in zip(encoders.items(), batches)}
        progress.update(len(batches[0]))
    progress.close()
    if errors:
        raise InputError(f"{len(errors)} of {len(paths)} images cannot be scored: {errors[0]}")


def _load(cache_dir: Path, identity: str) -> dict[str, Tensor]:
    known: dict[str, Tensor] = {}
    for file in sorted(cache_dir.glob(f"{identity}-*.safetensors")):
        try:
            known |= load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}); remove it, its images are then encoded again.") from error
    return known


def _save(cache_dir: Path, identity: str, features: dict[str, Tensor]) -> None:
    name = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:16]
    with atomic_write(cache_dir / f"{identity}-{name}.safetensors") as temporary:
        save_file({h: vector.cpu().clone() for h, vector in features.items()}, temporary)
