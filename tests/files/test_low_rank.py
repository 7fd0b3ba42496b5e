"""The mathematics of exports: truncation, sums of adapters, strengths, PEFT's DeLoRA in both directions."""

import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data.tiny_sd import transformer
from delora_diffusers import AdapterConfig, attach, detach, load_adapter, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.files.low_rank import Factors, balanced, summed, truncated
from delora_diffusers.pipelines.adapted_pipeline import AdaptedPipeline
from tests.helpers import randomize

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))


def random_factors(sizes: tuple[int, int, int], seed: int) -> Factors:
    out_features, in_features, rank = sizes
    g = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out_features, rank, generator=g), torch.randn(rank, in_features, generator=g))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 1000))
def test_truncation_is_optimal_and_returns_its_error(sizes, seed):
    factors = random_factors(sizes, seed)
    product = factors.b.double() @ factors.a.double()
    values = torch.linalg.svdvals(product)
    errors = []
    for rank in range(1, factors.rank + 1):
        kept, error = truncated(factors, rank)
        measured = (product - kept.b.double() @ kept.a.double()).norm() / product.norm()
        best = values[rank:].norm() / product.norm()
        assert error == pytest.approx(float(measured), abs=1e-5)
        assert float(measured) == pytest.approx(float(best), abs=1e-5)
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert factors.norm() == pytest.approx(float(product.norm()), rel=1e-5)
    small = balanced(Factors(factors.b * 2.0**-20, factors.a * 2.0**13))
    assert torch.equal(small.b @ small.a, (factors.b @ factors.a) * 2.0**-7), "scaling by powers of two must be exact"
    assert 0.2 < small.b.abs().max() / small.a.abs().max() < 5


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 1000), st.floats(-2, 2), st.floats(-2, 2))
def test_a_sum_of_adapters_is_linear_and_commutes(sizes, seed, first, second):
    x, y = random_factors(sizes, seed), random_factors((*sizes[:2], 2), seed + 1)
    for order in ([(x, first), (y, second)], [(y, second), (x, first)]):
        total = summed([({"m": factors}, strength) for factors, strength in order])["m"]
        expected = first * (x.b @ x.a) + second * (y.b @ y.a)
        torch.testing.assert_close(total.b @ total.a, expected, atol=1e-4, rtol=1e-4)
        assert total.rank == x.rank + y.rank
        bound = abs(first) * x.norm() + abs(second) * y.norm()
        assert total.norm() <= bound * (1 + 1e-5) + 1e-6


@pytest.fixture(scope="module")
def two_adapters(tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("a", "b")):
        pipeline = load_pipeline(str(tiny_sd))
        adapter = attach(pipeline.unet, AdapterConfig(rank=3), torch.Generator().manual_seed(seed))
        randomize(adapter, 0.3 + seed / 10)
        save_adapter(adapter, folder / name, base_model=str(tiny_sd))
    return folder / "a", folder / "b"


@pytest.mark.integration
@settings(max_examples=10, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2))
def test_weights_are_linear_in_every_strength(tiny_sd, two_adapters, first, second):
    a, b = two_adapters
    pipeline = load_pipeline(str(tiny_sd))
    adapted = AdaptedPipeline(pipeline, [a, b])
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    module = pipeline.unet.get_submodule(name)
    base, deltas = module.weight.clone(), {}
    for key, weighted in {"a": [(a, 1.0)], "b": [(b, 1.0)], "ab": [(a, first), (b, second)]}.items():
        adapted.use(weighted)
        deltas[key] = module.weight.detach() - base
    adapted.use([(b, second), (a, first)])
    torch.testing.assert_close(module.weight.detach() - base, deltas["ab"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(deltas["ab"], first * deltas["a"] + second * deltas["b"], atol=1e-5, rtol=1e-4)
    adapted.use([(a, 0.0)])
    assert torch.equal(module.weight, base), "strength 0 is the base model"
    adapted.use([])
    assert torch.equal(module.weight, base)


def test_export_of_two_adapters_in_one_file(tiny_sd, two_adapters, tmp_path, capsys):
    """The exported sum equals the sum of the updates; with truncation, each layer's printed error is correct."""
    a, b = map(str, two_adapters)
    flags = ["export", "--adapter", a, b, "--adapter_weights", "0.5", "1.5", "--format", "diffusers", "--output"]
    main([*flags, str(tmp_path / "exact.safetensors")])
    assert "exported without loss" in capsys.readouterr().out
    main([*flags, str(tmp_path / "truncated.safetensors"), "--rank", "4"])
    printed = dict(line.split()[::-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    pipeline = load_pipeline(str(tiny_sd))
    deltas = []
    for path in (a, b):
        adapter = load_adapter(pipeline.unet, path)
        deltas.append({name: adapter.delta_weight(name) for name in adapter.names})
        detach(pipeline.unet)
    exact, cut = (load_file(tmp_path / f"{name}.safetensors") for name in ("exact", "truncated"))
    assert len(printed) == len(deltas[0]) == 56
    for name in deltas[0]:
        expected = 0.5 * deltas[0][name] + 1.5 * deltas[1][name]
        up, down = (exact[f"unet.{name}.lora_{key}.weight"] for key in "BA")
        torch.testing.assert_close(up @ down, expected, atol=1e-5, rtol=1e-4)
        assert up.shape[1] == 12
        up, down = (cut[f"unet.{name}.lora_{key}.weight"] for key in "BA")
        assert up.shape[1] == 4
        measured = float((up @ down - expected).norm() / expected.norm())
        assert float(printed[f"unet.{name}"]) == pytest.approx(measured, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("start", ["zero", "frozen"])
def test_export_to_peft_delora(tiny_sd, tmp_path, start):
    """PEFT gives the same output with the exported folder; a frozen start becomes a zero start of twice the rank."""
    unet = load_pipeline(str(tiny_sd)).unet.eval()
    adapter = attach(unet, AdapterConfig(rank=3, start=start))
    randomize(adapter, 0.2)
    save_adapter(adapter, tmp_path / "a", base_model=str(tiny_sd))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 32))
    with torch.no_grad():
        expected = unet(*inputs).sample
    deltas = {name: adapter.delta_weight(name) for name in adapter.names}
    main(["export", "--adapter", str(tmp_path / "a"), "--format", "peft-delora", "--output", str(tmp_path / "p")])
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["peft_type"] == "DELORA" and config["r"] == (3 if start == "zero" else 6)
    wrapped = peft.PeftModel.from_pretrained(load_pipeline(str(tiny_sd)).unet.eval(), tmp_path / "p")
    with torch.no_grad():
        torch.testing.assert_close(wrapped(*inputs).sample, expected, atol=2e-5, rtol=1e-4)
    for name, delta in deltas.items():
        layer = wrapped.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=1e-6, rtol=1e-5)


def test_import_from_peft_delora(tiny_sd, tmp_path):
    """Importing a DeLoRA saved by PEFT gives the same update."""
    unet = load_pipeline(str(tiny_sd)).unet
    config = peft.DeloraConfig(r=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_weights=False)
    wrapped = peft.get_peft_model(unet, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lambda" in name:
                parameter.uniform_(0.5, 3)
    wrapped.save_pretrained(tmp_path / "p")
    flags = ["--pretrained_model_name_or_path", str(tiny_sd), "--output_dir", str(tmp_path / "a")]
    main(["import", "--peft_dir", str(tmp_path / "p"), *flags])
    adapter = load_adapter(load_pipeline(str(tiny_sd)).unet, tmp_path / "a")
    assert len(adapter.names) == 56 and adapter.config.start == "zero"
    for name in adapter.names:
        expected = wrapped.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(adapter.delta_weight(name), expected, atol=1e-6, rtol=1e-5)
    main(["export", "--adapter", str(tmp_path / "a"), "--format", "peft-delora", "--output", str(tmp_path / "again")])
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("p", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    flags[-1] = str(tmp_path / "none")
    for tensors, message in (
        ({}, "has no tensors"),
        (before | {"extra.weight": torch.ones(1)}, "the tensor extra.weight"),
    ):
        save_file(tensors, tmp_path / "p" / "adapter_model.safetensors")
        with pytest.raises(SystemExit, match=message):
            main(["import", "--peft_dir", str(tmp_path / "p"), *flags])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (AdapterConfig(rank=2, weight_norm="frobenius"), ["peft-delora"], "PEFT has only DeLoRA with the column scale"),
        (AdapterConfig(rank=2, method="lora"), ["peft-delora"], "is lora"),
        (AdapterConfig(rank=2), ["peft-delora", "--rank", "2"], "without --rank"),
        (AdapterConfig(rank=2, method="dora"), ["kohya"], "DoRA is not low-rank and cannot be stored as LoRA"),
        (AdapterConfig(rank=2), ["diffusers", "--rank", "0"], "--rank is 0"),
        (AdapterConfig(rank=2), ["diffusers", "--adapter_weights", "1", "2"], "2 for 1 --adapter; give one for each"),
    ],
)
def test_rejects_exports(unet, tmp_path, config, flags, message):
    save_adapter(attach(unet, config), tmp_path / "a", base_model="x")
    with pytest.raises(SystemExit, match=message):
        main(["export", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "o"), "--format", *flags])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_adapter_of_a_transformer(kind, tmp_path):
    """Its attention has other processors, so every linear layer gets its weight by parametrization."""
    model, inputs = transformer(kind)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    with torch.no_grad():
        base = model(**inputs).sample
    adapter = attach(model, AdapterConfig(rank=4, targets=targets), torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, base)
    randomize(adapter, 0.2)
    output = model(**inputs).sample
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    adapted_names = adapter.names
    save_adapter(adapter, tmp_path / "a", component="transformer")
    detach(model)
    loaded = load_adapter(model, tmp_path / "a", "transformer")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, output.detach())
    detach(model)
    assert len(loaded.names) == len(adapted_names) > 8
    with pytest.raises(SystemExit, match="records None as its pipeline class, .*; save it again with"):
        main(["export", "--adapter", str(tmp_path / "a"), "--format", "kohya", "--output", str(tmp_path / "k")])
    main(["export", "--adapter", str(tmp_path / "a"), "--format", "peft", "--output", str(tmp_path / "p")])
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "p")
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**inputs).sample, output.detach(), atol=1e-5, rtol=1e-4)
