"""A tiny, randomly initialised Stable Diffusion pipeline in diffusers' folder layout.

``python -m data.tiny_sd OUT_DIR [--kind sd1|sd2|sdxl]`` writes it. It loads through the same code as a pretrained
Stable Diffusion 1.x, 2.x or XL and runs in seconds on a CPU. It is untrained: its images are noise.
With ``--true_shapes`` it has the size of Stable Diffusion 1.5, to measure memory and speed without the weights.
"""

# Diffusers annotates variable-length tuples as one-element tuples, and optional components as required.
# pyright: reportArgumentType=false

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def byte_alphabet() -> list[str]:
    """The 256 characters that represent bytes in GPT-2's and CLIP's vocabularies, in the vocabularies' order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def write_tokenizer(folder: Path):
    """Write and load a byte-level CLIP tokenizer without merges, which accepts any text."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    alphabet = byte_alphabet()
    tokens = alphabet + [character + "</w>" for character in alphabet] + list(SPECIAL_TOKENS)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "unk_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


TINY: dict[str, dict[str, Any]] = {
    "unet": dict(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ),
    "vae": dict(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64),
    "text_encoder": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
}
SD2: dict[str, dict[str, Any]] = TINY | {
    "unet": TINY["unet"] | dict(use_linear_projection=True, attention_head_dim=(2, 4), cross_attention_dim=48),
    "text_encoder": TINY["text_encoder"] | dict(hidden_size=48, hidden_act="gelu"),
}
"""Like Stable Diffusion 2.x: linear projections, heads that differ by level, a wider text encoder; v-prediction."""
SDXL: dict[str, dict[str, Any]] = TINY | {
    "unet": TINY["unet"]
    | dict(
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        cross_attention_dim=32 + 48,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    ),
    "text_encoder_2": TINY["text_encoder"] | dict(hidden_size=48, hidden_act="gelu"),
}
"""Like Stable Diffusion XL: two text encoders, conditioning on pooled embeddings, sizes and crops."""
TRUE_SHAPES: dict[str, dict[str, Any]] = {
    "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
}
"""The shapes of Stable Diffusion 1.5, except for the vocabulary."""
KINDS = {"sd1": TINY, "sd2": SD2, "sdxl": SDXL}


def build(folder: Path, prediction_type: str = "epsilon", seed: int = 0, shapes: dict[str, dict[str, Any]] = TINY):
    """Build the pipeline: a UNet with cross-attention at two or more levels, an autoencoder and CLIP text encoders."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = write_tokenizer(folder / "tokenizer")

    def text_model(kind: Any, shape: dict[str, Any]):
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        width = shape["hidden_size"]
        return kind(
            CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=width, max_position_embeddings=77, **ids, **shape)
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**shapes["unet"])
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(latent_channels=4, **blocks, **shapes["vae"])
        text_encoder = text_model(CLIPTextModel, shapes["text_encoder"])
        second = None
        if "text_encoder_2" in shapes:
            second = text_model(CLIPTextModelWithProjection, shapes["text_encoder_2"])
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    if second is not None:
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=second,
            tokenizer=tokenizer,
            tokenizer_2=write_tokenizer(folder / "tokenizer_2"),
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": (
        "SD3Transformer2DModel",
        dict(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
        ),
    ),
    "flux": (
        "FluxTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    ),
}
"""Tiny transformers of Stable Diffusion 3 and Flux: class and configuration."""


def transformer(kind: str, seed: int = 0):
    """A tiny, randomly initialised transformer and its inputs for a batch of two.

    Args:
        kind: ``"sd3"`` or ``"flux"``.
    """
    import diffusers

    name, shape = TRANSFORMERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**shape)
        inputs = {"encoder_hidden_states": torch.randn(2, 5, 32), "timestep": torch.tensor([0.1, 0.5])}
        inputs["pooled_projections"] = torch.randn(2, shape["pooled_projection_dim"])
        if kind == "sd3":
            inputs["hidden_states"] = torch.randn(2, 4, 8, 8)
        else:
            inputs |= {"hidden_states": torch.randn(2, 16, 4), "img_ids": torch.zeros(16, 3)}
            inputs["txt_ids"] = torch.zeros(5, 3)
    return model, inputs


def write(
    out_dir: str | os.PathLike,
    prediction_type: str | None = None,
    seed: int = 0,
    *,
    kind: str = "sd1",
    true_shapes: bool = False,
) -> Path:
    """Write the pipeline to a new folder, completely or not at all.

    Args:
        prediction_type: defaults to v-prediction for ``"sd2"`` and to epsilon for the others.
        kind: one of ``KINDS``.
        true_shapes: use the shapes of Stable Diffusion 1.5, in float16 (2.0 GB).
    """
    prediction_type = prediction_type or ("v_prediction" if kind == "sd2" else "epsilon")
    shapes = TRUE_SHAPES if true_shapes else KINDS[kind]

    def built(folder: Path) -> Any:
        pipeline = build(folder, prediction_type, seed, shapes)
        return pipeline.to(torch.float16) if true_shapes else pipeline

    return save_to_new_folder(Path(out_dir), built)


def save_to_new_folder(out_dir: Path, build: Callable[[Path], Any]) -> Path:
    """Write a pipeline to a new folder, completely or not at all.

    Args:
        build: builds the pipeline; it may write what it needs for that to the folder that it is given.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as temporary:
        build(Path(temporary) / "build").save_pretrained(Path(temporary) / "pipeline")
        shutil.move(Path(temporary) / "pipeline", out_dir)
    return out_dir


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny_sd", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"))
    parser.add_argument("--kind", choices=list(KINDS), default="sd1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--true_shapes", action="store_true", help="use the size of Stable Diffusion 1.5 (2 GB)")
    options = parser.parse_args(arguments)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} already exists; remove it or choose another folder.")
    kind, true_shapes = options.kind, options.true_shapes
    write(options.out_dir, options.prediction_type, options.seed, kind=kind, true_shapes=true_shapes)
    print(f"wrote {options.out_dir}")


if __name__ == "__main__":
    main()
