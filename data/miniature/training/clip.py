"""mini-clip: a CLIP trained on toybox's images and captions, in open_clip's format, and its text tower for mini-sd."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.miniature.training.pool import CAPTIONS, Pool
from data.miniature.training.steps import train
from data.toybox.render import SIZE

BATCH = 1024
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def config(vocabulary: int) -> dict[str, Any]:
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": 5, "width": 160, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 4,
            "hf_tokenizer_name": "mini-clip",
        },
    }


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Token ids (captions, 77), as in Stable Diffusion's pipeline."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def train_clip(pool: Pool, tokenizer, *, seconds: float, steps: int, seed: int, batch: int = BATCH):
    from open_clip import CLIP

    device = pool.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**config(len(tokenizer))).to(device)
    torch.manual_seed(seed)
    images = pool.images.flatten(0, 1)
    tokens = tokenize(tokenizer, [text for texts in pool.captions for text in texts]).to(device)
    longest = int((tokens != tokenizer.pad_token_id).sum(dim=1).max())
    tokens = tokens.unflatten(0, (-1, CAPTIONS))
    print(f"clip: the longest caption has {longest} tokens", flush=True)
    target = torch.arange(batch, device=device)

    def compute_loss() -> Tensor:
        chosen = torch.randint(len(images), (batch,), device=device)
        variant = torch.randint(CAPTIONS, (batch,), device=device)
        x = images[chosen].float() / 127.5 - 1
        x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            image = torch.nn.functional.normalize(model.encode_image(x).float(), dim=-1)
            text = torch.nn.functional.normalize(model.encode_text(tokens[chosen, variant]).float(), dim=-1)
        logits = model.logit_scale.clamp(max=4.6).exp() * image @ text.T
        loss = torch.nn.functional.cross_entropy
        return 0.5 * (loss(logits, target) + loss(logits.T, target))

    done = train(
        [model], compute_loss, rate=1e-3, steps=steps, seconds=seconds, weight_decay=0.1, ema=0.999, label="clip"
    )
    return model.eval(), done


def write_clip(model, tokenizer_folder: Path, folder: Path) -> None:
    """Write the folder that open_clip loads as ``local-dir:``, with weights in float16."""
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder / name)
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    record = {"model_cfg": config(len(tokenizer)), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(record, indent=2) + "\n")


def text_encoder_of(model, tokenizer):
    """The text tower as transformers' ``CLIPTextModel``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    source = model.state_dict()
    weights = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    for layer in range(4):
        source_prefix, target_prefix = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = source[f"{source_prefix}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts):
                weights[f"{target_prefix}self_attn.{name}.{kind}"] = part
            for name, original in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                weights[f"{target_prefix}{name}.{kind}"] = source[f"{source_prefix}{original}.{kind}"]
    prefix = "text_model." if any(key.startswith("text_model.") for key in encoder.state_dict()) else ""
    weights = {prefix + name: tensor.float().cpu() for name, tensor in weights.items()}
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing), (missing, unexpected)
    return encoder.eval().requires_grad_(False)
