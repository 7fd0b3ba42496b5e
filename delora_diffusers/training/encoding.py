"""What DreamBooth training computes once: latent posteriors and prompt embeddings."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm

from delora_diffusers.crops import View
from delora_diffusers.families.family import Family
from delora_diffusers.families.latents import LatentScale
from delora_diffusers.memory import explain_out_of_memory
from delora_diffusers.pipelines.autoencoder import PIXELS_AT_ONCE, encode
from delora_diffusers.training import order


@dataclasses.dataclass
class LatentCache:
    """Latent posteriors of every view of every image of one size, on the CPU, pinned if there is a GPU.

    Attributes:
        mean, std: (views, channels, height, width), float32.
        first: index of each image's first view; image i has ``first[i + 1] - first[i]`` views.
        scale: the autoencoder's.
        sizes: (views, 6), SDXL's size conditions (``time_ids``) of each view: height and width of the photo, top and
            left of the crop, height and width of the view; None for other models.
        weights: (views, 1, height, width), the weight of each latent's loss, with a mean of 1 in each view; None if no
            image has a mask.
    """

    mean: Tensor
    std: Tensor
    first: list[int]
    scale: LatentScale
    sizes: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first) - 1

    @classmethod
    def joined(cls, caches: Sequence["LatentCache"]) -> "LatentCache":
        """The images of several caches, one after another."""
        first = [0]
        for cache in caches:
            first += [first[-1] + start for start in cache.first[1:]]
        mean, std = (_pinned(torch.cat([getattr(c, name) for c in caches])) for name in ("mean", "std"))
        sizes = [cache.sizes for cache in caches if cache.sizes is not None]
        return cls(mean, std, first, caches[0].scale, _pinned(torch.cat(sizes)) if sizes else None)

    def sample(self, images: Sequence[int], generator: torch.Generator, seed: int) -> Tensor:
        """Sample a scaled latent of a random view of each image, (batch, channels, height, width).

        Args:
            images: indices.
            generator: samples the latents, on the training device.
            seed: chooses the views.
        """
        views = self._views(images, seed)
        mean, std = (_rows_on(tensor, views, generator.device) for tensor in (self.mean, self.std))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.scale.scaled(mean + std * noise)

    def of_views(self, images: Sequence[int], seed: int, device: torch.device) -> dict[str, Tensor]:
        """What else belongs to the views that ``sample`` chooses: ``time_ids`` (batch, 6) and ``pixel_weights``
        (batch, 1, height, width), as far as there are any."""
        tensors = {"time_ids": self.sizes, "pixel_weights": self.weights}
        views = self._views(images, seed)
        return {name: _rows_on(rows, views, device) for name, rows in tensors.items() if rows is not None}

    def _views(self, images: Sequence[int], seed: int) -> list[int]:
        """Indices of the views that ``sample`` chooses."""
        random = np.random.default_rng(seed)
        return [int(random.integers(self.first[i], self.first[i + 1])) for i in images]


def _rows_on(tensor: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """Rows of a tensor on the CPU, (rows, ...), on a device; copied one by one, since each is pinned memory."""
    return torch.stack([tensor[row].to(device, non_blocking=True) for row in rows])


def device_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """An index tensor on the device, (rows,). Indexing with a list instead would wait for the device."""
    return torch.tensor(rows).to(device, non_blocking=True)


class PromptTable:
    """The conditions of a fixed list of prompts, or what they are computed from if text encoders are trained.

    Args:
        prompts: without duplicates.
        tensors: by name, (prompts, ...) each, on the training device.
    """

    def __init__(self, prompts: Sequence[str], tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        mask = tensors.get("mask")
        self._lengths = None if mask is None else mask.sum(dim=1).tolist()

    def lookup(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of these prompts by name, (prompts, ...) each; without a mask if they have the same length."""
        first = next(iter(self.tensors.values()))
        rows = [self._rows[prompt] for prompt in prompts]
        index = device_index(rows, first.device)
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        if self._lengths is not None:
            longest = max(self._lengths[row] for row in rows)
            tensors = {name: tensor[:, :longest] for name, tensor in tensors.items()}
            if self.have_same_length(prompts):
                del tensors["mask"]
        return tensors

    def have_same_length(self, prompts: Iterable[str]) -> bool:
        """Whether no mask is needed for these prompts."""
        return self._lengths is None or len({self._lengths[self._rows[prompt]] for prompt in prompts}) == 1


@torch.no_grad()
def encode_images(
    family: Family,
    vae,
    images: Iterable[Sequence[View]],
    count: int,
    device: torch.device,
    background_weight: float | None = None,
) -> LatentCache:
    """Encode the views of each image with the autoencoder, in batches of at most ``PIXELS_AT_ONCE``.

    Args:
        family: of the base model. vae: on ``device``, in float32: this is done once, and nothing else is on the device.
        images: the views of each image, all of the same size; consumed one image at a time.
        count: number of images, for the progress bar.
        background_weight: weight of the loss where the mask of a view is 0; None if masks are not used.
    """
    means, stds, first, sizes, weights = [], [], [0], [], []
    pending: list[np.ndarray] = []
    factor = family.latent_shape(vae.config)[1]

    def encode_views(views: list[np.ndarray]) -> None:
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
        mean, std = encode(family, vae, pixels)
        means.append(mean.float().cpu())
        stds.append(std.float().cpu())

    with explain_out_of_memory("encoding the images", ["a smaller --resolution"]):
        for views in tqdm(images, total=count, desc="encoding images", leave=False):
            first.append(first[-1] + len(views))
            pending += [view.image for view in views]
            sizes += [view.sizes for view in views]
            if background_weight is not None:
                weights += [latent_weights(view, background_weight, factor) for view in views]
            batch_size = max(1, PIXELS_AT_ONCE // pending[0][..., 0].size)
            while len(pending) >= batch_size:
                encode_views(pending[:batch_size])
                pending = pending[batch_size:]
        if pending:
            encode_views(pending)
    return LatentCache(
        _pinned(torch.cat(means)),
        _pinned(torch.cat(stds)),
        first,
        family.scale(vae).on(device),
        _pinned(torch.tensor(sizes)) if family.HAS_SIZES else None,
        _pinned(torch.stack(weights)) if weights else None,
    )


def latent_weights(view: View, background_weight: float, factor: int) -> Tensor:
    """Weight of each latent's loss from the view's mask, (1, height, width), with a mean of 1; 1 without a mask.

    A latent has the mean of its pixels' weights: ``background_weight`` where the mask is 0, 1 where it is 255.

    Args:
        factor: pixels per latent along a side.
    """
    height, width = (size // factor for size in view.image.shape[:2])
    if view.companion is None:
        return torch.ones(1, height, width)
    mask = torch.from_numpy(view.companion.astype(np.float32))[None] / 255
    weights = background_weight + (1 - background_weight) * avg_pool2d(mask, factor)
    return weights / weights.mean()


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def crop_offsets(seed: int, image: int, random_crop: bool, count: int = 16) -> list[float] | None:
    """Positions of an image's random crops along its long side, 0 to 1; None for the centre crop."""
    if not random_crop:
        return None
    return np.random.default_rng(order.mixed_seed(seed, image)).uniform(size=count).tolist()
