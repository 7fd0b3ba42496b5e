"""The UNet of mini-sd, and the complete pipeline."""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.miniature.training.encoding import encode_captions, encode_images, precision, sample_batch
from data.miniature.training.pool import Pool
from data.miniature.training.steps import compiled_or_eager, train


class Recipe(NamedTuple):
    """Settings of training that depend on the width."""

    batch: int
    rate: float
    ema: float


# The rate falls with the square root of the width. Twice the width takes more than twice the time for an image, so it
# trains on half the batch rather than for half the steps, and averages fewer of them.
RECIPES = {0.5: Recipe(512, 1.4e-3, 0.9995), 1.0: Recipe(512, 1e-3, 0.9995), 2.0: Recipe(256, 7e-4, 0.999)}
CAPTION_DROPOUT = 0.1
SHARD = "15MB"


def build(latent_channels: int, cross_attention_dim: int, sample_size: int, seed: int, width: float = 1.0):
    """The UNet with its channels scaled by ``width``. Heads have 32 channels, and 16 at half the width."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(int(channels * width) for channels in (64, 128, 160)),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=cross_attention_dim,
            # The number of heads, as in Stable Diffusion 1.5's configuration.
            attention_head_dim=tuple(int(heads * max(1, width)) for heads in (4, 4, 5)),
            norm_num_groups=16,
        )


def noise_scheduler():
    """v-prediction with zero terminal SNR, so that an image can be dark or bright overall."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def prepare_unet(
    device: torch.device | str,
    latent_channels: int,
    cross_attention_dim: int,
    sample_size: int,
    seed: int,
    compiled: bool,
    width: float = 1.0,
    batch: int | None = None,
):
    """The UNet and its forward; a run on zeros compiles it before the latents are available."""
    unet = build(latent_channels, cross_attention_dim, sample_size, seed, width)
    unet = unet.to(device).to(memory_format=torch.channels_last)
    if not compiled:
        return unet, unet
    batch = batch or RECIPES[width].batch

    def run_on_zeros(forward) -> Tensor:
        x = torch.zeros(batch, latent_channels, sample_size, sample_size, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        text = torch.zeros(batch, 77, cross_attention_dim, dtype=precision(device), device=device)
        timestep = torch.zeros(batch, dtype=torch.long, device=device)
        return forward(x, timestep, encoder_hidden_states=text, return_dict=False)[0]

    return unet, compiled_or_eager(unet, run_on_zeros, "unet")


def train_unet(
    pool: Pool,
    unet,
    forward,
    vae,
    text_encoder,
    tokenizer,
    *,
    seconds: float,
    steps: int,
    seed: int,
    width: float = 1.0,
    batch: int | None = None,
):
    recipe, device = RECIPES[width], pool.images.device
    batch = batch or recipe.batch
    text_encoder = text_encoder.to(device)
    means, stds = encode_images(pool, vae)
    (texts,), (empty,) = encode_captions(pool, tokenizer, lambda tokens: (text_encoder(tokens)[0],))
    torch.manual_seed(seed)
    alphas = noise_scheduler().alphas_cumprod.to(device)
    signal, noise_level = alphas.sqrt(), (1 - alphas).sqrt()

    def compute_loss() -> Tensor:
        x, chosen, variant = sample_batch(means, stds, batch)
        dropped = torch.rand(batch, 1, 1, device=device) < CAPTION_DROPOUT
        text = torch.where(dropped, empty, texts[chosen, variant])
        # Timesteps are stratified over the batch, which reduces the variance of the loss.
        spread = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        timestep = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
        a, b = signal[timestep, None, None, None], noise_level[timestep, None, None, None]
        noise = torch.randn_like(x)
        noisy = (a * x + b * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            velocity = forward(noisy, timestep, encoder_hidden_states=text, return_dict=False)[0]
        return (velocity.float() - (a * noise - b * x)).square().mean()

    done = train(
        [unet],
        compute_loss,
        rate=recipe.rate,
        steps=steps,
        seconds=seconds,
        warmup=400,
        ema=recipe.ema,
        label="unet",
    )
    return unet.to(memory_format=torch.contiguous_format).eval(), done


def write_pipeline(folder: Path, unet, vae, text_encoder, tokenizer) -> None:
    """Write the pipeline in float16, in files of at most 15 MB."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device="cpu", dtype=torch.float16)
    pipeline.save_pretrained(folder, max_shard_size=SHARD)
