"""Attention with q, k and v of the same layout gets gradients of one layout, on which cuDNN's backward depends."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from data.tiny_pipelines import write
from delora_diffusers import AdapterConfig, attach
from delora_diffusers.families.loading import open_model
from delora_diffusers.training.setup import checkpoint_denoiser


def layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()


@pytest.fixture
def layouts(monkeypatch) -> Iterator[dict[Any, set[Any]]]:
    """The layouts of attention's gradients by those of its q, k and v."""
    seen: dict[Any, set[Any]] = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        output = original(query, key, value, *arguments, **settings)
        if output.requires_grad:
            gradients = seen.setdefault(tuple(layout(tensor) for tensor in (query, key, value)), set())
            output.register_hook(lambda gradient: gradients.add(layout(gradient)))
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    yield seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["flux", "flux2-klein", "sd3", "qwenimage"])
def test_equal_attentions_get_gradients_of_one_layout(layouts, tmp_path, kind, checkpointing):
    model = open_model(str(write(tmp_path / kind, kind)))
    family, transformer = model.family, model.load("transformer", torch.float32)
    family.prepare_to_train(transformer)
    attach(transformer, AdapterConfig(rank=2, targets=family.TARGETS))
    if checkpointing:
        checkpoint_denoiser(transformer)
    config = transformer.config
    conditions = {
        name: torch.randn(1, *shape)
        for name, shape in (family.condition_shapes(config) or shapes_with_clip(config)).items()
    }
    channels, factor = family.latent_shape(model.skeletons["vae"].config)
    noisy = torch.randn(1, channels, 64 // factor, 64 // factor)
    family.predict(transformer, noisy, torch.tensor([0.5]), **conditions).sum().backward()
    assert layouts
    assert all(len(gradients) == 1 for gradients in layouts.values()), layouts


def shapes_with_clip(config: Any) -> dict[str, tuple[int, ...]]:
    return {
        "encoder_hidden_states": (32, config.joint_attention_dim),
        "pooled_projections": (config.pooled_projection_dim,),
    }
