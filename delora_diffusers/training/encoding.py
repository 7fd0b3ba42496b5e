"""What is computed once before training: the latents' posteriors and the prompts' embeddings."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.training import order


@dataclasses.dataclass
class LatentCache:
    """Posteriors of every view of every picture, on the training device.

    Attributes:
        mean, std: (views, channels, height, width), float32.
        first: index of each picture's first view; ``first[i + 1] - first[i]`` is how many views picture i has.
        scaling_factor: the autoencoder's.
        sizes: (views, 6), what SDXL is told of each view: height and width of its photograph, top and left of the crop,
            height and width of the view.
    """

    mean: Tensor
    std: Tensor
    first: list[int]
    scaling_factor: float
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first) - 1

    def sample(self, pictures: Sequence[int], generator: torch.Generator, seed: int) -> Tensor:
        """A fresh scaled latent of a random view of each picture, (batch, channels, height, width).

        Args:
            pictures: indices.
            generator: source of the latents' noise, on the cache's device.
            seed: chooses the views.
        """
        chosen = self._views(pictures, seed)
        mean, std = self.mean[chosen], self.std[chosen]
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return (mean + std * noise) * self.scaling_factor

    def sizes_of(self, pictures: Sequence[int], seed: int) -> list[Tensor]:
        """What the model is told of the views that ``sample`` draws, (batch, 6); nothing where it is not told."""
        return [] if self.sizes is None else [self.sizes[self._views(pictures, seed)]]

    def _views(self, pictures: Sequence[int], seed: int) -> Tensor:
        """The indices of the views that ``sample`` draws, (batch,)."""
        choice = np.random.default_rng(seed)
        return device_index(
            [int(choice.integers(self.first[i], self.first[i + 1])) for i in pictures], self.mean.device
        )


def device_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """An index on the device, (rows,). Indexing with a list instead would wait for the device."""
    return torch.tensor(rows).to(device, non_blocking=True)


class PromptTable:
    """What the text encoders, or the tokenizers where the encoders are trained, make of a fixed list of prompts.

    Args:
        prompts: all different.
        tensors: by name, (prompts, ...) each, on the training device.
    """

    def __init__(self, prompts: Sequence[str], tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}

    def lookup(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of these prompts, (prompts, ...) each."""
        first = next(iter(self.tensors.values()))
        rows = device_index([self._rows[prompt] for prompt in prompts], first.device)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


@torch.no_grad()
def encode_images(
    vae,
    pictures: Iterable[list[np.ndarray]],
    count: int,
    device: torch.device,
    batch_size: int = 8,
    sizes: Sequence[tuple[int, ...]] | None = None,
) -> LatentCache:
    """Encode the views of each picture with the autoencoder, in batches of views.

    Args:
        vae: an ``AutoencoderKL`` on ``device``.
        pictures: for each picture its views, (resolution, resolution, 3) uint8; read one after the other.
        count: how many pictures there are, for the progress bar.
        device: where the cache is to be.
        sizes: of all views, see ``LatentCache``; None where the model is not told them.
    """
    means, stds, first, waiting = [], [], [0], []

    def encode(views: list[np.ndarray]) -> None:
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device, vae.dtype) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())

    for views in tqdm(pictures, total=count, desc="encoding pictures", leave=False):
        first.append(first[-1] + len(views))
        waiting += views
        while len(waiting) >= batch_size:
            encode(waiting[:batch_size])
            waiting = waiting[batch_size:]
    if waiting:
        encode(waiting)
    told = None if sizes is None else torch.tensor(sizes, device=device)
    return LatentCache(torch.cat(means), torch.cat(stds), first, vae.config.scaling_factor, told)


def crop_offsets(seed: int, picture: int, random_crop: bool, count: int = 16) -> list[float] | None:
    """Where the random crops of a picture lie, 0 to 1 along its long side; None for the centre crop."""
    if not random_crop:
        return None
    return np.random.default_rng(order.mixed_seed(seed, picture)).uniform(size=count).tolist()
