"""What DreamBooth training computes once: latent posteriors and prompt embeddings."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.families.family import Family
from delora_diffusers.families.latents import LatentScale
from delora_diffusers.memory import explain_out_of_memory
from delora_diffusers.pipelines.autoencoder import PIXELS_AT_ONCE, encode
from delora_diffusers.training import order


@dataclasses.dataclass
class LatentCache:
    """Latent posteriors of every view of every image, on the CPU, pinned if there is a GPU.

    Attributes:
        mean, std: (views, channels, height, width), float32.
        first: index of each image's first view; image i has ``first[i + 1] - first[i]`` views.
        scale: the autoencoder's.
        sizes: (views, 6), SDXL's size conditions (``time_ids``) of each view: height and width of the photo, top and
            left of the crop, height and width of the view; None for other models.
    """

    mean: Tensor
    std: Tensor
    first: list[int]
    scale: LatentScale
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first) - 1

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

    def sizes_of(self, images: Sequence[int], seed: int, device: torch.device) -> list[Tensor]:
        """Size conditions of the views that ``sample`` chooses, (batch, 6); empty if the model takes none."""
        return [] if self.sizes is None else [_rows_on(self.sizes, self._views(images, seed), device)]

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
    images: Iterable[list[np.ndarray]],
    count: int,
    device: torch.device,
    sizes: Sequence[tuple[int, ...]] | None = None,
) -> LatentCache:
    """Encode the views of each image with the autoencoder, in batches of at most ``PIXELS_AT_ONCE``.

    Args:
        family: of the base model. vae: on ``device``, in float32: this is done once, and nothing else is on the device.
        images: the views of each image, (resolution, resolution, 3) uint8 each; consumed one image at a time.
        count: number of images, for the progress bar.
        sizes: of all views, see ``LatentCache``; None if the model takes none.
    """
    means, stds, first, pending = [], [], [0], []

    def encode_views(views: list[np.ndarray]) -> None:
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
        mean, std = encode(family, vae, pixels)
        means.append(mean.float().cpu())
        stds.append(std.float().cpu())

    with explain_out_of_memory("encoding the images", ["a smaller --resolution"]):
        for views in tqdm(images, total=count, desc="encoding images", leave=False):
            first.append(first[-1] + len(views))
            pending += views
            batch_size = max(1, PIXELS_AT_ONCE // pending[0][..., 0].size)
            while len(pending) >= batch_size:
                encode_views(pending[:batch_size])
                pending = pending[batch_size:]
        if pending:
            encode_views(pending)
    size_conditions = None if sizes is None else _pinned(torch.tensor(sizes))
    scale = family.scale(vae).on(device)
    return LatentCache(_pinned(torch.cat(means)), _pinned(torch.cat(stds)), first, scale, size_conditions)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def crop_offsets(seed: int, image: int, random_crop: bool, count: int = 16) -> list[float] | None:
    """Positions of an image's random crops along its long side, 0 to 1; None for the centre crop."""
    if not random_crop:
        return None
    return np.random.default_rng(order.mixed_seed(seed, image)).uniform(size=count).tolist()
