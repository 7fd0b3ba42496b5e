"""A model's own names and keys, however it is wrapped, and an adapter that stays whatever processor is set."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn
from torch.nn.utils import parametrizations

from delora_diffusers import (
    AdapterConfig,
    InputError,
    attach,
    attached_adapter,
    detach,
    load_adapter,
    merge,
    save_adapter,
)
from delora_diffusers.adapter.modules import named_modules, unwrap
from delora_diffusers.methods.config import MAP_TARGETS, TEXT_ENCODER_TARGETS
from delora_diffusers.names import WEIGHTS_NAME
from tests.helpers import randomize


class XFormersLike:
    """A processor from elsewhere: it calls the attention's linear modules and computes plain attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        query, key, value = (attn.head_to_batch_dim(tensor) for tensor in (query, key, value))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value)))


def add_ip_adapter(unet) -> None:
    """Replace the processors as diffusers' IP-Adapters do."""
    processors = {}
    for name, old in unet.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = type(old)()
        else:
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processors[name] = IPAdapterAttnProcessor2_0(width, unet.config.cross_attention_dim, [4], scale=[0.0])
    unet.set_attn_processor(processors)


REPLACEMENTS = {
    "attention slicing": lambda unet: unet.set_attention_slice("max"),
    "slicing on and off": lambda unet: (unet.set_attention_slice("max"), unet.set_attention_slice(None)),
    "vanilla": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "sdpa": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "default": lambda unet: (unet.set_attn_processor(AttnProcessor()), unet.set_default_attn_processor()),
    "fused": lambda unet: unet.fuse_qkv_projections(),
    "fused and not": lambda unet: (unet.fuse_qkv_projections(), unet.unfuse_qkv_projections()),
    "a processor from elsewhere": lambda unet: unet.set_attn_processor(XFormersLike()),
    "only some": lambda unet: (
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1))
    ),
}


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=4),
        AdapterConfig(rank=4, path="split"),
        AdapterConfig(rank=4, path="lean"),
        AdapterConfig(rank=4, method="dora", targets=("to_q", "to_v")),
        AdapterConfig(rank=4, targets=MAP_TARGETS),
    ],
    ids=["fast", "split", "lean", "two targets", "feed-forward"],
)
@pytest.mark.parametrize("change", list(REPLACEMENTS))
def test_the_output_stays_adapted_when_processors_are_replaced(unet, unet_inputs, config, change):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.no_grad():
        base = unet(*unet_inputs).sample
        adapter = attach(unet, config, torch.Generator().manual_seed(0))
        randomize(adapter, 0.5)
        adapted = unet(*unet_inputs).sample
        assert (adapted - base).abs().max() > 1e-2
        REPLACEMENTS[change](unet)
        for _ in range(2):
            torch.testing.assert_close(unet(*unet_inputs).sample, adapted, atol=2e-5, rtol=1e-4)
        adapter.strength = 0
        torch.testing.assert_close(unet(*unet_inputs).sample, base, atol=1e-5, rtol=1e-4)
        adapter.strength = 1
        if change == "fused":
            unet.unfuse_qkv_projections()
        kept = {
            name: tensor for name, tensor in unet.state_dict().items() if "to_qkv" not in name and "to_kv" not in name
        }
        assert kept.keys() == before.keys()
        detach(unet)
        torch.testing.assert_close(unet(*unet_inputs).sample, base, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


def test_gradients_reach_the_adapter_through_any_processor(unet, unet_inputs):
    adapter = attach(unet, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
    randomize(adapter)
    gradients = []
    for change in (None, "attention slicing", "a processor from elsewhere"):
        if change is not None:
            REPLACEMENTS[change](unet)
        adapter.zero_grad()
        unet(*unet_inputs).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
    for other in gradients[1:]:
        for gradient, expected in zip(other, gradients[0]):
            torch.testing.assert_close(gradient, expected, atol=1e-3 * expected.abs().max().item(), rtol=1e-3)


def test_an_ip_adapter_at_scale_zero_keeps_the_adapter(unet, unet_inputs):
    sample, timestep, text = unet_inputs
    with torch.no_grad():
        adapter = attach(unet, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
        randomize(adapter, 0.5)
        adapted = unet(*unet_inputs).sample
        add_ip_adapter(unet)
        image = torch.zeros(2, 1, 4, text.shape[-1])
        processors = unet.attn_processors.values()
        assert any(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in processors)
        with_image = unet(sample, timestep, (text, [image])).sample
        torch.testing.assert_close(with_image, adapted, atol=2e-5, rtol=1e-4)


def test_fused_projections_that_the_adapter_cannot_reach_are_refused(unet, unet_inputs):
    unet.set_attn_processor(AttnProcessor())  # the linear modules are adapted one by one
    attach(unet, AdapterConfig(rank=4))
    unet.fuse_qkv_projections()
    with pytest.raises(InputError, match="were fused, which copies their weights without the adapter"):
        unet(*unet_inputs)
    unet.unfuse_qkv_projections()
    unet(*unet_inputs)


def test_an_adapted_model_is_not_copied_in_silence(unet):
    for targets in (("to_q",), ("ff.net.2",)):
        attach(unet, AdapterConfig(rank=2, targets=targets))
        with pytest.raises(InputError, match="cannot be copied"):
            copy.deepcopy(unet)
        detach(unet)
        copy.deepcopy(unet)


class Wrapped(nn.Module):
    """A stand-in for a module that torch.compile has wrapped."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *inputs, **more):
        return self._orig_mod(*inputs, **more)


def compiled_inside(unet):
    """Compile a block of a model, as regional compilation by hand does."""
    unet.down_blocks[0] = Wrapped(unet.down_blocks[0])
    return unet


WRAPPERS = {
    "compiled": lambda unet: torch.compile(unet, backend="eager"),
    "a compiled block": compiled_inside,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda unet: nn.DataParallel(torch.compile(unet, backend="eager")),
}


@pytest.mark.parametrize("wrap", list(WRAPPERS))
@pytest.mark.parametrize("config", [AdapterConfig(rank=2), AdapterConfig(rank=2, targets=MAP_TARGETS)], ids=["q", "ff"])
def test_wrapped_models_save_and_load_under_the_models_own_names(tiny_sd, tmp_path, unet, wrap, config):
    def fresh():
        return UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")

    wrapped = WRAPPERS[wrap](fresh())
    assert {name for name, _ in named_modules(wrapped)} == {name for name, _ in unet.named_modules()}
    adapter = attach(wrapped, config, torch.Generator().manual_seed(0))
    randomize(adapter)
    plain = attach(unet, config, torch.Generator().manual_seed(0))
    randomize(plain)
    files = [save_adapter(part, tmp_path / name) for part, name in ((adapter, "wrapped"), (plain, "plain"))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert attached_adapter(wrapped) is attached_adapter(unwrap(wrapped)) is adapter
    detach(wrapped)
    loaded = load_adapter(wrapped, tmp_path / "plain")
    assert loaded.names == plain.names
    weight = loaded.weight(loaded.names[0])
    merge(wrapped)
    assert torch.equal(dict(named_modules(wrapped))[loaded.names[0]].get_parameter("weight"), weight)


def test_a_parametrized_weight_is_refused_and_any_other_does_not_matter(unet, tmp_path):
    parametrizations.spectral_norm(unet.conv_in)
    parametrizations.weight_norm(unet.time_embedding.linear_1)
    adapter = attach(unet, AdapterConfig(rank=2))
    assert (save_adapter(adapter, tmp_path)).name == WEIGHTS_NAME and not any("param" in name for name in adapter.names)
    detach(unet)
    parametrizations.weight_norm(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q)
    for config in (AdapterConfig(rank=2), AdapterConfig(method="full", targets=("*",))):
        with pytest.raises(InputError, match="is already parametrized"):
            attach(unet, config)
    assert attached_adapter(unet) is None


@pytest.mark.parametrize("targets", [("to_q",), MAP_TARGETS, ("*",)], ids=["attention", "feed-forward", "everything"])
def test_a_unet_is_saved_and_loaded_under_its_own_keys_with_an_adapter(tiny_sd, unet, unet_inputs, tmp_path, targets):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    config = AdapterConfig(rank=2, targets=targets, method="full" if "*" in targets else "delora")
    randomize(attach(unet, config))
    saved = unet.state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    changed = {name: tensor + 1 for name, tensor in before.items()}
    assert unet.load_state_dict(changed).missing_keys == []
    detach(unet)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in unet.state_dict().items())


def test_a_text_encoder_is_saved_under_its_own_keys_with_an_adapter(tiny_sd, tmp_path):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(tiny_sd, subfolder="text_encoder")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    randomize(attach(encoder, AdapterConfig(rank=2, targets=TEXT_ENCODER_TARGETS)))
    assert encoder.state_dict().keys() == before.keys()
    encoder.save_pretrained(tmp_path)
    again = CLIPTextModel.from_pretrained(tmp_path).state_dict()
    assert again.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in again.items())


def test_a_lora_of_peft_on_top_adds_to_the_adapter(unet, unet_inputs):
    import peft

    with torch.no_grad():
        adapter = attach(unet, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
        randomize(adapter, 0.5)
        adapted = unet(*unet_inputs).sample
        lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        peft.inject_adapter_in_model(lora, unet)
        both = unet(*unet_inputs).sample
        adapter.strength = 0
        alone = unet(*unet_inputs).sample
        adapter.strength = 1
        merge(unet)
        torch.testing.assert_close(unet(*unet_inputs).sample, both, atol=2e-5, rtol=1e-4)
    assert (both - adapted).abs().max() > 1e-3 and (both - alone).abs().max() > 1e-2


def test_an_adapter_after_a_lora_of_peft_is_refused_with_the_remedy(unet):
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), unet)
    with pytest.raises(InputError, match="already has an adapter of another library; unload or fuse that first"):
        attach(unet, AdapterConfig(rank=2))


def test_a_module_that_was_replaced_after_attaching_is_refused(unet, unet_inputs):
    attach(unet, AdapterConfig(rank=2))
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    original = attention.to_q
    attention.to_q = nn.Linear(64, 64, bias=False)
    with pytest.raises(InputError, match=r"attn1\.to_q was changed after the adapter was attached"):
        unet(*unet_inputs)
    attention.to_q = original
    unet(*unet_inputs)


def test_offloaded_weights_are_refused(unet, unet_inputs):
    attach(unet, AdapterConfig(rank=2))
    unet.to("meta")
    with pytest.raises(InputError, match="the model's weights are offloaded"):
        unet(*(tensor.to("meta") for tensor in unet_inputs))
