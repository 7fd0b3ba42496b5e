"""A small MMDiT trained as a rectified flow (Esser et al., ICML 2024), and the complete Stable Diffusion 3 pipeline."""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from data.miniature.training.encoding import encode_captions, encode_images, precision, sample_batch
from data.miniature.training.pool import Pool
from data.miniature.training.steps import compiled_or_eager, train
from data.miniature.training.unet import CAPTION_DROPOUT, SHARD

BATCH, RATE, EMA = 256, 1e-3, 0.999
SHIFT = 1.0
"""Stable Diffusion 3 is trained with 1 on 32 x 32 latents, which is what mini-sd's autoencoder gives, and only shifts
the times towards noise for larger ones."""
CLIP_TOKENS, T5_TOKENS = 77, 256
ZERO_TOKENS = 27
"""Training computes this many of the 256 tokens that stand for a missing T5. With 27, the sequence's length is a
multiple of 8, as fused kernels with a bias need, and the bias log(256 / 27) = 2.249 is hardly rounded in bfloat16."""
LAYERS, HEADS, HEAD_DIM = 8, 6, 32


def build(latent_channels: int, text_width: int, sample_size: int, seed: int, layers: int = LAYERS):
    """The transformer, initialized as DiT is (Peebles and Xie, ICCV 2023): every block begins as the identity.

    Args:
        text_width: of the text encoder's hidden states and features; the transformer reads two of each.
    """
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=layers,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            joint_attention_dim=2 * text_width,
            pooled_projection_dim=2 * text_width,
            caption_projection_dim=HEADS * HEAD_DIM,
            pos_embed_max_size=sample_size,  # so that images may have twice the side
            qk_norm="rms_norm",
        )
        for module in transformer.transformer_blocks.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
                torch.nn.init.zeros_(module.bias)
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


class ZeroTokenAttention:
    """diffusers' ``JointAttnProcessor2_0`` with each of the last ``ZERO_TOKENS`` tokens in place of several.

    The 256 tokens of a missing T5 are equal, and stay equal in every block, because text has no positions. Attending to
    n of them with log(256 / n) added to their logits gives the same result as attending to all, and is 1.6 times
    faster. The pipeline computes all 256.
    """

    def __init__(self, tokens: int, device: torch.device | str):
        self.bias = torch.zeros(tokens, tokens, dtype=precision(device), device=device)
        self.bias[:, -ZERO_TOKENS:] = math.log(T5_TOKENS / ZERO_TOKENS)

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (batch, tokens, width) and text tokens (batch, tokens, width)."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], dim=2)
        query = torch.cat([attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(text)))], 2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(text)))], 2)
        bias = self.bias.to(value.dtype)
        y = functional.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, bias)
        image, text = y.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def conditions(hidden: Tensor, pooled: Tensor, zero_tokens: int = T5_TOKENS) -> dict[str, Tensor]:
    """The transformer's conditions, from the output of the text encoder that takes the place of both of SD3's.

    Args:
        hidden: penultimate hidden states (batch, 77, width). pooled: projected features (batch, width).
    """
    hidden, pooled = torch.cat([hidden, hidden], dim=2), torch.cat([pooled, pooled], dim=1)
    return {"encoder_hidden_states": functional.pad(hidden, (0, 0, 0, zero_tokens)), "pooled_projections": pooled}


def logit_normal_times(batch: int, device: torch.device | str) -> Tensor:
    """Shifted logit-normal times, (batch,), stratified over the batch, which reduces the variance of the loss."""
    spread = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    t = (math.sqrt(2) * torch.erfinv(2 * spread - 1)).sigmoid()
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def prepare_transformer(
    device: torch.device | str,
    latent_channels: int,
    text_width: int,
    sample_size: int,
    seed: int,
    compiled: bool,
    batch: int = BATCH,
    layers: int = LAYERS,
):
    """The transformer and its forward; a run on zeros compiles it before the latents are available."""
    transformer = build(latent_channels, text_width, sample_size, seed, layers).to(device)
    tokens = (sample_size // 2) ** 2 + CLIP_TOKENS + ZERO_TOKENS
    transformer.set_attn_processor(ZeroTokenAttention(tokens, device))
    if torch.device(device).type == "cuda":
        # With a bias, the memory-efficient kernel is better tested than cuDNN's, which newer versions prefer.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not compiled:
        return transformer, transformer

    def run_on_zeros(forward) -> Tensor:
        x = torch.zeros(batch, latent_channels, sample_size, sample_size, device=device)
        text = torch.zeros(batch, CLIP_TOKENS, text_width, dtype=precision(device), device=device)
        condition = conditions(text, text[:, 0], ZERO_TOKENS)
        return forward(x, timestep=torch.zeros(batch, device=device), **condition, return_dict=False)[0]

    return transformer, compiled_or_eager(transformer, run_on_zeros, "transformer")


def read(text_encoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate hidden states (captions, 77, width) and projected features (captions, width)."""
    output = text_encoder(tokens, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def train_transformer(
    pool: Pool,
    transformer,
    forward,
    vae,
    text_encoder,
    tokenizer,
    *,
    seconds: float,
    steps: int,
    seed: int,
    batch: int = BATCH,
):
    device = pool.images.device
    text_encoder = text_encoder.to(device)
    means, stds = encode_images(pool, vae)
    (hidden, pooled), (no_hidden, no_pooled) = encode_captions(pool, tokenizer, lambda ids: read(text_encoder, ids))
    torch.manual_seed(seed)

    def compute_loss() -> Tensor:
        x, chosen, variant = sample_batch(means, stds, batch)
        dropped = torch.rand(batch, device=device) < CAPTION_DROPOUT
        text = torch.where(dropped[:, None, None], no_hidden, hidden[chosen, variant])
        features = torch.where(dropped[:, None], no_pooled, pooled[chosen, variant])
        times, noise = logit_normal_times(batch, device), torch.randn_like(x)
        t = times[:, None, None, None]
        condition = conditions(text, features, ZERO_TOKENS)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            velocity = forward((1 - t) * x + t * noise, timestep=times * 1000, **condition, return_dict=False)[0]
        return (velocity.float() - (noise - x)).square().mean()

    done = train(
        [transformer], compute_loss, rate=RATE, steps=steps, seconds=seconds, warmup=400, ema=EMA, label="transformer"
    )
    return transformer.eval(), done


def write_pipeline(folder: Path, transformer, vae, text_encoder, tokenizer) -> None:
    """Write the pipeline in float16, in files of at most 15 MB. Both CLIP text encoders are the same one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    transformer.set_attn_processor(JointAttnProcessor2_0())
    vae.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(device="cpu", dtype=torch.float16)
    pipeline.save_pretrained(folder, max_shard_size=SHARD)
