"""Operations and bytes of a training step of Stable Diffusion 1.5's UNet, counted at full size without running it."""

import pytest
import torch

from benchmarks.step_counts import Counter, count_step
from benchmarks.train_step import VARIANTS
from delora_diffusers.methods.config import UNET_TARGETS

pytestmark = pytest.mark.integration  # seconds a test


def test_the_counter_on_known_operations():
    a, b = torch.zeros(4, 8), torch.zeros(8, 2)
    with Counter() as counter:
        (a @ b).mT.add_(1.0)  # a product and a sum; the transpose is a view
    assert counter.by_name == {"aten.mm.default": 1, "aten.add_.Tensor": 1}
    assert counter.bytes == 4 * (32 + 16 + 8) + 4 * (8 + 8)


@pytest.fixture(scope="module")
def steps():
    names = {
        "floor": "floor: frozen UNet, no adapter",
        "delora": "ours, DeLoRA, fast path",
        "lora": "ours, LoRA, fast path",
        "peft": "PEFT LoRA, bf16 adapters",
    }
    return {key: count_step(VARIANTS[name], UNET_TARGETS) for key, name in names.items()}


def test_adapters_add_few_operations(steps):
    """At batch sizes 1 and 4 a step takes as long as its launches; this bounds the launches that adapters add."""
    extra = {key: counter.operations - steps["floor"].operations for key, counter in steps.items()}
    assert extra["lora"] <= 0
    assert 0 < extra["delora"] <= 190
    assert extra["peft"] > 1500, "the counter no longer counts PEFT's products one by one"
    products = {key: counter.by_name["aten.mm.default"] for key, counter in steps.items()}
    assert products["delora"] <= products["floor"], "q, k and v of an attention layer must be a single product"


def test_delora_moves_fewer_bytes_than_pefts_lora(steps):
    assert steps["delora"].bytes < steps["peft"].bytes
