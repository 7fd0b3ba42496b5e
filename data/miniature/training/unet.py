"""The UNet of mini-sd, and the complete pipeline."""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

from pathlib import Path

import torch
from torch import Tensor

from data.miniature.training.clip import tokenize
from data.miniature.training.pool import CAPTIONS, Pool, as_input
from data.miniature.training.steps import train

BATCH = 512
CAPTION_DROPOUT = 0.1
SHARD = "15MB"


def build(latent_channels: int, cross_attention_dim: int, sample_size: int, seed: int):
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=(64, 128, 160),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=(4, 4, 5),  # the number of heads, as in Stable Diffusion 1.5's configuration
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


@torch.no_grad()
def encode_pool(pool: Pool, vae, text_encoder, tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Encode the images, unflipped and flipped, and the captions; in bfloat16 on a GPU.

    Returns:
        Latent means and standard deviations, each (images, 2, c, h, w), and text embeddings (images, captions, 77,
        width).
    """
    device = pool.images.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    images = pool.images.flatten(0, 1)
    means, stds = [], []
    for part in images.split(256):
        x = as_input(part)
        both = [vae.encode(view).latent_dist for view in (x, x.flip(3))]
        means.append(torch.stack([d.mean for d in both], 1).to(dtype))
        stds.append(torch.stack([d.std for d in both], 1).to(dtype))
    tokens = tokenize(tokenizer, [text for texts in pool.captions for text in texts])
    texts = [text_encoder(part.to(device))[0].to(dtype) for part in tokens.split(2048)]
    return torch.cat(means), torch.cat(stds), torch.cat(texts).unflatten(0, (-1, CAPTIONS))


def prepare_unet(
    device: torch.device | str,
    latent_channels: int,
    width: int,
    sample_size: int,
    seed: int,
    compiled: bool,
    batch=BATCH,
):
    """The UNet and its forward; a run on zeros compiles it before the latents are available."""
    unet = build(latent_channels, width, sample_size, seed).to(device).to(memory_format=torch.channels_last)
    if not compiled:
        return unet, unet
    forward = torch.compile(unet)
    x = torch.zeros(batch, latent_channels, sample_size, sample_size, device=device)
    text = torch.zeros(batch, 77, width, dtype=torch.bfloat16, device=device)
    timestep = torch.zeros(batch, dtype=torch.long, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False):
        y = forward(
            x.contiguous(memory_format=torch.channels_last), timestep, encoder_hidden_states=text, return_dict=False
        )
    y[0].float().square().mean().backward()
    print("unet: compiled", flush=True)
    return unet, forward


def train_unet(
    pool: Pool, unet, forward, vae, text_encoder, tokenizer, *, seconds: float, steps: int, seed: int, batch=BATCH
):
    device = pool.images.device
    text_encoder = text_encoder.to(device)
    latents, deviations, texts = encode_pool(pool, vae, text_encoder, tokenizer)
    with torch.no_grad():
        empty = text_encoder(tokenize(tokenizer, [""]).to(device))[0].to(texts.dtype)
    torch.manual_seed(seed)
    alphas = noise_scheduler().alphas_cumprod.to(device)
    signal, noise_level = alphas.sqrt(), (1 - alphas).sqrt()

    def compute_loss() -> Tensor:
        chosen = torch.randint(len(latents), (batch,), device=device)
        mirrored = torch.randint(2, (batch,), device=device)
        variant = torch.randint(CAPTIONS, (batch,), device=device)
        mean, deviation = latents[chosen, mirrored].float(), deviations[chosen, mirrored].float()
        x = mean + deviation * torch.randn_like(mean)
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

    done = train([unet], compute_loss, rate=1e-3, steps=steps, seconds=seconds, warmup=400, ema=0.9995, label="unet")
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
