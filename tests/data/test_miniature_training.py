"""The training of the miniature family."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.miniature import MINI_CLIP, MINI_SD
from data.miniature.training import __main__ as training
from data.miniature.training import transformer, unet
from data.miniature.training.encoding import projected
from data.miniature.training.steps import train
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.families.sd3 import FAMILY
from delora_diffusers.pipelines.sampling import sample_images
from delora_diffusers.training.noising import Density, Flow


def test_averaged_weights_of_a_short_training_forget_the_initialization():
    layer = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 50.0)
    target = torch.tensor([[1.0, -2.0, 3.0, 0.5]])

    def distance():
        return (layer.weight - target).square().sum()

    steps = train([layer], distance, rate=1.0, steps=300, warmup=10, weight_decay=0, ema=0.999)
    assert steps == 300
    assert torch.allclose(layer.weight, target, atol=0.05)


@pytest.mark.parametrize("width", unet.RECIPES)
def test_width_scales_the_channels_and_keeps_the_size_of_heads(width):
    with torch.device("meta"):
        model = unet.build(6, 128, 32, seed=0, width=width)
    included = json.loads((MINI_SD / "unet/config.json").read_text())
    assert model.config.block_out_channels == tuple(width * channels for channels in included["block_out_channels"])
    changed = {key for key, value in json.loads(model.to_json_string()).items() if included.get(key) != value}
    changed = {key for key in changed if not key.startswith("_")}  # versions of diffusers and the like
    assert changed <= (set() if width == 1 else {"block_out_channels", "attention_head_dim"})
    attentions = [module for name, module in model.named_modules() if name.endswith(("attn1", "attn2"))]
    assert {attention.inner_dim // attention.heads for attention in attentions} == {16 if width < 1 else 32}


def test_fewer_zero_tokens_with_a_bias_are_as_good_as_all():
    model = transformer.build(6, 16, 8, seed=0, layers=2)
    for parameter in model.parameters():  # begins as the identity, which ignores attention
        torch.nn.init.normal_(parameter, std=0.2)
    random = torch.Generator().manual_seed(0)
    x, hidden, pooled = (torch.randn(shape, generator=random) for shape in ((2, 6, 8, 8), (2, 77, 16), (2, 16)))
    times = torch.tensor([100.0, 900.0])

    def predict(zero_tokens):
        conditions = transformer.conditions(hidden, pooled, zero_tokens)
        return model(x, timestep=times, **conditions, return_dict=False)[0]

    with torch.no_grad():
        expected, without_bias = predict(transformer.T5_TOKENS), predict(transformer.ZERO_TOKENS)
        processor: Any = transformer.ZeroTokenAttention(16 + 77 + transformer.ZERO_TOKENS, "cpu")
        model.set_attn_processor(processor)
        actual = predict(transformer.ZERO_TOKENS)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (without_bias - expected).abs().max() > 1e-2


def test_the_transformer_trains_on_the_conditions_of_its_family():
    from transformers import CLIPTextModel, CLIPTokenizer

    text_encoder = CLIPTextModel.from_pretrained(MINI_SD / "text_encoder").float()
    encoder, tokenizer = projected(text_encoder, MINI_CLIP), CLIPTokenizer.from_pretrained(MINI_SD / "tokenizer")
    pipeline = SimpleNamespace(text_encoder=encoder, text_encoder_2=encoder, tokenizer=tokenizer, tokenizer_2=tokenizer)
    prompts = ["a photo of a red mug on a table", ""]
    outputs = {name: FAMILY.encode(pipeline, name, prompts, "cpu") for name in FAMILY.TRAINABLE_ENCODERS}
    expected = FAMILY.conditions(outputs, SimpleNamespace(joint_attention_dim=256))
    actual = transformer.conditions(*transformer.read(encoder, FAMILY.tokenize(pipeline, "text_encoder", prompts)))
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name])


def test_pooled_features_are_those_of_mini_clip():
    import open_clip
    from transformers import CLIPTextModel, CLIPTokenizer

    from data.miniature.training.clip import config, tokenize

    tokenizer = CLIPTokenizer.from_pretrained(MINI_SD / "tokenizer")
    clip = open_clip.CLIP(**config(len(tokenizer)))
    clip.load_state_dict(load_file(MINI_CLIP / "open_clip_model.safetensors"))
    encoder = projected(CLIPTextModel.from_pretrained(MINI_SD / "text_encoder").float(), MINI_CLIP)
    tokens = tokenize(tokenizer, ["a photo of a red mug on a table", ""])
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokens).text_embeds, clip.eval().encode_text(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_distribution_that_adapters_are_trained_on(shift, monkeypatch):
    monkeypatch.setattr(transformer, "SHIFT", shift)
    flow = Flow(Density("logit_normal"), shift, 2, [])
    times = flow.times(torch.empty(100_000, 1, 1, 1), torch.Generator().manual_seed(0))
    share = torch.linspace(0.01, 0.99, 50)
    stratified = transformer.logit_normal_times(10_000, "cpu")
    torch.testing.assert_close(stratified.quantile(share), times.quantile(share), rtol=0, atol=0.01)


@pytest.mark.integration
def test_every_base_model_trains_with_the_included_parts_and_samples(tmp_path, capsys):
    device = ["--device", "cpu"]
    training.main(["pool", str(tmp_path), "--subjects", "2", "--photographs", "1", *device])
    flags = ["--included_parts", "--steps", "1", "--batch", "2", *device]
    for name, stage in {"mini-sd-x0.5": ["unet", "--width", "0.5"], "mini-sd3": ["transformer"]}.items():
        stage.insert(1, str(tmp_path))
        training.main([*stage, *flags])
        pipeline = load_pipeline(str(tmp_path / "family" / name))
        images = sample_images(pipeline, [0], None, prompt=["a red mug"], num_inference_steps=1, guidance_scale=4.0)
        assert images[0].size == (128, 128)
        with pytest.raises(SystemExit):
            training.main([*stage, *flags])
        assert f"{name} already exists" in capsys.readouterr().err
