"""A tiny, randomly initialised Stable Diffusion pipeline in diffusers' own folder layout.

``python -m data.tiny_sd OUT_DIR [--prediction_type v_prediction]`` writes it. It loads through the very same code as a
pretrained Stable Diffusion 1.x or 2.x, runs in seconds on a CPU, and knows nothing: its pictures are noise.
With ``--true_shapes`` it has the size of Stable Diffusion 1.5, to try memory and speed without the weights.
"""

# Diffusers annotates tuples of any length as tuples of one, and optional parts as required.
# pyright: reportArgumentType=false

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's and CLIP's vocabularies, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def write_tokenizer(folder: Path):
    """A CLIP tokenizer of single bytes, without merges: it takes any text."""
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
TRUE_SHAPES: dict[str, dict[str, Any]] = {
    "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
}
"""Stable Diffusion 1.5's, all but the vocabulary."""


def build(folder: Path, prediction_type: str = "epsilon", seed: int = 0, shapes: dict[str, dict[str, Any]] = TINY):
    """Build the pipeline: UNet with cross-attention at two levels or more, autoencoder, CLIP text encoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**shapes["unet"])
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(latent_channels=4, **blocks, **shapes["vae"])
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                projection_dim=shapes["text_encoder"]["hidden_size"],
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **shapes["text_encoder"],
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
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


def write(
    out_dir: str | os.PathLike, prediction_type: str = "epsilon", seed: int = 0, *, true_shapes: bool = False
) -> Path:
    """Write the pipeline to a new folder, whole or not at all; true shapes in float16, 2.0 GB."""
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as temporary:
        pipeline = build(Path(temporary) / "build", prediction_type, seed, TRUE_SHAPES if true_shapes else TINY)
        if true_shapes:
            pipeline.to(torch.float16)
        pipeline.save_pretrained(Path(temporary) / "whole")
        shutil.move(Path(temporary) / "whole", out_dir)
    return out_dir


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny_sd", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--true_shapes", action="store_true", help="of Stable Diffusion 1.5's size instead, 2 GB")
    options = parser.parse_args(arguments)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} exists already; remove it or name another folder.")
    write(options.out_dir, options.prediction_type, options.seed, true_shapes=options.true_shapes)
    print(f"wrote {options.out_dir}")


if __name__ == "__main__":
    main()
