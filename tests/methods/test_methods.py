"""Each method compared with its float64 formula and PEFT's layers; gradients, bounds, ranks and parameter counts."""

import math

import numpy as np
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.train_step import SHAPES
from delora_diffusers import AdapterConfig, InputError, attach, detach, load_adapter, merge, save_adapter
from delora_diffusers.methods.config import MAP_TARGETS
from delora_diffusers.methods.functions import method_functions
from delora_diffusers.methods.table import METHODS
from tests.helpers import fixed_loss, randomize, run_in_child, train, training_flags

OUT, IN, RANK, BLOCKS = 12, 8, 3, 2
REFLECTIONS = ("ether", "etherplus", "etherplus_onesided")
RELAXATIONS = ("delora_symmetric", "delora_multiplicative")


def make_config(method: str, **settings) -> AdapterConfig:
    blocks = BLOCKS if method in (*REFLECTIONS, "oft") else None
    targets = ("*",) if method == "full" else ("to_q", "to_k", "to_v", "to_out.0")
    return AdapterConfig(method=method, **{"rank": RANK, "blocks": blocks, "targets": targets} | settings)


def random_state(method: str, n: int = 2, seed: int = 0, scale: float = 0.3, **more):
    """A random float64 weight (n, OUT, IN) and a method's tensors, moved away from their initial values."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, OUT, IN, generator=g, dtype=torch.float64)
    config = make_config(method, **more)
    trainable, fixed = method_functions(method).initialize(weight, config, g)
    noise = {k: torch.randn(t.shape, generator=g, dtype=torch.float64) for k, t in trainable.items()}
    moved = {k: t.double() + scale * noise[k] for k, t in trainable.items()}
    return config, weight, moved, {k: t.double() for k, t in fixed.items()}


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    matrix = np.zeros((sum(len(b) for b in blocks),) * 2)
    start = 0
    for b in blocks:
        matrix[start : start + len(b), start : start + len(b)] = b
        start += len(b)
    return matrix


def reflection(vectors, others=None) -> np.ndarray:
    """``I - 2 u u^T``, or ``I - u u^T + v v^T``, block by block."""
    blocks = []
    for i, u in enumerate(vectors):
        outer = np.outer(unit(u), unit(u))
        plus = -outer if others is None else np.outer(unit(others[i]), unit(others[i]))
        blocks.append(np.eye(len(u)) - outer + plus)
    return block_diagonal(blocks)


def formula(config: AdapterConfig, w: np.ndarray, t: dict[str, np.ndarray]) -> np.ndarray:
    """W' of one matrix, by the papers' formulas."""
    method = config.method
    if method == "full":
        return t["W"]
    if method in ("lora", "dora", "dora_fixed_magnitude"):
        v = w + 2 * t["B"] @ t["A"]  # alpha is twice the rank
        if method == "lora":
            return v
        return np.stack([m * unit(row) for m, row in zip(t["magnitude"], v)])
    if method == "oft":
        blocks = []
        for upper in t["Q"]:
            q = np.zeros((IN // BLOCKS,) * 2)
            q[np.triu_indices(IN // BLOCKS, 1)] = upper
            q -= q.T
            blocks.append((np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q))
        return w @ block_diagonal(blocks).T
    if method in REFLECTIONS:
        reflected = w @ reflection(t["u"], t.get("v"))
        return reflection(t["u2"], t["v2"]) @ reflected if method == "etherplus" else reflected
    if method == "delora_symmetric":
        bracket = sum(
            np.outer(unit(t["U"][:, i]), unit(t["U"][:, i])) - np.outer(unit(t["V"][:, i]), unit(t["V"][:, i]))
            for i in range(config.rank)
        )
    elif method == "delora_multiplicative":
        bracket = sum(
            np.outer(unit(t["B"][:, i]), unit(t["A"][i])) - np.outer(unit(t["D"][:, i]), unit(t["C"][i]))
            for i in range(config.rank)
        )
    else:
        bracket = None
    if bracket is not None:
        return w + float(t["lambda"]) / config.rank * w @ bracket
    column = np.linalg.norm(w, axis=0)
    terms = [np.outer(unit(t["B"][:, i]), unit(t["A"][i])) for i in range(config.rank)]
    frozen = [np.outer(unit(t["B0"][:, i]), unit(t["A0"][i])) for i in range(config.rank)]
    return w + float(t["lambda"]) / config.rank * (sum(terms) - sum(frozen)) * column


@pytest.mark.parametrize("method", METHODS)
def test_adapted_weight_matches_the_papers_formula(method):
    config, weight, trainable, fixed = random_state(method)
    adapted = method_functions(method).adapted_weight(weight, trainable | fixed, config)
    for i in range(len(weight)):
        tensors = {key: tensor[i].numpy() for key, tensor in (trainable | fixed).items()}
        # The fixed norms are computed in float32.
        np.testing.assert_allclose(adapted[i].numpy(), formula(config, weight[i].numpy(), tensors), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_starts_at_the_pretrained_weight_exactly(method, dtype):
    weight = torch.randn(2, OUT, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = make_config(method)
    trainable, fixed = method_functions(method).initialize(weight, config, torch.Generator().manual_seed(0))
    assert all(t.dtype == torch.float32 for t in (trainable | fixed).values())
    start = method_functions(method).adapted_weight(weight, trainable | fixed, config)
    assert start.dtype == dtype
    if method == "ether":  # a reflection is never the identity
        assert not torch.equal(start, weight)
    else:
        assert torch.equal(start, weight)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("dora")])
def test_gradcheck(method):
    config, weight, trainable, fixed = random_state(method)
    keys = list(trainable)

    def adapted(*tensors):
        return method_functions(method).adapted_weight(weight, dict(zip(keys, tensors)) | fixed, config)

    assert torch.autograd.gradcheck(adapted, tuple(t.requires_grad_() for t in trainable.values()))


def test_dora_matches_pefts_forward_and_gradients():
    """The gradient is not that of the formula: DoRA treats the norm as a constant, here and in PEFT."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    weight = model[0].weight.detach().clone()
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], use_dora=True, init_lora_weights=False)
    layer = peft.inject_adapter_in_model(lora, model)[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(1.3)
    tensors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight, "magnitude": magnitude}
    peft_parameters = list(tensors.values())
    tensors = {key: tensor.detach()[None].clone().requires_grad_() for key, tensor in tensors.items()}
    adapted = method_functions("dora").adapted_weight(weight[None], tensors, make_config("dora"))[0]
    x = torch.randn(5, IN)
    expected = layer(x)
    torch.testing.assert_close(torch.nn.functional.linear(x, adapted, layer.base_layer.bias), expected)
    gradients = torch.autograd.grad(expected.square().sum(), peft_parameters)
    torch.nn.functional.linear(x, adapted, layer.base_layer.bias).square().sum().backward()
    for tensor, gradient in zip(tensors.values(), gradients):
        torch.testing.assert_close(tensor.grad[0], gradient, atol=1e-4, rtol=1e-4)


def test_oft_matches_peft():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    weight = model[0].weight.detach().clone()
    oft = peft.OFTConfig(r=BLOCKS, oft_block_size=0, target_modules=["0"], use_cayley_neumann=False)
    layer = peft.inject_adapter_in_model(oft, model)[0]
    upper = layer.oft_R["default"].weight
    with torch.no_grad():
        upper.normal_(std=0.5)
    adapted = method_functions("oft").adapted_weight(weight[None], {"Q": upper.detach()[None]}, make_config("oft"))[0]
    x = torch.randn(5, IN)
    torch.testing.assert_close(torch.nn.functional.linear(x, adapted, layer.base_layer.bias), layer(x))


def coft_by_official_definition(weight: torch.Tensor, batches, target, eps: float | None, rate: float) -> torch.Tensor:
    """W' after training as OFT's layer defines it: a full matrix per block, projected before every forward."""
    width = weight.shape[1]
    size = width // BLOCKS
    full = torch.zeros(BLOCKS, size, size, dtype=weight.dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([full], lr=rate)

    def adapted() -> torch.Tensor:
        pieces = []
        for block in range(BLOCKS):
            with torch.no_grad():
                norm = full[block].norm()
                if eps is not None and norm > eps * size * size / math.sqrt(BLOCKS):
                    full[block] *= eps * size * size / math.sqrt(BLOCKS) / norm
            skew = (full[block] - full[block].T) / 2
            rotation = (torch.eye(size) - skew) @ torch.linalg.inv(torch.eye(size) + skew)
            pieces.append((rotation @ weight.T[block * size : (block + 1) * size]).T)
        return torch.cat(pieces, dim=1)

    for x in batches:
        (x @ adapted().T - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted().detach()


@pytest.mark.parametrize("eps", [None, 3e-3])
def test_oft_trains_as_the_official_layer_with_and_without_the_constraint(eps):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(IN, OUT, bias=False)})
    model["to_q"].weight.data = torch.randn(OUT, IN, generator=generator) / math.sqrt(IN)
    weight, target = model["to_q"].weight.detach().clone(), torch.randn(OUT, IN, generator=generator) / math.sqrt(IN)
    batches = [torch.randn(8, IN, generator=generator) for _ in range(80)]
    config = AdapterConfig(method="oft", blocks=BLOCKS, coft_eps=eps, targets=("to_q",))
    adapter = attach(model, config, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-2)
    for x in batches:
        adapter.refresh()
        (model["to_q"](x) - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.constrain()
    expected = coft_by_official_definition(weight, batches, target, eps, 1e-2)
    torch.testing.assert_close(adapter.weight("to_q"), expected, atol=1e-5, rtol=1e-5)
    free = coft_by_official_definition(weight, batches, target, None, 1e-2)
    assert (eps is None) == torch.allclose(expected, free, atol=1e-2), "the constraint has no effect"


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("ether", 1),
        ("etherplus_onesided", 2),
        ("etherplus", 4),
        ("delora_symmetric", 2 * RANK),
        ("delora_multiplicative", 2 * RANK),
        ("lora", RANK),
        ("delora", 2 * RANK),
    ],
)
def test_rank_of_the_update(method, rank):
    config, weight, trainable, fixed = random_state(method, blocks=1 if method in REFLECTIONS else None)
    update = method_functions(method).adapted_weight(weight, trainable | fixed, config) - weight
    assert torch.linalg.matrix_rank(update).tolist() == [rank, rank]
    if method == "delora":
        config = make_config(method, start="zero")
        update = (
            method_functions(method).adapted_weight(weight, trainable | {"w_norm": fixed["w_norm"]}, config) - weight
        )
        assert torch.linalg.matrix_rank(update).tolist() == [RANK, RANK]


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from([*REFLECTIONS, *RELAXATIONS, "oft", "dora_fixed_magnitude"]),
    scale=st.floats(1e-6, 1e6),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**20),
)
def test_bounds_hold_for_all_parameters(method, scale, bound, seed):
    config, weight, trainable, fixed = random_state(method, seed=seed, scale=scale)
    if "lambda" in trainable:
        trainable["lambda"] = torch.full_like(trainable["lambda"], bound)
    # Applied to the identity, the method gives the transformation itself.
    square = torch.eye(IN, dtype=torch.float64).expand(2, IN, IN)
    if method == "dora_fixed_magnitude":
        adapted = method_functions(method).adapted_weight(weight, trainable | fixed, config)
        torch.testing.assert_close(adapted.norm(dim=-1), fixed["magnitude"], atol=1e-9, rtol=1e-9)
        return
    onesided = {key: t for key, t in trainable.items() if not key.endswith("2")}
    change = method_functions(method).adapted_weight(square, onesided, config) - square
    if method == "oft":
        rotation = change + square
        torch.testing.assert_close(rotation @ rotation.mT, square.contiguous(), atol=1e-6, rtol=0)
    elif method == "ether":
        distance = change.unflatten(-1, (BLOCKS, -1)).unflatten(-3, (BLOCKS, -1)).square().sum(dim=(-3, -1)).sqrt()
        diagonal = torch.diagonal(distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, torch.full_like(diagonal, 2.0))
    elif method in REFLECTIONS:
        assert (change.norm(dim=(1, 2)) <= math.sqrt(2 * BLOCKS) * (1 + 1e-9)).all()
    else:
        assert (change.norm(dim=(1, 2)) <= 2 * bound * (1 + 1e-9)).all()


PAPERS_COUNTS = {  # "maps" with the targets of maps; OFT counts the triangles of its skew-symmetric blocks
    "etherplus": (AdapterConfig(method="etherplus"), 0.4),
    "lora r=4": (AdapterConfig(method="lora", rank=4), 0.8),
    "lora r=16": (AdapterConfig(method="lora", rank=16), 3.2),
    "oft n=4": (AdapterConfig(method="oft"), 11.6),
    "delora r=16": (AdapterConfig(rank=16), 3.2),
    "dora r=16": (AdapterConfig(method="dora", rank=16), 3.3),  # the paper's 3.2 leaves its magnitudes out
    "dora r=16, without magnitudes": (AdapterConfig(method="dora_fixed_magnitude", rank=16), 3.2),
    "full": (AdapterConfig(method="full", targets=("*",)), 859.5),
    "oft n=4, constrained": (AdapterConfig(method="oft", coft_eps=6e-5), 11.6),
    "maps, oft n=4": (AdapterConfig(method="oft", targets=MAP_TARGETS), 13.1),
    "maps, oft n=4, both feed-forward projections": (
        AdapterConfig(method="oft", targets=(*MAP_TARGETS, "ff.net.2")),
        37.9,
    ),
}


@pytest.mark.parametrize("name", PAPERS_COUNTS)
def test_parameter_counts_match_the_paper(name):
    """Table 3, and OFT's control code for maps: millions of parameters for Stable Diffusion 1.5."""
    config, millions = PAPERS_COUNTS[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES["sd15"])
    adapter = attach(unet, config, torch.Generator().manual_seed(0))
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == millions


def test_symmetric_relaxation_starts_at_the_boundary_of_one_sided_etherplus():
    """A row of the ablation changes one thing: at rank 1 the boundary starts at ETHER+'s and becomes learnable."""
    weight = torch.randn(3, 10, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relaxed, ether = AdapterConfig(method="delora_symmetric", rank=1), AdapterConfig(method="etherplus_onesided")
    tensors, _ = method_functions("delora_symmetric").initialize(weight, relaxed, torch.Generator().manual_seed(1))
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    tensors["U"] = torch.randn(3, 14, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vectors = {"u": tensors["V"].mT, "v": tensors["U"].mT}
    fixed = method_functions("etherplus_onesided").adapted_weight(weight, vectors, ether)
    torch.testing.assert_close(method_functions("delora_symmetric").adapted_weight(weight, tensors, relaxed), fixed)
    doubled = method_functions("delora_symmetric").adapted_weight(
        weight, tensors | {"lambda": 2 * tensors["lambda"]}, relaxed
    )
    torch.testing.assert_close(doubled - weight, 2 * (fixed - weight))


@pytest.mark.parametrize("method", METHODS)
def test_unet_with_each_method(unet, unet_inputs, tmp_path, method):
    """Attach, save, load, set half strength, merge and detach work the same for every method."""
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.no_grad():
        base = unet(*unet_inputs).sample
    adapter = attach(unet, make_config(method), torch.Generator().manual_seed(0))
    if method != "ether":
        torch.testing.assert_close(unet(*unet_inputs).sample, base, atol=1e-5, rtol=1e-4)
    randomize(adapter)
    with torch.no_grad():
        adapted = unet(*unet_inputs).sample
    assert (adapted - base).abs().max() > 1e-3
    name = adapter.names[3]
    assert adapter.distances()[name] == pytest.approx(float(adapter.delta_weight(name).norm()), rel=1e-3)
    file = save_adapter(adapter, tmp_path)
    detach(unet)
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())

    adapter = load_adapter(unet, file)
    delta = adapter.delta_weight(name)
    adapter.strength = 0.5
    half = adapter.weight(name) - before[name if name in before else f"{name}.weight"]
    torch.testing.assert_close(half, 0.5 * delta, atol=1e-5, rtol=1e-4)
    adapter.strength = 1.0
    with torch.no_grad():
        torch.testing.assert_close(unet(*unet_inputs).sample, adapted)
        merge(unet)
        torch.testing.assert_close(unet(*unet_inputs).sample, adapted, atol=1e-4, rtol=1e-3)


@pytest.mark.integration
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("delora", "lora")])
def test_each_method_learns(tiny_sd, photographs, tmp_path, method):
    rate = {"full": 3e-4, "oft": 3e-3}.get(method, 2e-2)
    flags = ["--method", method, "--max_train_steps", 60, "--learning_rate", rate, "--train_batch_size", 2]
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "out", *flags))
    before, after = fixed_loss(tiny_sd, photographs, tmp_path / "out")
    assert after < 0.97 * before


def test_invalid_arguments(unet):
    with pytest.raises(InputError, match="blocks is 7, which does not divide a projection of width 32"):
        attach(unet, AdapterConfig(method="oft", blocks=7))
    with pytest.raises(InputError, match=r"coft_eps is 6e-05, but LoRA has no such constraint; leave it out"):
        AdapterConfig(method="lora", coft_eps=6e-5)
    with pytest.raises(InputError, match="path is 'split', which DoRA does not support; use 'fast' or 'auto'"):
        AdapterConfig(method="dora", path="split")
    with pytest.raises(InputError, match=r"targets is \*, but DeLoRA adapts linear modules"):
        AdapterConfig(targets=("*",))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("weight_norm", ["column", "frobenius", "none"])
def test_every_method_attaches_to_a_model_without_values(unet, method, weight_norm):
    """So training scripts find what does not fit a model before they load it."""
    skeleton = unet.to("meta")
    adapter = attach(skeleton, make_config(method, weight_norm=weight_norm))
    assert all(parameter.is_meta for parameter in adapter.parameters())
