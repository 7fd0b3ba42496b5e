"""The encoders at their true sizes against transformers' own models with the same, random, weights."""

# Transformers annotates its models and configurations more narrowly than they take arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.embedding import embed
from eval.encoders import ClipEncoder, DinoEncoder

WORDS = ["a dog", "a red backpack on top of a mirror", "a stuffed animal with the Eiffel Tower in the background"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Wide, tall and small pictures with structure at several scales."""
    folder, random, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number, size in enumerate([(640, 427), (300, 512), (97, 130)]):
        coarse = Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=int) + random.integers(-40, 41, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        paths.append(folder / f"{number}.png")
    return paths


def opened(paths):
    return [Image.open(path).convert("RGB") for path in paths]


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from their start that every one of them counts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embed" in name or "cls_token" in name or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def joined(state: dict, names: list[str], kind: str) -> torch.Tensor:
    return torch.cat([state[f"{name}.{kind}"] for name in names])


def test_dino_is_the_transformers_model(pictures, tmp_path):
    """facebook/dino-vits16's architecture and preprocessing, loaded here through timm."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    theirs = spread(ViTModel(ViTConfig(**sizes), add_pooling_layer=False))
    state = theirs.state_dict()
    ours = {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"]}
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for index in range(12):
        block, layer = f"blocks.{index}", f"layers.{index}"
        names |= {f"{block}.norm1": f"{layer}.layernorm_before", f"{block}.norm2": f"{layer}.layernorm_after"}
        names |= {f"{block}.mlp.fc1": f"{layer}.mlp.fc1", f"{block}.mlp.fc2": f"{layer}.mlp.fc2"}
        names[f"{block}.attn.proj"] = f"{layer}.attention.o_proj"
        for kind in ("weight", "bias"):
            qkv = [f"{layer}.attention.{name}_proj" for name in "qkv"]
            ours[f"{block}.attn.qkv.{kind}"] = joined(state, qkv, kind)
    for name, source in names.items():
        for kind in ("weight", "bias"):
            ours[f"{name}.{kind}"] = state[f"{source}.{kind}"]
    save_file({name: tensor.contiguous() for name, tensor in ours.items()}, tmp_path / "model.safetensors")
    config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "global_pool": "token"}
    config["pretrained_cfg"] = {"input_size": [3, 224, 224], "num_classes": 0, "classifier": "head"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = ViTImageProcessorPil(image_mean=mean, image_std=std)
    with torch.no_grad():
        output = theirs(**processor(opened(pictures), return_tensors="pt"))
    found = embed(pictures, {"dino": DinoEncoder(f"local-dir:{tmp_path}", "straight", "cpu")})["dino"]
    torch.testing.assert_close(found, unit(output.last_hidden_state[:, 0]), atol=1e-5, rtol=0)


def test_clip_is_the_transformers_model(pictures, tmp_path):
    """openai/clip-vit-large-patch14's architecture and preprocessing, loaded here through open_clip."""
    from open_clip import get_model_config
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=768)
    theirs = spread(CLIPModel(config))
    state, ours = theirs.state_dict(), {"logit_scale": theirs.logit_scale.detach()}
    norms = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names = norms | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for tower, target, layers in (("vision_model", "visual.transformer", 24), ("text_model", "transformer", 12)):
        for index in range(layers):
            source = f"{tower}.encoder.layers.{index}"
            qkv = [f"{source}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
            for kind in ("weight", "bias"):
                ours[f"{target}.resblocks.{index}.attn.in_proj_{kind}"] = joined(state, qkv, kind)
                for name, theirs_name in names.items():
                    ours[f"{target}.resblocks.{index}.{name}.{kind}"] = state[f"{source}.{theirs_name}.{kind}"]
    for name, source in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ):
        for kind in ("weight", "bias"):
            ours[f"{name}.{kind}"] = state[f"{source}.{kind}"]
    ours |= {
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
    }
    copies = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
    save_file(copies, tmp_path / "open_clip_model.safetensors")
    settings = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    model = (get_model_config("ViT-L-14") or {}) | {"quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": settings}))

    encoder = ClipEncoder(f"local-dir:{tmp_path}", None, "cpu", "floor")
    inputs = CLIPImageProcessorPil()(opened(pictures), return_tensors="pt")
    tokens = encoder.tokenizer(WORDS)
    with torch.no_grad():
        output = theirs(**inputs, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    found = embed(pictures, {"clip": encoder})["clip"]
    torch.testing.assert_close(found, unit(output.image_embeds), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(WORDS), unit(output.text_embeds), atol=1e-5, rtol=0)
