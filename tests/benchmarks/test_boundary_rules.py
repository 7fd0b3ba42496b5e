"""The rules for the boundary of a new model: their probes on tiny models, and predictions against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import boundary_rules
from benchmarks.boundary_rules import (
    RULES,
    Quantity,
    adapted_weights,
    compare,
    growing,
    measure,
    predicted,
    proportional,
    randomize,
    relative_changes,
    report,
    spread,
    weight_factors,
)
from data.tiny_pipelines import write
from delora_diffusers import AdapterConfig, attach
from delora_diffusers.methods.config import UNET_TARGETS


@given(st.floats(0.2, 3), st.floats(0.01, 10), st.floats(0.02, 1), st.floats(0.001, 100))
def test_a_power_of_the_bound_is_inverted_exactly(power, scale, bound, value):
    bounds = np.geomspace(0.0125, 1.6, 8)
    quantity = Quantity(bounds, scale * bounds**power)
    assert quantity.at(bound) == pytest.approx(scale * bound**power)
    assert quantity.bound_with(value) == pytest.approx((value / scale) ** (1 / power))


def test_a_saturated_probe_is_used_up_to_its_maximum():
    quantity = growing([0.1, 0.2, 0.4, 0.8], [1.0, 3.0, 2.0, 3.5])
    assert quantity.bounds.tolist() == [0.1, 0.2, 0.8] and quantity.values.tolist() == [1.0, 3.0, 3.5]


def test_a_rule_that_holds_predicts_every_model():
    """Knees at the same lambda in models of three widths: that rule is exact, the relative bound is not."""
    widths = {"a": 100, "b": 400, "c": 900}
    knee = {model: 1.5 / math.sqrt(width) for model, width in widths.items()}
    pairs = predicted({model: proportional(math.sqrt(width)) for model, width in widths.items()}, knee)
    assert [(r, m) for r, m, _ in pairs] == [(r, m) for r in "abc" for m in "abc" if r != m]
    assert spread(pairs, knee) == pytest.approx(0, abs=1e-12)
    wrong = predicted({model: proportional(1.0) for model in widths}, knee)
    logs = [math.log(knee[r] / knee[m]) for r in widths for m in widths if r != m]
    assert spread(wrong, knee) == pytest.approx(np.std(logs))


def test_factors_of_the_weights():
    weights = [torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2, 8)]
    factors = weight_factors(weights)
    assert factors["lambda"] == pytest.approx((2 * 8) ** 0.25)
    # |W|_2 over the largest column norm: 3 / 3, and sqrt(16) / sqrt(2).
    assert factors["spectral"] == pytest.approx((math.sqrt(2) * math.sqrt(8) / math.sqrt(8)) ** 0.5)


def test_relative_changes():
    base = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    everything_louder = relative_changes(1.5 * base, base)
    assert everything_louder == pytest.approx({"prediction": 0.5, "prompt": 0.5})
    shift = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(1))  # the same for every prompt
    shifted = relative_changes(base + shift, base)
    assert shifted["prompt"] == pytest.approx(0, abs=1e-6) and shifted["prediction"] > 0.1


@pytest.fixture(scope="module")
def tiny_unet(tiny_sd):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")


def test_random_updates_are_as_large_as_the_weights(tiny_unet):
    config = AdapterConfig(rank=4, start="zero", relative_bound=1.0)
    weights = [weight.clone() for weight in adapted_weights(tiny_unet, UNET_TARGETS)]
    adapter = attach(tiny_unet, config, torch.Generator().manual_seed(0))
    for seed in (1, 2):
        randomize(adapter, torch.Generator().manual_seed(seed))
        norms = {name: float(module.weight.norm()) for name, module, _ in adapter.sites()}
        assert len(norms) == len(weights) and adapter.distances() == pytest.approx(norms, rel=1e-5)


@pytest.mark.integration
def test_probes_on_tiny_models(tiny_sd, tmp_path, monkeypatch):
    """Deterministic, growing with the bound, proportional to it where it is small; and the report of two models."""
    monkeypatch.setattr(boundary_rules, "DRAWS", 1)
    sd3 = write(tmp_path / "sd3", "sd3")
    quantities = {name: measure(str(path), "cpu") for name, path in (("sd", tiny_sd), ("sd3", sd3))}
    again = measure(str(sd3), "cpu")
    for rule in RULES:
        assert again[rule].values.tolist() == quantities["sd3"][rule].values.tolist(), rule
    for by_rule in quantities.values():
        for rule in ("prediction", "prompt"):
            quantity = by_rule[rule]
            assert len(quantity.values) >= 4 and (np.diff(quantity.values) > 0).all()
            assert quantity.values[1] / quantity.values[0] == pytest.approx(2, rel=0.1)
    knee = {"clip_t": (0.2, 0.1, 0.3), "dino": (0.1, 0.1, 0.1)}
    result = compare(quantities, {"sd": knee, "sd3": knee})
    assert result["clip_t"]["rules"]["bound"]["spread"] == pytest.approx(0, abs=1e-9)
    text = report(result)
    assert "| measured |  |  | 0.200 [0.100, 0.300] | 0.200 [0.100, 0.300] |" in text
    assert all(f"| {title} |" in text for title in RULES.values())
