"""The memory of a training step, estimated from shapes: hand counts, and peaks that were measured on a GPU."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.train_step import LATENT_SIZES, SHAPES
from delora_diffusers import AdapterConfig, attach
from delora_diffusers.training.memory_estimate import (
    LiveBytes,
    StepMemory,
    build_model,
    estimate_step,
    optimizer_bytes,
    shapes_only,
)
from delora_diffusers.training.setup import run_checkpointed

TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
FLOAT = 4


def unet_step(
    config: dict,
    latents: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    **settings,
) -> StepMemory:
    """The memory of a step with latents (batch, channels, height, width); without settings, of the UNet alone."""
    with shapes_only():
        unet: Any = build_model(lambda: UNet2DConditionModel.from_config(config), dtype)
        adapters = [attach(unet, AdapterConfig(**settings))] if settings else []
        if checkpointing:
            unet.enable_gradient_checkpointing(run_checkpointed)
            unet.train()
        batch = latents[0]
        noisy = torch.empty(latents, dtype=dtype, requires_grad=not settings)
        text = torch.empty(batch, 77, config["cross_attention_dim"], dtype=dtype)
        timesteps, target = torch.empty(batch, dtype=torch.long), torch.empty(latents)
        added = None
        if "addition_embed_type" in config:
            added = {"text_embeds": torch.empty(batch, 1280, dtype=dtype), "time_ids": torch.empty(batch, 6)}

        def loss() -> torch.Tensor:
            prediction = unet(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]
            return nn.functional.mse_loss(prediction.float(), target)

        return estimate_step([unet], adapters, loss, optimizer)


def mlp_step(batch: int, device: str) -> StepMemory:
    with torch.device(device):
        mlp = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
        x = torch.empty(batch, 8)
    return estimate_step([mlp], [], lambda: mlp(x).sum())


@pytest.mark.parametrize("batch", [32, 64])
def test_a_multilayer_perceptron_counted_by_hand(batch):
    with shapes_only():
        memory = mlp_step(batch, "cpu")
    # The peak is in tanh's backward: x, tanh's output and the gradients of its output and input; the last layer's
    # gradient; the loss and its gradient.
    peak = FLOAT * (batch * (8 + 16 + 16 + 16) + 16 * 4 + 1 + 1)
    parameters = FLOAT * (8 * 16 + 16 * 4)
    assert memory.weights == 0
    assert memory.adapter == 4 * parameters, "parameters, gradients and two states"
    assert memory.total == 3 * parameters + peak
    assert memory == mlp_step(batch, "meta")


def test_what_is_freed_no_longer_counts():
    with shapes_only():
        given = torch.empty(100)
        with LiveBytes() as counter:
            x = given + 1
            y = x[10:]
            assert counter.live == 2 * 100 * FLOAT
            del x
            assert counter.live == 2 * 100 * FLOAT, "a view keeps its storage"
            y.mul_(2)
            del y
            assert counter.live == 100 * FLOAT
            z = torch.empty(150)
            assert counter.live == 250 * FLOAT and counter.peak == 250 * FLOAT
            del z
        assert counter.live == 100 * FLOAT and counter.peak == 250 * FLOAT


def test_attention_counts_as_a_flash_kernel():
    original = nn.functional.scaled_dot_product_attention
    heads, width = 2, 8

    def step(tokens: int, device: str) -> int:
        with torch.device(device):
            q, k, v = (torch.empty(1, heads, tokens, width, requires_grad=True) for _ in range(3))
        return estimate_step([], [], lambda: nn.functional.scaled_dot_product_attention(q, k, v).sum()).total

    for tokens in (1024, 4096):
        # q, k, v, their gradients, the output and the float32 sum; two numbers per query; the loss and its gradient.
        expected = FLOAT * (tokens * heads * (8 * width + 2) + 2)
        with shapes_only():
            assert step(tokens, "cpu") == expected
        assert step(tokens, "meta") == expected
    assert nn.functional.scaled_dot_product_attention is original


def test_the_parts_of_a_unet_with_an_adapter():
    memory = unet_step(TINY, (1, 4, 16, 16), rank=4, optimizer="adamw8bit")
    unet = UNet2DConditionModel(**TINY)
    adapter = attach(unet, AdapterConfig(rank=4))
    parameters = list(adapter.parameters())
    floats = 2 * sum(p.numel() for p in parameters) + sum(buffer.numel() for buffer in adapter.buffers())
    assert memory.weights == 2 * sum(p.numel() for p in unet.parameters()), "bfloat16"
    assert memory.adapter == FLOAT * floats + optimizer_bytes(parameters, optimizer="adamw8bit")


def test_checkpointed_blocks_keep_only_their_input():
    with shapes_only():
        blocks = [nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8))) for _ in range(8)]
        model = nn.Sequential(*blocks).requires_grad_(False)
        x = torch.empty(32, 64, requires_grad=True)
        stored = estimate_step([model], [], lambda: model(x).sum())

        def checkpointed_loss() -> torch.Tensor:
            hidden = x
            for block in blocks:
                hidden = run_checkpointed(block, hidden)
            return hidden.sum()

        checkpointed = estimate_step([model], [], checkpointed_loss)
    hidden = x.nbytes
    assert checkpointed.weights == stored.weights
    assert 65 * hidden < stored.activations < 69 * hidden
    assert 16 * hidden < checkpointed.activations < 20 * hidden


@pytest.mark.integration
def test_a_checkpointed_unet_needs_less():
    stored = unet_step(TINY, (4, 4, 32, 32), rank=4)
    checkpointed = unet_step(TINY, (4, 4, 32, 32), rank=4, checkpointing=True)
    assert checkpointed.activations < 0.7 * stored.activations
    assert (checkpointed.weights, checkpointed.adapter) == (stored.weights, stored.adapter)


@pytest.mark.integration
def test_activations_grow_linearly_with_the_batch():
    peaks = [unet_step(TINY, (batch, 4, 32, 32), rank=4).activations for batch in (4, 8, 12)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.01)
    assert peaks[1] - peaks[0] > 0.5 * peaks[0]


def test_gradients_that_are_kept_between_steps_exist_during_the_whole_step():
    weight = nn.Parameter(torch.empty(64, 64, device="meta"))
    model, x = nn.ParameterList([weight]), torch.empty(1, 64, device="meta")
    new = estimate_step([model], [], lambda: (x @ weight).sum())
    weight.grad = torch.empty_like(weight)
    kept = estimate_step([model], [], lambda: (x @ weight).sum())
    assert weight.grad is None
    assert kept.adapter == new.adapter
    assert kept.total - new.total > 0.9 * 64 * 64 * FLOAT, "the new gradient is a temporary tensor"


def test_the_optimizers_states():
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in (100, 4096, 5000)]
    assert optimizer_bytes(parameters, optimizer="adamw") == 2 * 4 * (100 + 4096 + 5000)
    assert optimizer_bytes(parameters, optimizer="adamw8bit") == 2 * (4 * 100 + 4096 + 4 * 16 + 5000 + 4 * 20)


# Measured by ``benchmarks.train_step`` on an H200, eager; see the tables in docs/performance.md.
@pytest.mark.integration
@pytest.mark.parametrize(
    "model, batch, settings, measured",
    [
        ("sd15", 4, {"path": "fast"}, 4.95),
        ("sd15", 16, {}, 13.56),
        ("sdxl", 1, {"path": "fast"}, 12.50),
    ],
)
def test_the_measured_peaks_of_stable_diffusion(model, batch, settings, measured):
    options = {"rank": 16, **settings} if settings else {}
    memory = unet_step(SHAPES[model], (batch, 4, *LATENT_SIZES[model]), **options)
    assert memory.total / 2**30 == pytest.approx(measured, rel=0.03)
