"""An adapter in a model: paths, processors, parametrization and hooks, attach, detach and merge."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from delora_diffusers import AdapterConfig, InputError, attach, attached_adapter, detach, merge
from delora_diffusers.adapter.processors import AdaptedAttnProcessor
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from tests.helpers import outputs_and_gradients, randomize

CONFIGS = [
    AdapterConfig(rank=4),
    AdapterConfig(rank=4, start="zero", weight_norm="frobenius"),
    AdapterConfig(rank=4, method="lora"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.start}")
def test_unet_with_an_adapter(unet, unet_inputs, config):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.no_grad():
        base = unet(*unet_inputs).sample
    adapter = attach(unet, config)
    assert unet.state_dict().keys() == before.keys(), "the model's state dict must not change"
    torch.testing.assert_close(unet(*unet_inputs).sample, base, atol=1e-6, rtol=1e-5)
    randomize(adapter)
    with torch.no_grad():
        adapted = unet(*unet_inputs).sample
        adapter.strength = 0
        assert torch.equal(unet(*unet_inputs).sample, base)
        adapter.strength = 1
        assert torch.equal(unet(*unet_inputs).sample, adapted)
    assert (adapted - base).abs().max() > 1e-3

    # Distances and W' agree with delta_weight, which test_update checks by itself.
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = adapter.delta_weight(name)
    assert adapter.distances()[name] == pytest.approx(delta.norm().item(), rel=1e-4)
    torch.testing.assert_close(adapter.weight(name), before[name + ".weight"] + delta)

    detach(unet)
    assert attached_adapter(unet) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())
    with torch.no_grad():
        assert torch.equal(unet(*unet_inputs).sample, base)
    assert all(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.start}")
def test_merging_keeps_the_output(unet, unet_inputs, config):
    adapter = attach(unet, config)
    randomize(adapter)
    adapter.strength = 0.7
    with torch.no_grad():
        adapted = unet(*unet_inputs).sample
        merge(unet)
        assert not any(isinstance(m.processor, AdaptedAttnProcessor) for m in unet.modules() if hasattr(m, "processor"))
        torch.testing.assert_close(unet(*unet_inputs).sample, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["delora", "lora"])
def test_fast_and_split_paths_agree(unet, unet_inputs, method):
    fast = outputs_and_gradients(unet, unet_inputs, AdapterConfig(method=method, rank=4))
    split = outputs_and_gradients(unet, unet_inputs, AdapterConfig(method=method, rank=4, path="split"))
    torch.testing.assert_close(fast[0], split[0], atol=1e-5, rtol=1e-4)
    for name, gradient in fast[1].items():
        torch.testing.assert_close(gradient, split[1][name], atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)


def test_paths_agree_in_bfloat16_within_its_rounding(unet, unet_inputs):
    exact = outputs_and_gradients(unet, unet_inputs, AdapterConfig(rank=4))
    for path in ("fast", "split"):
        rounded = outputs_and_gradients(unet, unet_inputs, AdapterConfig(rank=4, path=path), torch.bfloat16)
        assert (rounded[0] - exact[0]).norm() / exact[0].norm() < 0.02
        for name, gradient in exact[1].items():
            assert rounded[1][name].dtype == torch.float32
            assert (rounded[1][name] - gradient).norm() / gradient.norm() < 0.06, name


def test_lora_agrees_with_peft(unet, unet_inputs):
    import peft

    reference = copy.deepcopy(unet)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), reference
    )
    adapter = attach(unet, AdapterConfig(method="lora", rank=4))
    randomize(adapter)
    with torch.no_grad():
        for name, tensor in adapter.named_tensors():
            module, _, key = name.rpartition(".")
            getattr(reference.get_submodule(module), key)["default"].weight.copy_(tensor)
        torch.testing.assert_close(unet(*unet_inputs).sample, reference(*unet_inputs).sample, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(unet, unet_inputs):
    plain = outputs_and_gradients(unet, unet_inputs, AdapterConfig(rank=4))
    unet.enable_gradient_checkpointing()
    unet.train()
    checkpointed = outputs_and_gradients(unet, unet_inputs, AdapterConfig(rank=4))
    assert torch.equal(plain[0], checkpointed[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(gradient, checkpointed[1][name])


@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("to_k", "to_v"), ("to_out.0",), ("attn1.to_q",)])
def test_subsets_of_the_targets(unet, unet_inputs, targets):
    with torch.no_grad():
        base = unet(*unet_inputs).sample
    adapter = attach(unet, AdapterConfig(rank=4, targets=targets))
    torch.testing.assert_close(unet(*unet_inputs).sample, base, atol=1e-6, rtol=1e-5)
    randomize(adapter)
    adapted = unet(*unet_inputs).sample
    adapted.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    merge(unet)
    torch.testing.assert_close(unet(*unet_inputs).sample, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["fast", "split", "lean"])
def test_feed_forward_layers(unet, unet_inputs, path):
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    with torch.no_grad():
        base = unet(*unet_inputs).sample
    adapter = attach(unet, AdapterConfig(rank=4, targets=targets, path=path))
    randomize(adapter)
    adapted = unet(*unet_inputs).sample
    adapted.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    with torch.no_grad():
        adapter.strength = 0
        assert torch.equal(unet(*unet_inputs).sample, base)
        adapter.strength = 1
        merge(unet)
        torch.testing.assert_close(unet(*unet_inputs).sample, adapted, atol=1e-5, rtol=1e-5)


ATTENTIONS = {
    "self": dict(),
    "cross": dict(cross_attention_dim=24),
    "cross of the same width": dict(cross_attention_dim=32),
    "bias": dict(bias=True),
    "group norm, residual": dict(norm_num_groups=8, residual_connection=True, rescale_output_factor=2.0, bias=True),
    "spatial norm": dict(spatial_norm_dim=4, residual_connection=True),
    "normed cross": dict(cross_attention_dim=24, cross_attention_norm="layer_norm"),
    "qk norm": dict(qk_norm="layer_norm"),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ATTENTIONS)
@torch.no_grad()
def test_every_kind_of_attention(kind, mask, fused):
    torch.manual_seed(0)
    attention = Attention(query_dim=32, heads=4, dim_head=8, **ATTENTIONS[kind]).eval()
    model = nn.ModuleDict({"attention": attention})
    model.forward = lambda **inputs: attention(**inputs)  # type: ignore[method-assign]
    inputs: dict = {"hidden_states": torch.randn(2, 16, 32)}
    if kind in ("group norm, residual", "spatial norm"):
        inputs["hidden_states"] = torch.randn(2, 32, 4, 4)
    if kind == "spatial norm":
        inputs["temb"] = torch.randn(2, 4, 4, 4)
    tokens = 16
    if "cross" in kind:
        tokens = 7
        inputs["encoder_hidden_states"] = torch.randn(2, tokens, ATTENTIONS[kind]["cross_attention_dim"])
    if mask:
        inputs["attention_mask"] = torch.where(torch.rand(2, 1, tokens) > 0.3, 0.0, -1e4)
    if fused:
        from diffusers.models.attention_processor import FusedAttnProcessor2_0

        attention.fuse_projections()
        attention.set_processor(FusedAttnProcessor2_0())
    stock = model(**inputs)
    adapter = attach(model, AdapterConfig(rank=4))
    assert isinstance(attention.processor, AdaptedAttnProcessor)
    torch.testing.assert_close(model(**inputs), stock, atol=1e-6, rtol=1e-5)
    randomize(adapter)
    adapted = model(**inputs)
    assert (adapted - stock).abs().max() > 1e-3
    adapter.strength = 0
    assert torch.equal(model(**inputs), stock)
    adapter.strength = 1
    merge(model)
    torch.testing.assert_close(model(**inputs), adapted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_keeps_other_processors(unet, unet_inputs):
    unet.set_attn_processor(AttnProcessor())
    base = unet(*unet_inputs).sample
    adapter = attach(unet, AdapterConfig(rank=4))
    assert all(type(processor) is AttnProcessor for processor in unet.attn_processors.values())
    randomize(adapter)
    adapted = unet(*unet_inputs).sample
    assert (adapted - base).abs().max() > 1e-3
    detach(unet)
    assert torch.equal(unet(*unet_inputs).sample, base)
    unet.set_attn_processor(AttnProcessor2_0())
    second = attach(unet, AdapterConfig(rank=4))
    for (_, target), (_, source) in zip(sorted(second.named_tensors()), sorted(adapter.named_tensors())):
        target.copy_(source)
    torch.testing.assert_close(unet(*unet_inputs).sample, adapted, atol=1e-5, rtol=1e-4)


def test_text_encoder(tiny_sd):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").eval()
    tokens = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        base = encoder(tokens)[0]
    adapter = attach(encoder, AdapterConfig(rank=4, targets=TEXT_ENCODER_TARGETS))
    assert torch.equal(encoder(tokens)[0], base)
    randomize(adapter)
    adapted = encoder(tokens)[0]
    adapted.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with torch.no_grad():
        merge(encoder)
        torch.testing.assert_close(encoder(tokens)[0], adapted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adapter_follows_a_model_that_is_cast_or_reloaded(unet, unet_inputs):
    other_weights = {name: tensor + 0.01 for name, tensor in unet.state_dict().items()}
    adapter = attach(unet, AdapterConfig(rank=4, weight_norm="none"))
    first = unet(*unet_inputs).sample
    sample, timestep, text = unet_inputs
    unet.to(torch.bfloat16)
    assert unet(sample.bfloat16(), timestep, text.bfloat16()).sample.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    unet.to(torch.float32).load_state_dict(other_weights)
    reloaded = unet(*unet_inputs).sample
    assert not torch.equal(reloaded, first)
    detach(unet)
    torch.testing.assert_close(unet(*unet_inputs).sample, reloaded)


@pytest.mark.integration
def test_compiled_model_trains_without_recompiling(unet, unet_inputs):
    import torch._dynamo.testing

    adapter = attach(unet, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, backend=counter)
    compiles = []
    for _ in range(3):
        expected = unet(*unet_inputs).sample
        output = compiled(*unet_inputs).sample
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
        output.square().sum().backward()
        optimizer.step()
        compiles.append(counter.frame_count)
    assert compiles[0] == compiles[-1] > 0


def test_invalid_arguments(unet):
    with pytest.raises(InputError, match="rank is 64.* is 32 x 32; choose a rank of at most 32"):
        attach(unet, AdapterConfig(rank=64))
    with pytest.raises(InputError, match="target to_x matches no module of UNet2DConditionModel.*to_q"):
        attach(unet, AdapterConfig(rank=4, targets=("to_q", "to_x")))
    with pytest.raises(InputError, match="target attn1 matches .*attn1 of type Attention"):
        attach(unet, AdapterConfig(rank=4, targets=("attn1",)))
    assert all(parameter.requires_grad for parameter in unet.parameters()), "a failed attach must not change the model"
    attach(unet, AdapterConfig(rank=4))
    with pytest.raises(InputError, match="already has an adapter attached"):
        attach(unet, AdapterConfig(rank=4))
    detach(unet)
    with pytest.raises(InputError, match="no adapter is attached"):
        merge(unet)
    for arguments in ({"method": "nonesuch"}, {"rank": 0}, {"delora_lambda": -1.0}, {"targets": ()}):
        with pytest.raises(InputError, match=next(iter(arguments))):
            AdapterConfig(**arguments)
