"""The pool as the denoisers see it: latents and embedded captions, computed once and kept on the device."""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.miniature.training.clip import tokenize
from data.miniature.training.pool import CAPTIONS, Pool, as_input


def precision(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a GPU: a pool of 67,200 images then takes 11 GB."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


@torch.no_grad()
def encode_images(pool: Pool, vae) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents of the images, unflipped and flipped, each (images, 2, c, h, w)."""
    dtype = precision(pool.images.device)
    means, stds = [], []
    for part in pool.images.flatten(0, 1).split(256):
        x = as_input(part)
        both = [vae.encode(view).latent_dist for view in (x, x.flip(3))]
        means.append(torch.stack([d.mean for d in both], 1).to(dtype))
        stds.append(torch.stack([d.std for d in both], 1).to(dtype))
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def encode_captions(
    pool: Pool, tokenizer, read: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Embeddings of the captions, (images, ``CAPTIONS``, ...) each, and those of the empty prompt, (1, ...) each.

    Args:
        read: embeds token ids (captions, 77).
    """
    device = pool.images.device
    dtype = precision(device)

    def embed(tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.to(dtype) for output in read(tokens.to(device)))

    tokens = tokenize(tokenizer, [text for texts in pool.captions for text in texts])
    parts = zip(*(embed(part) for part in tokens.split(2048)))
    return tuple(torch.cat(part).unflatten(0, (-1, CAPTIONS)) for part in parts), embed(tokenize(tokenizer, [""]))


def sample_batch(means: Tensor, stds: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of random images, (batch, c, h, w), the numbers of the images and of their captions, (batch,) each."""
    device = means.device
    chosen = torch.randint(len(means), (batch,), device=device)
    mirrored = torch.randint(2, (batch,), device=device)
    variant = torch.randint(CAPTIONS, (batch,), device=device)
    mean, deviation = means[chosen, mirrored].float(), stds[chosen, mirrored].float()
    return mean + deviation * torch.randn_like(mean), chosen, variant


def projected(text_encoder, mini_clip: Path):
    """A text encoder with mini-clip's projection, which gives mini-clip's text features as ``text_embeds``.

    Args:
        text_encoder: mini-clip's text tower, a ``CLIPTextModel``.
        mini_clip: its folder.
    """
    from safetensors import safe_open
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection(text_encoder.config).float()
    # Whether the names begin with text_model differs between versions of transformers.
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in text_encoder.state_dict().items()}
    with safe_open(mini_clip / "open_clip_model.safetensors", "pt") as file:
        weights["text_projection.weight"] = file.get_tensor("text_projection").T.float()
    encoder.load_state_dict(weights)
    return encoder.eval().requires_grad_(False)
