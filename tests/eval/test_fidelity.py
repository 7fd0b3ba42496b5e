"""The encoders at full width against transformers' models with the same random weights."""

# Transformers' annotations of its models and configurations are narrower than the arguments that they take.
# pyright: reportArgumentType=false, reportCallIssue=false

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.metrics.embedding import embed
from eval.metrics.encoders import ClipEncoder, DinoEncoder

pytestmark = pytest.mark.integration  # seconds a test

WORDS = ["a dog", "a red backpack on top of a mirror", "a stuffed animal with the Eiffel Tower in the background"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Wide, tall and small images with structure at several scales."""
    folder, random, paths = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for number, size in enumerate([(640, 427), (300, 512), (97, 130)]):
        coarse = Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=int) + random.integers(-40, 41, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        paths.append(folder / f"{number}.png")
    return paths


def load(paths):
    return [Image.open(path).convert("RGB") for path in paths]


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Move the weights that start at 0 or 1 away from their start, so that each affects the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embed" in name or "cls_token" in name or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Match:
    """A tensor of our model and the tensors of transformers that it stacks, transposed or not."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False


def to_ours(pairs: list[Match], theirs: dict) -> dict:
    state = {pair.ours: torch.cat([theirs[name] for name in pair.theirs]) for pair in pairs}
    return state | {pair.ours: state[pair.ours].T for pair in pairs if pair.transposed}


def to_theirs(pairs: list[Match], ours: dict) -> dict:
    state = {}
    for pair in pairs:
        tensor = ours[pair.ours].T if pair.transposed else ours[pair.ours]
        state |= dict(zip(pair.theirs, tensor.chunk(len(pair.theirs))))
    return state


def weights_and_biases(names: dict[str, tuple[str, ...]]) -> list[Match]:
    """The pairs of tensors of each pair of modules."""
    return [
        Match(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs))
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    ]


def shared_weights(pairs: list[Match], theirs: torch.nn.Module, ours: torch.nn.Module, direction: str) -> dict:
    """Load the random weights of one model into the other; returns them under our names."""
    if direction == "from transformers":
        state = to_ours(pairs, randomize(theirs).state_dict())
        missing, unexpected = ours.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"logit_scale", "attn_mask"}, missing
    else:
        state = to_ours(pairs, to_theirs(pairs, randomize(ours).state_dict()))
        missing, unexpected = theirs.load_state_dict(to_theirs(pairs, ours.state_dict()), strict=False)
        assert not unexpected and set(missing) <= {"logit_scale"}, missing
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


DIRECTIONS = pytest.mark.parametrize("direction", ["from transformers", "to transformers"])


@DIRECTIONS
def test_dino_equals_the_transformers_model(images, tmp_path, direction):
    """facebook/dino-vits16's architecture and preprocessing, loaded here through timm."""
    import timm
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    theirs = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    ours = timm.create_model("vit_small_patch16_224", num_classes=0)
    pairs = [Match("cls_token", ("embeddings.cls_token",)), Match("pos_embed", ("embeddings.position_embeddings",))]
    names = {"patch_embed.proj": ("embeddings.patch_embeddings.projection",), "norm": ("layernorm",)}
    for index in range(12):
        block, layer = f"blocks.{index}", f"layers.{index}"
        names[f"{block}.attn.qkv"] = tuple(f"{layer}.attention.{name}_proj" for name in "qkv")
        for name, source in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
            ("attn.proj", "attention.o_proj"),
        ):
            names[f"{block}.{name}"] = (f"{layer}.{source}",)
    save_file(
        shared_weights(pairs + weights_and_biases(names), theirs, ours, direction), tmp_path / "model.safetensors"
    )
    config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "global_pool": "token"}
    config["pretrained_cfg"] = {"input_size": [3, 224, 224], "num_classes": 0, "classifier": "head"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = ViTImageProcessorPil(image_mean=mean, image_std=std)
    with torch.no_grad():
        output = theirs.eval()(**processor(load(images), return_tensors="pt"))
    features = embed(images, {"dino": DinoEncoder(f"local-dir:{tmp_path}", "straight", "cpu", norm_eps=1e-12)})["dino"]
    torch.testing.assert_close(features, unit(output.last_hidden_state[:, 0]), atol=1e-5, rtol=0)


@DIRECTIONS
@pytest.mark.parametrize("depths", [(2, 2), pytest.param((24, 12), marks=pytest.mark.slow)], ids=["", "all layers"])
def test_clip_equals_the_transformers_model(images, tmp_path, direction, depths):
    """openai/clip-vit-large-patch14's architecture and preprocessing, loaded here through open_clip."""
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    text["num_hidden_layers"], vision["num_hidden_layers"] = depths[1], depths[0]
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=768))
    model: Any = (open_clip.get_model_config("ViT-L-14") or {}) | {"quick_gelu": True}
    model["vision_cfg"]["layers"], model["text_cfg"]["layers"] = depths
    ours = open_clip.CLIP(**model)
    names = {
        "visual.ln_pre": ("vision_model.pre_layrnorm",),
        "visual.ln_post": ("vision_model.post_layernorm",),
        "ln_final": ("text_model.final_layer_norm",),
    }
    pairs = [
        Match("visual.class_embedding", ("vision_model.embeddings.class_embedding",)),
        Match("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
        Match("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",)),
        Match("visual.proj", ("visual_projection.weight",), transposed=True),
        Match("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        Match("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Match("text_projection", ("text_projection.weight",), transposed=True),
    ]
    for tower, target, layers in (
        ("vision_model", "visual.transformer", depths[0]),
        ("text_model", "transformer", depths[1]),
    ):
        for index in range(layers):
            source, block = f"{tower}.encoder.layers.{index}", f"{target}.resblocks.{index}"
            qkv = tuple(f"{source}.self_attn.{name}_proj" for name in "qkv")
            pairs += [Match(f"{block}.attn.in_proj_{k}", tuple(f"{n}.{k}" for n in qkv)) for k in ("weight", "bias")]
            for name, theirs_name in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                names[f"{block}.{name}"] = (f"{source}.{theirs_name}",)
    pairs += weights_and_biases(names)
    scale = {"logit_scale": theirs.logit_scale.detach()}  # features do not depend on it
    save_file(shared_weights(pairs, theirs, ours, direction) | scale, tmp_path / "open_clip_model.safetensors")
    settings = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": settings}))

    encoder = ClipEncoder(f"local-dir:{tmp_path}", None, "cpu", "floor")
    inputs = CLIPImageProcessorPil()(load(images), return_tensors="pt")
    tokens = encoder.tokenizer(WORDS)
    with torch.no_grad():
        output = theirs.eval()(**inputs, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    features = embed(images, {"clip": encoder})["clip"]
    torch.testing.assert_close(features, unit(output.image_embeds), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(WORDS), unit(output.text_embeds), atol=1e-5, rtol=0)
