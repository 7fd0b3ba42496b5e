"""DeLoRA's update compared with a float64 formula and PEFT's layer; gradcheck and properties."""

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.delora.layer import DeloraLinear

from delora_diffusers.methods import update
from delora_diffusers.methods.config import RELATIVE_BOUND, AdapterConfig
from delora_diffusers.methods.functions import low_rank_functions, method_functions


def formula(a, b, lam, scale, a0=None, b0=None) -> np.ndarray:
    """``(lambda / r) (B Xi A - B0 Xi0 A0) * c`` of one matrix, rank-1 term by rank-1 term, in float64."""

    def product(a, b):
        total = np.zeros((b.shape[0], a.shape[1]))
        for i in range(len(a)):
            total += np.outer(b[:, i], a[i]) / (np.linalg.norm(b[:, i]) * np.linalg.norm(a[i]))
        return total

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    delta = product(a, b)
    if a0 is not None:
        delta = delta - product(np.asarray(a0, np.float64), np.asarray(b0, np.float64))
    return float(lam) / len(a) * delta * scale


def random_stack(n=3, out=12, inp=10, r=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    names = {"weight": (n, out, inp), "a": (n, r, inp), "b": (n, out, r), "a0": (n, r, inp), "b0": (n, out, r)}
    return {name: torch.randn(shape, generator=g) for name, shape in names.items()} | {
        "lam": torch.rand(n, generator=g) * 5 + 0.1
    }


@pytest.mark.parametrize("kind", ["column", "frobenius", "none"])
@pytest.mark.parametrize("start", ["frozen", "zero"])
def test_delta_matches_the_papers_formula(kind, start):
    t = random_stack()
    frozen = {"a0": t["a0"], "b0": t["b0"]} if start == "frozen" else {}
    c = update.weight_norm(t["weight"], kind)
    b, a = update.delora_factors(t["a"], t["b"], t["lam"], c, **frozen)
    for i in range(3):
        w = t["weight"][i].double().numpy()
        scale = {"column": np.linalg.norm(w, axis=0)[None], "frobenius": np.linalg.norm(w), "none": 1.0}[kind]
        expected = formula(t["a"][i], t["b"][i], t["lam"][i], scale, *(frozen[k][i] for k in frozen))
        np.testing.assert_allclose((b @ a)[i].numpy(), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(update.frobenius_norm(b, a), (b @ a).norm(dim=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
def test_delta_matches_peft(zero):
    torch.manual_seed(0)
    linear = torch.nn.Linear(10, 12, bias=False)
    layer = DeloraLinear(linear, "default", peft.DeloraConfig(r=4, init_weights=zero), r=4, delora_lambda=7.0)
    with torch.no_grad():
        layer.delora_B["default"].add_(0.0 if zero else 0.3)
    a, b, lam = (getattr(layer, f"delora_{k}")["default"][None] for k in ("A", "B", "lambda"))
    c = update.weight_norm(linear.weight[None], "column")
    b_tilde, a_tilde = update.delora_factors(a, b, lam[0], c)
    torch.testing.assert_close((b_tilde @ a_tilde)[0], layer.get_delta_weight("default"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["column", "frobenius", "none"])
@pytest.mark.parametrize("start", ["frozen", "zero"])
def test_gradcheck(kind, start):
    t = {k: v.double() for k, v in random_stack(n=2, out=5, inp=4, r=2).items()}
    c = update.weight_norm(t["weight"], kind)
    c = None if c is None else c.double()
    frozen = (t["a0"], t["b0"]) if start == "frozen" else (None, None)

    def adapted(a, b, lam):
        return update.materialize(t["weight"], *update.delora_factors(a, b, lam, c, *frozen))

    inputs = tuple(t[k].requires_grad_() for k in ("a", "b", "lam"))
    assert torch.autograd.gradcheck(adapted, inputs)


@settings(max_examples=60, deadline=None)
@given(
    scale_a=st.floats(1e-30, 1e18),
    scale_b=st.floats(1e-30, 1e18),
    lam=st.floats(0, 1e3),
    rank=st.integers(1, 6),
    start=st.sampled_from(["frozen", "zero"]),
    has_zero_vectors=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_bound_holds_for_any_a_and_b(scale_a, scale_b, lam, rank, start, has_zero_vectors, seed):
    t = random_stack(n=2, r=rank, seed=seed)
    a, b = t["a"] * scale_a, t["b"] * scale_b
    if has_zero_vectors:
        a[:, 0], b[0] = 0, 0
    a.requires_grad_(), b.requires_grad_()
    c = update.weight_norm(t["weight"], "column")
    frozen = {"a0": t["a0"], "b0": t["b0"]} if start == "frozen" else {}
    b_tilde, a_tilde = update.delora_factors(a, b, torch.full((2,), lam), c, **frozen)
    delta = b_tilde @ a_tilde
    bound = (2 if start == "frozen" else 1) * lam * c.max(dim=1).values
    assert (delta.norm(dim=(1, 2)) <= bound * (1 + 1e-4) + 1e-20).all()
    delta.square().sum().backward()
    # A vector v scaled by 1 / max(|v|, MIN_NORM) multiplies its gradient by at most 1 / MIN_NORM.
    # Checked in float64 because the norm of a tiny float32 tensor underflows.
    limit = 1 / update.MIN_NORM * 2 * delta.double().norm(dim=(1, 2)) * (lam / rank) * c.max(dim=1).values * 2
    for gradient in (a.grad, b.grad):
        assert gradient is not None and torch.isfinite(gradient).all()
        assert (gradient.double().flatten(1).norm(dim=1) <= limit * rank * (1 + 1e-4) + 1e-20).all()


def test_bound_holds_after_any_optimizer_steps():
    t = random_stack()
    config = AdapterConfig(rank=4)
    trainable, fixed = method_functions("delora").initialize(t["weight"], config, torch.Generator().manual_seed(0))
    parameters = {k: torch.nn.Parameter(v) for k, v in trainable.items()}
    optimizer = torch.optim.SGD([parameters["A"], parameters["B"]], lr=1e4)
    target = torch.randn(t["weight"].shape)
    for _ in range(20):
        w = method_functions("delora").adapted_weight(t["weight"], parameters | fixed, config)
        (w - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        b, a = low_rank_functions("delora").factors(parameters | fixed, config)
        bound = 2 * parameters["lambda"] * fixed["w_norm"].max(dim=1).values
    assert ((b @ a).norm(dim=(1, 2)) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings_", [{"start": "frozen"}, {"start": "zero"}, {"method": "lora"}])
def test_starts_at_the_pretrained_weight_exactly(dtype, settings_):
    weight = random_stack()["weight"].to(dtype)
    config = AdapterConfig(rank=4, **settings_)
    method = method_functions(config.method)
    trainable, fixed = method.initialize(weight, config, torch.Generator().manual_seed(0))
    assert all(t.dtype == torch.float32 for t in (trainable | fixed).values())
    assert torch.equal(method.adapted_weight(weight, trainable | fixed, config), weight)


def test_default_lambda_bounds_the_relative_size_at_any_width():
    for kind in ("column", "frobenius", "none"):
        for width in (16, 256):
            weight = torch.randn(1, width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
            config = AdapterConfig(rank=8, weight_norm=kind, start="zero")
            trainable, fixed = method_functions("delora").initialize(weight, config, torch.Generator().manual_seed(0))
            trainable["B"] = torch.randn(trainable["B"].shape)
            b, a = low_rank_functions("delora").factors(trainable | fixed, config)
            ratio = (b @ a).norm() / weight.norm()
            # r random directions are nearly orthogonal: about 1 / sqrt(r) of the bound, and never above it.
            assert ratio / RELATIVE_BOUND * 8**0.5 > 0.7 and ratio < 1.03 * RELATIVE_BOUND
