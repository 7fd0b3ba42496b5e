"""Tiny, randomly initialised pipelines of the transformer families, in diffusers' folder layout.

``python -m data.tiny_pipelines OUT_DIR --kind KIND`` writes one. It loads through the same code as the pretrained model
and has its structure: the same classes and kinds of blocks, patches, latent channels, eightfold autoencoder, latent
statistics, scheduler and prompt templates. It is untrained: its images are noise. Each takes less than 3 MB.
"""

# Diffusers annotates variable-length tuples as one-element tuples, and optional components as required.
# pyright: reportArgumentType=false

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.tiny_sd import save_to_new_folder, write_tokenizer
from data.tiny_tokenizers import mistral_processor, qwen_tokenizer, t5_tokenizer

Components = dict[str, Any]
"""Of a pipeline, by name."""


def clip(folder: Path, width: int, projection: bool) -> tuple[Any, Any]:
    """A CLIP tokenizer and text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = write_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer and encoder."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    shape = dict(d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), is_encoder_decoder=False, **shape))


LANGUAGE_MODEL = dict(
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    # Large enough that prompts change the hidden states as much as those of a trained model.
    initializer_range=0.2,
)


def sd3_text(folder: Path) -> Components:
    # Widths that differ, because their order matters where the pipeline concatenates the embeddings.
    tokenizer, text_encoder = clip(folder / "tokenizer", 16, projection=True)
    tokenizer_2, text_encoder_2 = clip(folder / "tokenizer_2", 24, projection=True)
    tokenizer_3, text_encoder_3 = t5(48)
    return dict(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        text_encoder_3=text_encoder_3,
    )


def sd3_text_without_t5(folder: Path) -> Components:
    return sd3_text(folder) | dict(tokenizer_3=None, text_encoder_3=None)


def flux_text(folder: Path) -> Components:
    tokenizer, text_encoder = clip(folder / "tokenizer", 24, projection=False)
    tokenizer_2, text_encoder_2 = t5(32)
    return dict(tokenizer=tokenizer, tokenizer_2=tokenizer_2, text_encoder=text_encoder, text_encoder_2=text_encoder_2)


def klein_text(folder: Path) -> Components:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    # The pipeline reads hidden states 9, 18 and 27. Like Qwen3-4B's, the file leaves out the tied output embeddings.
    shape = LANGUAGE_MODEL | dict(num_hidden_layers=28, head_dim=8, tie_word_embeddings=True)
    return dict(tokenizer=tokenizer, text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape)))


def mistral_text(folder: Path) -> Components:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    processor = mistral_processor(patch_size=4, image_size=64)
    # The pipeline reads hidden states 10, 20 and 30.
    text = dict(model_type="mistral", vocab_size=len(processor.tokenizer), num_hidden_layers=31, head_dim=8)
    vision = dict(model_type="pixtral", num_hidden_layers=1, num_attention_heads=2, head_dim=8, patch_size=4)
    config = Mistral3Config(
        text_config=text | LANGUAGE_MODEL | dict(pad_token_id=processor.tokenizer.pad_token_id),
        vision_config=vision | dict(hidden_size=16, intermediate_size=32, image_size=64),
        image_token_index=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return dict(tokenizer=processor, text_encoder=Mistral3ForConditionalGeneration(config))


def zimage_text(folder: Path) -> Components:
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=3, head_dim=8, **LANGUAGE_MODEL)
    return dict(tokenizer=tokenizer, text_encoder=Qwen3Model(config))


def qwenimage_text(folder: Path) -> Components:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    rotary = dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])
    config = Qwen2_5_VLConfig(
        text_config=LANGUAGE_MODEL | dict(vocab_size=len(tokenizer), num_hidden_layers=2, rope_parameters=rotary),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        tie_word_embeddings=False,
    )
    return dict(tokenizer=tokenizer, text_encoder=Qwen2_5_VLForConditionalGeneration(config))


@dataclass(frozen=True)
class Kind:
    """What a pipeline is built from. ``vae`` and ``transformer`` are a class of diffusers and its configuration."""

    pipeline: str
    text: Callable[[Path], Components]
    vae: tuple[str, dict[str, Any]]
    transformer: tuple[str, dict[str, Any]]
    scheduler: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


STATIC_SHIFT = dict(shift=3.0)
FLUX_SHIFT = dict(
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)
QWEN_SHIFT = FLUX_SHIFT | dict(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)

CONVOLUTIONS = dict(
    block_out_channels=(8, 8, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=64,
)
AUTOENCODER = CONVOLUTIONS | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
SD3_VAE = ("AutoencoderKL", AUTOENCODER | dict(scaling_factor=1.5305, shift_factor=0.0609))
FLUX_VAE = ("AutoencoderKL", AUTOENCODER | dict(scaling_factor=0.3611, shift_factor=0.1159))
FLUX2_VAE = ("AutoencoderKLFlux2", CONVOLUTIONS | dict(latent_channels=32))
# Its latent statistics are the real model's, which are diffusers' defaults.
QWEN_VAE = ("AutoencoderKLQwenImage", dict(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1))

HEADS = dict(attention_head_dim=16, num_attention_heads=2)
FLUX = HEADS | dict(
    patch_size=1,
    in_channels=64,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=32,
    pooled_projection_dim=24,
    axes_dims_rope=(4, 6, 6),
)
FLUX2 = HEADS | dict(
    patch_size=1,
    in_channels=128,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=3 * 16,
    axes_dims_rope=(4, 4, 4, 4),
)
SD3_TRANSFORMER = (
    "SD3Transformer2DModel",
    HEADS
    | dict(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,  # the last block has no output for the text
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ),
)
ZIMAGE_TRANSFORMER = (
    "ZImageTransformer2DModel",
    dict(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 128, 128],
    ),
)
QWEN_TRANSFORMER = (
    "QwenImageTransformer2DModel",
    HEADS
    | dict(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    ),
)

KINDS = {
    "sd3": Kind("StableDiffusion3Pipeline", sd3_text, SD3_VAE, SD3_TRANSFORMER, STATIC_SHIFT),
    "sd3-no-t5": Kind("StableDiffusion3Pipeline", sd3_text_without_t5, SD3_VAE, SD3_TRANSFORMER, STATIC_SHIFT),
    "flux": Kind(
        "FluxPipeline",
        flux_text,
        FLUX_VAE,
        ("FluxTransformer2DModel", FLUX | dict(guidance_embeds=True)),
        FLUX_SHIFT,
    ),
    "flux-schnell": Kind(
        "FluxPipeline",
        flux_text,
        FLUX_VAE,
        ("FluxTransformer2DModel", FLUX | dict(guidance_embeds=False)),
        dict(shift=1.0),
    ),
    "flux2-klein": Kind(
        "Flux2KleinPipeline",
        klein_text,
        FLUX2_VAE,
        ("Flux2Transformer2DModel", FLUX2 | dict(guidance_embeds=False)),
        FLUX_SHIFT,
        dict(is_distilled=False),
    ),
    "flux2-dev": Kind(
        "Flux2Pipeline",
        mistral_text,
        FLUX2_VAE,
        ("Flux2Transformer2DModel", FLUX2 | dict(guidance_embeds=True)),
        FLUX_SHIFT,
    ),
    "zimage": Kind("ZImagePipeline", zimage_text, FLUX_VAE, ZIMAGE_TRANSFORMER, STATIC_SHIFT),
    "qwenimage": Kind("QwenImagePipeline", qwenimage_text, QWEN_VAE, QWEN_TRANSFORMER, QWEN_SHIFT),
}


def randomise(pipeline: Any) -> None:
    """Make up for what training would have changed and a test would miss.

    Constants that hide mistakes (latent statistics, padding tokens) become random, and the prompt matters: signals keep
    their size through the transformer, and its attention is not nearly uniform over hundreds of tokens.
    """
    with torch.no_grad():
        for module in pipeline.transformer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(3**0.5)  # unit gain; PyTorch's default has a gain of 1 / sqrt(3)
        for name, parameter in pipeline.transformer.named_parameters():
            if name.endswith("pad_token"):
                parameter.normal_()
            elif name.split(".")[-2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                parameter.uniform_(1, 3)
        for name, statistic in pipeline.vae.named_buffers():  # FLUX.2's batch norm
            if name.endswith("running_mean"):
                statistic.normal_(std=0.5)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 4.0)


def build(folder: Path, kind: str, seed: int = 0) -> Any:
    """Build a pipeline.

    Args:
        folder: an existing folder, for the files of the tokenizers.
        kind: one of ``KINDS``.
    """
    import diffusers

    settings = KINDS[kind]

    def model(class_and_configuration: tuple[str, dict[str, Any]]):
        name, configuration = class_and_configuration
        return getattr(diffusers, name)(**configuration)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = dict(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings.scheduler),
            transformer=model(settings.transformer),
            vae=model(settings.vae),
            **settings.text(folder),
        )
        pipeline = getattr(diffusers, settings.pipeline)(**components, **settings.options)
        randomise(pipeline)
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline


def write(out_dir: str | os.PathLike, kind: str, seed: int = 0) -> Path:
    """Write a pipeline to a new folder, completely or not at all.

    Args:
        kind: one of ``KINDS``. To load ``"sd3-no-t5"``, pass ``text_encoder_3=None, tokenizer_3=None`` to
            ``from_pretrained``, which does not accept a missing text encoder from the folder alone.
    """
    return save_to_new_folder(Path(out_dir), lambda folder: build(folder, kind, seed))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny_pipelines", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--kind", choices=list(KINDS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} already exists; remove it or choose another folder.")
    write(options.out_dir, options.kind, options.seed)
    print(f"wrote {options.out_dir}")


if __name__ == "__main__":
    main()
