"""Any low-rank update as a DeLoRA: unit vectors of equal weight, and the best low-rank factors of a matrix."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delora_diffusers.errors import InputError
from delora_diffusers.files.equal_weights import as_delora, best_factors, equal_columns
from delora_diffusers.files.low_rank import Factors
from delora_diffusers.methods.update import delora_factors


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=24), st.integers(0, 9))
def test_columns_of_any_singular_values_have_equal_norms(values, more):
    s, count = torch.tensor(values, dtype=torch.float64), len(values) + more
    x = equal_columns(s, count)
    torch.testing.assert_close(x @ x.mT, torch.diag(s), atol=1e-13 * max(values), rtol=0)
    torch.testing.assert_close(x.square().sum(dim=0), (s.sum() / count).expand(count), atol=0, rtol=1e-12)


def random_update(out: int, width: int, rank: int, seed: int) -> tuple[Factors, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g))
    return factors, 0.1 + torch.rand(width, generator=g)


def update_of(tensors, scale):
    stacked = {key: tensor[None] for key, tensor in tensors.items()}
    b, a = delora_factors(stacked["A"], stacked["B"], stacked["lambda"], None if scale is None else scale[None])
    return b[0] @ a[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 20), st.integers(6, 20), st.integers(1, 6), st.integers(0, 9), st.integers(0, 99))
def test_an_update_is_exact_with_unit_terms_of_equal_weight(out, width, rank, more, seed):
    factors, c = random_update(out, width, rank, seed)
    for scale in (c, torch.tensor(2.5), None):
        tensors = as_delora("m", factors, scale, rank + more, torch.Generator().manual_seed(seed))
        expected = factors.b @ factors.a
        difference = update_of(tensors, scale) - expected
        assert difference.norm() <= 2e-6 * expected.norm()
        # Independently of the library's formula: the sum of normalized outer products.
        a, b = tensors["A"].double(), tensors["B"].double()
        terms = [torch.outer(y / y.norm(), x / x.norm()) for x, y in zip(a, b.mT)]
        nuclear = torch.linalg.matrix_norm(expected.double() / (1 if scale is None else scale.double()), "nuc")
        total = float(tensors["lambda"]) / len(terms) * sum(terms)
        torch.testing.assert_close(total * (1 if scale is None else scale), expected.double(), atol=1e-4, rtol=1e-4)
        needed = (rank + more) / (rank + more % 2)
        assert float(tensors["lambda"]) == pytest.approx(float(nuclear) * needed, rel=1e-4)


@pytest.mark.parametrize(("rank", "more"), [(3, 0), (1, 6), (2, 5)])
def test_learning_goes_on_with_the_full_rank(rank, more):
    """Gradients are finite and not zero, and what Adam changes has the rank of the adapter, not that of the start."""
    factors, c = random_update(40, 30, rank, 0)
    tensors = as_delora("m", factors, c, rank + more, torch.Generator().manual_seed(0))
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in copy.deepcopy(tensors).items()}
    target = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    for step in range(20):
        (update_of(parameters, c) - target).square().sum().backward()
        for parameter in parameters.values():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
            rows = parameter.grad.abs().flatten(1).amax(1) if parameter.ndim else parameter.grad.abs()
            assert (rows > 0).all(), step
        optimizer.step()
        optimizer.zero_grad()
    values = torch.linalg.svdvals(update_of(parameters, c).detach() / c)
    assert int((values > 1e-2 * values[0]).sum()) >= rank + more - more % 2


def test_norms_are_those_of_a_new_adapter():
    factors, c = random_update(300, 200, 4, 0)
    tensors = as_delora("m", factors, c, 4, torch.Generator())
    new_a, new_b = torch.empty(999, 200).uniform_(-1, 1) / math.sqrt(200), torch.empty(300, 999).uniform_(-1, 1) / 2
    torch.testing.assert_close(tensors["A"].norm(dim=1), new_a.norm(dim=1).mean().expand(4), atol=0, rtol=0.02)
    torch.testing.assert_close(tensors["B"].norm(dim=0), new_b.norm(dim=0).mean().expand(4), atol=0, rtol=0.02)


def test_what_cannot_be_converted():
    factors, c = random_update(8, 9, 3, 0)
    generator = torch.Generator()
    with pytest.raises(InputError, match="the update of m has rank 3, more than --rank 2; give --rank 3"):
        as_delora("m", factors, c, 2, generator)
    c[5] = 0
    with pytest.raises(InputError, match="m changes column 5 of its weight, which is zero .* --weight_norm frobenius"):
        as_delora("m", factors, c, 3, generator)
    factors.a[:, 5] = 0
    tensors = as_delora("m", factors, c, 3, generator)
    torch.testing.assert_close(update_of(tensors, c), factors.b @ factors.a, atol=1e-5, rtol=1e-5)
    assert as_delora("m", Factors(torch.zeros(8, 3), factors.a), c, 3, generator) == {}
    factors, c = random_update(8, 9, 3, 0)
    c[2] = 1e-9
    with pytest.raises(InputError, match="m cannot be stored as DeLoRA in float32 .relative error"):
        as_delora("m", factors, c, 3, generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))
def test_best_factors_of_a_matrix(out, width, rank, seed):
    matrix = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    rank = min(rank, out, width)
    factors, error = best_factors(matrix, rank)
    values = torch.linalg.svdvals(matrix.double())
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-7)
    assert factors.rank == rank
    measured = (matrix - factors.b @ factors.a).norm() / matrix.norm()
    assert float(measured) == pytest.approx(error, abs=1e-5)
