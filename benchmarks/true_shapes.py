"""Pipelines of random weights with the true shapes of pretrained models, and synthetic photos.

    python -m benchmarks.true_shapes OUT_DIR [sd15 sdxl flux2-klein flux]

OUT_DIR/sd15 (2.1 GB) and OUT_DIR/sdxl (6.9 GB) are Stable Diffusion 1.5 and XL in diffusers' layout, with fp16 weights
in safetensors; OUT_DIR/flux2-klein (16 GB) and OUT_DIR/flux (34 GB) are FLUX.2-klein-base-4B and Flux.1-dev in bf16,
which are written only if they are named. They take the time and memory of the pretrained models and generate noise.
Their tokenizers are small: that of the included miniature and those of ``data.tiny_tokenizers``, whose token ids are
below the true vocabulary's size. Existing folders are kept. The weights are initialized on the GPU if there is one.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from delora_diffusers.dispatch import exit_on_bad_input

VOCABULARY = 49408
TEXT_ENCODER_2: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
"""OpenCLIP's ViT-bigG/14, the second text encoder of Stable Diffusion XL."""
VAE: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025},
}
"""Both autoencoders have ``force_upcast``: XL's configuration sets it, and 1.5's leaves it at diffusers' default."""
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
NAMES = tuple(VAE)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2-klein": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
        | {"guidance_embeds": False},
    ),
    "zimage": ("ZImageTransformer2DModel", {}),
    "sd3": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
        | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}
"""Of FLUX.2-klein-base-4B (3.9B parameters), Z-Image (6.2B), Stable Diffusion 3.5 medium (2.2B) and Flux.1-dev (11.9B),
as far as they differ from diffusers' defaults."""
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2-klein": ("AutoencoderKLFlux2", {}),
    "flux": (
        "AutoencoderKL",
        {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
        | {"use_quant_conv": False, "use_post_quant_conv": False},
    ),
}
ALL = (*NAMES, *AUTOENCODERS)
QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}


def build(name: str, device: str = "cpu") -> Any:
    """Build a pipeline with random weights in float16, or in bfloat16 if it is a flow.

    Args:
        name: ``"sd15"``, ``"sdxl"`` or a key of ``AUTOENCODERS``.
    """
    if name in AUTOENCODERS:
        return build_flow(name, device)
    import torch
    from diffusers import (
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTokenizer

    from data.miniature import MINI_SD

    tokenizer = CLIPTokenizer.from_pretrained(MINI_SD / "tokenizer", model_max_length=77)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            models = build_models(name, tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
    if name == "sd15":
        scheduler: Any = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SCHEDULE)
        checker: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**models, tokenizer=tokenizer, scheduler=scheduler, **checker)
    second = CLIPTokenizer.from_pretrained(MINI_SD / "tokenizer", model_max_length=77)
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **SCHEDULE)
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": second}
    return StableDiffusionXLPipeline(**models, **tokenizers, scheduler=scheduler, add_watermarker=False)


def build_models(name: str, tokenizer: Any) -> dict[str, Any]:
    """The pipeline's UNet, autoencoder and text encoders by component, with the default dtype and device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from benchmarks.train_step import SHAPES
    from data.tiny_sd import TRUE_SHAPES

    levels: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    text: Any = {"vocab_size": VOCABULARY, "max_position_embeddings": 77, **ids}
    first: dict[str, Any] = {**TRUE_SHAPES["text_encoder"], "projection_dim": 768}
    models: dict[str, Any] = {
        "unet": UNet2DConditionModel(**SHAPES[name]),
        "vae": AutoencoderKL(latent_channels=4, **levels, **TRUE_SHAPES["vae"] | VAE[name]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, **first)),
    }
    if name == "sdxl":
        models["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**text, **TEXT_ENCODER_2))
    return models


def build_flow(kind: str, device: str) -> Any:
    """Build the pipeline of a rectified flow with random weights in bfloat16.

    Args:
        kind: a key of ``AUTOENCODERS``.
    """
    import diffusers
    import torch

    from data.tiny_pipelines import KINDS

    levels: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes: Any = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    (autoencoder, shape), (transformer, config) = AUTOENCODERS[kind], TRANSFORMERS[kind]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            models = flux_text() if kind == "flux" else klein_text()
            models["vae"] = getattr(diffusers, autoencoder)(**levels, **sizes, **shape)
            models["transformer"] = getattr(diffusers, transformer)(**config)
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**KINDS[kind].scheduler)
    return getattr(diffusers, KINDS[kind].pipeline)(**models, scheduler=scheduler, **KINDS[kind].options)


def klein_text() -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data.tiny_tokenizers import qwen_tokenizer

    return {"tokenizer": qwen_tokenizer(), "text_encoder": Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B))}


def flux_text() -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    from data.miniature import MINI_SD
    from data.tiny_sd import TRUE_SHAPES
    from data.tiny_tokenizers import t5_tokenizer

    tokenizer = CLIPTokenizer.from_pretrained(MINI_SD / "tokenizer", model_max_length=77)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    text: Any = {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "projection_dim": 768, **ids}
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": t5_tokenizer(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, **TRUE_SHAPES["text_encoder"])),
        "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
    }


def write(folder: Path, name: str, device: str = "cpu") -> None:
    """Write a pipeline to a new folder, completely or not at all; see ``build``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        build(name, device).save_pretrained(Path(temporary) / "pipeline")
        shutil.move(Path(temporary) / "pipeline", folder)


def write_photos(folder: Path, count: int, size: tuple[int, int] = (1600, 1200)) -> None:
    """Write JPEG photos of colored shapes on noise, of this width and height."""
    import numpy as np
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        photo = coarse.resize(size, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(photo)
        for corner in random.uniform(0, 0.7, (8, 2)):
            sides = random.uniform(0.05, 0.3, 2)
            box = [*(corner * size), *((corner + sides) * size)]
            color = tuple(random.integers(0, 256, 3).tolist())
            (draw.ellipse if random.random() < 0.5 else draw.rectangle)(box, fill=color)
        noise = random.normal(0, 12, (size[1], size[0], 3))
        pixels = (np.asarray(photo) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ALL)}; default: the first two")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ALL]
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(ALL)}")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in options.names or NAMES:
        if not (options.out_dir / name).exists():
            start = time.perf_counter()
            write(options.out_dir / name, name, device)
            print(f"wrote {options.out_dir / name} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
