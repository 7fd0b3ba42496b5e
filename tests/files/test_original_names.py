"""Transformer modules by their original names, read back by diffusers' own converters."""

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin, lora_pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.files.low_rank import Factors
from delora_diffusers.files.original_names import in_original_layout

TRANSFORMERS: dict[str, tuple[type, dict[str, Any]]] = {
    "sd3": (diffusers.SD3Transformer2DModel, {"num_layers": 3, "dual_attention_layers": (0, 1)}),
    "flux": (diffusers.FluxTransformer2DModel, {"num_layers": 2, "num_single_layers": 2}),
    "flux2": (diffusers.Flux2Transformer2DModel, {"num_layers": 2, "num_single_layers": 2}),
    "zimage": (diffusers.ZImageTransformer2DModel, {"n_layers": 2}),
    "qwenimage": (diffusers.QwenImageTransformer2DModel, {"num_layers": 2}),
}
LOADERS = {
    "flux": FluxLoraLoaderMixin,
    "flux2": lora_pipeline.Flux2LoraLoaderMixin,
    "zimage": lora_pipeline.ZImageLoraLoaderMixin,
    "qwenimage": lora_pipeline.QwenImageLoraLoaderMixin,
}
EMBEDDINGS = ("time_", "context_embedder", "x_embedder", "all_", "cap_embedder", "t_embedder")
REFUSED = (*EMBEDDINGS, "norm_out", "proj_out", "double_stream_modulation", "single_stream_modulation")


def linear_rows(family: str) -> dict[str, int]:
    """The rows of every linear module of a transformer with few blocks of the real width."""
    transformer, config = TRANSFORMERS[family]
    with torch.device("meta"):
        modules = transformer(**config).named_modules()
    return {name: module.out_features for name, module in modules if isinstance(module, torch.nn.Linear)}


def is_refused(family: str, module: str) -> bool:
    return family != "qwenimage" and (module.startswith(REFUSED) or (family == "sd3" and "norm1_context" in module))


def random_updates(rows: Mapping[str, int]) -> dict[str, Factors]:
    """Factors of ranks 1 to 4; the modules' inputs are of size 3, because the names do not depend on it."""
    g = torch.Generator().manual_seed(0)
    ranks = {module: 1 + i % 4 for i, module in enumerate(rows)}
    return {m: Factors(torch.randn(rows[m], k, generator=g), torch.randn(k, 3, generator=g)) for m, k in ranks.items()}


def read_by_diffusers(family: str, updates: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The product of every module that diffusers reads from factors with original names."""
    tensors = {}
    for name, factors in updates.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": factors.a, f"{key}.lora_up.weight": factors.b}
        tensors[f"{key}.alpha"] = torch.tensor(float(factors.rank))
    suffix = ".lora_B.weight"
    state = LOADERS[family].lora_state_dict(tensors)
    modules = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    return {m.removeprefix("transformer."): state[m + suffix] @ state[f"{m}.lora_A.weight"] for m in modules}


class ZeroCheckpoint(dict[str, Tensor]):
    """A checkpoint that has zeros for every tensor that is not in it."""

    def pop(self, key: str, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().pop(key, torch.zeros(6))


def converted_sd3(updates: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The products as weights of a checkpoint, because diffusers reads no LoRA with SD3's original names."""
    checkpoint = ZeroCheckpoint({f"{name}.weight": factors.b @ factors.a for name, factors in updates.items()})
    checkpoint["context_embedder.weight"] = torch.zeros(3, 3)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint, "a name that is not SD3's"
    return {key.removesuffix(".weight"): tensor for key, tensor in converted.items()}


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("adapted", ["all", "two of three"])
def test_diffusers_reads_the_same_updates_by_original_names(family, adapted):
    rows = {module: n for module, n in linear_rows(family).items() if not is_refused(family, module)}
    updates = random_updates(rows if adapted == "all" else {m: n for i, (m, n) in enumerate(rows.items()) if i % 3})
    original = in_original_layout(family, updates)
    read = converted_sd3(original) if family == "sd3" else read_by_diffusers(family, original)
    for module in rows.keys() & read.keys():
        expected = updates[module].b @ updates[module].a if module in updates else torch.zeros(())
        torch.testing.assert_close(read[module], expected.expand_as(read[module]), atol=1e-6, rtol=1e-6)
    assert updates.keys() <= read.keys()


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_modules_without_an_original_name_are_refused(family):
    rows = linear_rows(family)
    for module, factors in random_updates({m: 2 for m in rows if is_refused(family, m)}).items():
        with pytest.raises(InputError, match=f"{module} has no name in the kohya format; use --format diffusers"):
            in_original_layout(family, {module: factors})


def test_members_of_different_widths_are_refused():
    prefix = "single_transformer_blocks.0"
    updates = random_updates({f"{prefix}.attn.to_q": 8, f"{prefix}.proj_mlp": 8})
    with pytest.raises(InputError, match="single_blocks.0.linear1 have different widths"):
        in_original_layout("flux", updates)
