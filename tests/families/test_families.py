"""What each family's prompts become, and that each family implements the interface."""

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from delora_diffusers.families.checks import COMPONENTS
from delora_diffusers.families.family import Family
from delora_diffusers.families.loading import load_pipeline, open_model
from delora_diffusers.families.table import FAMILIES, family_of
from delora_diffusers.pipelines import encoded_prompts
from delora_diffusers.pipelines.adapted_pipeline import AdaptedPipeline, Weighted
from delora_diffusers.pipelines.conditions import encode_prompts, text_encoders
from delora_diffusers.pipelines.encoded_prompts import EncodedPrompts

CPU = torch.device("cpu")
KINDS = ("sd1", "sdxl")


def encoded(
    model: Path, adapters: list[Path], sets: list[list[Weighted]], prompts: list[str], negative: str = ""
) -> EncodedPrompts:
    """Prompts encoded with each set of adapters, the sets in turn."""
    used = [(prompt, weighted) for prompt in prompts for weighted in sets]
    return EncodedPrompts(open_model(str(model)), adapters, used, negative, CPU, torch.float32)


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts that the first text encoder reads."""
    original, read = encoded_prompts.read_prompts, []

    def counting(pipeline: Any, name: str, prompts: Any, device: Any, chunks: int):
        assert list(text_encoders(pipeline)) == [name]  # no other is loaded
        read.extend(prompts if name == "text_encoder" else [])
        return original(pipeline, name, prompts, device, chunks)

    patch.setattr(encoded_prompts, "read_prompts", counting)
    yield read


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_with_each_set_of_adapters(models, adapters, monkeypatch, kind):
    first, second = adapters[kind, True]
    sets: list[list[Weighted]] = [
        [],
        [(first, 1.0)],
        [(first, 0.5)],
        [(second, 1.0)],
        [(first, 1.0), (second, 0.5)],
    ]
    prompts, negative = ["a dog", "a cat in the snow"], "blue"
    with counted(monkeypatch) as read:
        result = encoded(models[kind], [first, second], sets, prompts, negative)
    assert sorted(read) == sorted(["a dog", "a cat in the snow", "blue"] * len(sets))
    adapted = AdaptedPipeline(load_pipeline(str(models[kind])), [first, second])
    seen: list[torch.Tensor] = []
    for weighted in sets:
        adapted.use(weighted)
        arguments = result.arguments(prompts, weighted, CPU)
        for text, row in zip((*prompts, negative), (0, 1, 0)):
            prefix = "negative_" if text == negative else ""
            conditions = encode_prompts(adapted.pipeline, [text], CPU)
            assert torch.equal(arguments[f"{prefix}prompt_embeds"][row], conditions["encoder_hidden_states"][0])
            if kind == "sdxl":
                assert torch.equal(arguments[f"{prefix}pooled_prompt_embeds"][row], conditions["text_embeds"][0])
        embedding = arguments["prompt_embeds"]
        assert all((embedding - other).abs().max() > 1e-3 for other in seen)
        seen.append(embedding)


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_once_if_no_text_encoder_is_adapted(models, adapters, monkeypatch, kind):
    first, second = adapters[kind, False]
    sets: list[list[Weighted]] = [[(first, 1.0)], [(second, 1.0)]]
    with counted(monkeypatch) as read:
        result = encoded(models[kind], [first, second], sets, ["a dog", "a cat"])
    assert sorted(read) == ["", "a cat", "a dog"]
    one, other = (result.arguments(["a dog", "a cat"], weighted, CPU) for weighted in sets)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.model.pipeline.text_encoder is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "blue"])
@pytest.mark.parametrize("zeros", [True, False])
def test_negative_prompts_are_those_of_the_stock_pipeline(models, tmp_path, kind, negative, zeros):
    from diffusers import DiffusionPipeline

    folder = shutil.copytree(models[kind], tmp_path / "model")
    if kind == "sdxl":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    stock = DiffusionPipeline.from_pretrained(folder)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    theirs = stock.encode_prompt(
        "a dog", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative or None
    )
    ours = encoded(folder, [], [[]], ["a dog"], negative).arguments(["a dog"], [], CPU)
    assert list(ours) == names[: len(theirs)]
    for name, expected in zip(names, theirs):
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-5)
    is_zero = kind == "sdxl" and zeros and not negative
    assert all((tensor.abs().max() == 0) == is_zero for name, tensor in ours.items() if name.startswith("negative"))


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_does_not_depend_on_its_batch(models, kind):
    prompts = ["a dog", "a cat in the snow", "", "very " * 30]
    together = encoded(models[kind], [], [[]], prompts, "blue")
    batch = together.arguments(prompts, [], CPU)
    reverse = together.arguments(prompts[::-1], [], CPU)
    for row, prompt in enumerate(prompts):
        alone = encoded(models[kind], [], [[]], [prompt], "blue").arguments([prompt], [], CPU)
        for name, tensor in batch.items():
            assert torch.equal(tensor[row], alone[name][0]), name
            assert torch.equal(reverse[name][-1 - row], alone[name][0]), name


def test_encoded_prompts_have_the_dtype_of_the_denoiser(models):
    prompts = EncodedPrompts(open_model(str(models["sdxl"])), [], [("a dog", [])], "", CPU, torch.bfloat16)
    assert not text_encoders(prompts.model.pipeline)
    arguments = prompts.arguments(["a dog"], [], CPU)
    assert {tensor.dtype for tensor in arguments.values()} == {torch.bfloat16}


@pytest.mark.parametrize("pipeline_class", list(FAMILIES))
def test_a_family_has_the_interface_and_nothing_else(pipeline_class):
    family: Any = family_of(pipeline_class)
    public = {name: value for name, value in vars(type(family)).items() if name[0] != "_"}
    assert set(public) <= {name for name in vars(Family) if name[0] != "_"}
    for name, value in public.items():
        if inspect.isfunction(value):
            expected, actual = (inspect.signature(f, eval_str=True) for f in (getattr(Family, name), value))
            assert actual == expected, name
    assert {family.DENOISER, *family.TEXT_ENCODERS} <= set(COMPONENTS)
    assert set(family.TRAINABLE_ENCODERS) <= set(family.TEXT_ENCODERS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_family_encodes_is_what_its_denoiser_takes(models, kind):
    pipeline = load_pipeline(str(models[kind]))
    family: Any = family_of(type(pipeline).__name__)
    assert list(text_encoders(pipeline)) == list(family.TEXT_ENCODERS)
    with torch.no_grad():
        conditions = encode_prompts(pipeline, ["a dog", "a cat"], CPU)
        if family.HAS_SIZES:
            conditions["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        prediction = family.predict(pipeline.unet, noisy, torch.tensor([3, 700]), **conditions)
    assert prediction.shape == noisy.shape and prediction.isfinite().all()
