"""The autoencoder of mini-sd. It downsamples by 4, so that a toy's pattern survives in 32 x 32 latents."""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from torch import Tensor

from data.miniature.training.pool import Pool, as_input
from data.miniature.training.steps import train
from data.toybox.places import STUFF

LATENT_CHANNELS = 6
BATCH = 96
OBJECT_WEIGHT = 3.0
"""Extra weight of errors inside the toy, since the background covers most of every image."""
KL_WEIGHT = 1e-5


def build(seed: int):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(48, 96, 144),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=16,
            sample_size=128,
            scaling_factor=1.0,
        )


def prepare_autoencoder(device: torch.device | str, seed: int, compiled: bool, batch: int = BATCH):
    """The autoencoder and its training forward; a run on zeros compiles it before the pool is available."""
    vae = build(seed).to(device).to(memory_format=torch.channels_last)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moments = vae.quant_conv(vae.encoder(x))
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return vae.decoder(vae.post_quant_conv(z)), mean, logvar

    if not compiled:
        return vae, reconstruct
    forward = torch.compile(reconstruct)
    x = torch.zeros(batch, 3, 128, 128, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False):
        y, mean, logvar = forward(x)
    (y.float().square().mean() + mean.mean() + logvar.mean()).backward()
    print("autoencoder: compiled", flush=True)
    return vae, forward


def train_autoencoder(pool: Pool, vae, forward, *, seconds: float, steps: int, seed: int, batch: int = BATCH):
    """Train on the pool, then standardize the latents to mean 0 and standard deviation 1 per channel."""
    device = pool.images.device
    torch.manual_seed(seed)
    images, maps = pool.images.flatten(0, 1), pool.maps.flatten(0, 1)

    def compute_loss() -> Tensor:
        chosen = torch.randint(len(images), (batch,), device=device)
        x = as_input(images[chosen])
        x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        weight = 1.0 + OBJECT_WEIGHT * (maps[chosen] >= len(STUFF)).float()
        weight = torch.maximum(weight, weight.flip(2))[:, None]  # covers the toy whether x is flipped or not
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            y, mean, logvar = forward(x)
        error = (y.float() - x).square()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return (error * weight).mean() + 0.1 * (y.float() - x).abs().mean() + KL_WEIGHT * kl

    done = train([vae], compute_loss, rate=8e-4, steps=steps, seconds=seconds, ema=0.999, label="autoencoder")
    vae = vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    standardize_latents(vae, images[:: max(1, len(images) // 2048)])
    return vae, done


@torch.no_grad()
def standardize_latents(vae, images: Tensor) -> None:
    """Standardize the latents per channel, by folding shift and scale into the convolutions next to them."""
    latents = torch.cat([vae.encode(as_input(part)).latent_dist.mean for part in images.split(64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]
