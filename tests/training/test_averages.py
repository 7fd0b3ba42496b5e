"""Averages of the weights against their formulas, and that they reach the model, the files and nothing else."""

import pytest
import schedulefree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from delora_diffusers import AdapterConfig, attach
from delora_diffusers.training.ema import WeightAverage


def plain(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.9999), st.integers(1, 60), st.integers(0, 2**16))
def test_the_moving_average_is_that_of_the_formula(decay, steps, seed):
    """s_1 = p_1, then s_t = d_t s + (1 - d_t) p_t with d_t = min(decay, t / (9 + t)), where t is one less than the
    number of updates."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(()))]
    average = WeightAverage(parameters, [], plain(parameters), decay)
    expected = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for update in range(steps):
        factor = min(decay, (1 + update) / (10 + update)) if update else 0.0
        for index, parameter in enumerate(parameters):
            parameter.data = torch.randn(parameter.shape, generator=generator)
            expected[index] = factor * expected[index] + (1 - factor) * parameter.detach().double()
        average.update()
    with average.applied():
        for parameter, value in zip(parameters, expected):
            torch.testing.assert_close(parameter.double(), value, atol=1e-5, rtol=1e-5)


def test_the_average_of_a_schedule_free_optimizer_is_x():
    """Against the three sequences of Defazio et al. (2024), equations 1 to 3, in float64, with Adam's denominator."""
    rate, beta, beta2, steps = 0.02, 0.9, 0.99, 12
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer = schedulefree.AdamWScheduleFree([parameter], lr=rate, betas=(beta, beta2), eps=1e-8)
    average = WeightAverage([parameter], [], optimizer)
    x = z = start.double()
    second = torch.zeros(5, dtype=torch.float64)
    for step in range(1, steps + 1):
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(parameter.detach().double(), y, atol=1e-5, rtol=1e-5)
        gradient = y.sin() + 0.1
        second = beta2 * second + (1 - beta2) * gradient.square()
        z = z - rate * gradient / ((second / (1 - beta2**step)).sqrt() + 1e-8)
        x = x + (z - x) / step
        parameter.grad = parameter.detach().sin() + 0.1
        optimizer.step()
        average.update()
    before = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach().double(), x, atol=1e-5, rtol=1e-5)
    assert torch.equal(parameter, before) and not torch.allclose(before.double(), x, atol=1e-4)
    optimizer.step()  # it still trains
    average.apply()
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("kind", ["ema", "schedule-free"])
def test_the_model_computes_with_the_average_and_then_with_the_weights_again(unet, unet_inputs, kind):
    adapter = attach(unet, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
    parameters = list(adapter.parameters())
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.1) if kind != "ema" else plain(parameters)
    average = WeightAverage(parameters, [adapter], optimizer, 0.5 if kind == "ema" else None)
    for scale in (1, 3, -2):
        for parameter in parameters:
            parameter.grad = scale * torch.sign(parameter.detach()) + parameter.detach()
        optimizer.step()
        average.update()
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        trained = unet(*unet_inputs).sample
        with average.applied():
            averaged, distances = unet(*unet_inputs).sample, adapter.all_distances()
        assert torch.equal(unet(*unet_inputs).sample, trained) and not torch.equal(averaged, trained)
        with pytest.raises(KeyError), average.applied():
            raise KeyError
        assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before))
        average.apply()
        torch.testing.assert_close(unet(*unet_inputs).sample, averaged)
        torch.testing.assert_close(adapter.all_distances(), distances)


def test_the_average_of_constrained_rotations_is_constrained(unet):
    adapter = attach(unet, AdapterConfig(method="oft", blocks=2, coft_eps=1e-3), torch.Generator().manual_seed(0))
    parameters = list(adapter.parameters())
    average = WeightAverage(parameters, [adapter], plain(parameters), 0.9)
    assert average.ema is not None
    average.ema.shadow_params = [torch.ones_like(parameter) for parameter in parameters]
    with average.applied():
        constrained = [parameter.detach().clone() for parameter in parameters]
        adapter.constrain()
        for parameter, once in zip(parameters, constrained):
            torch.testing.assert_close(parameter.detach(), once)
            assert once.abs().max() < 1


def test_without_an_average_nothing_is_copied():
    parameter = nn.Parameter(torch.ones(3))
    average = WeightAverage([parameter], [], plain([parameter]))
    version = parameter._version
    average.update()
    with average.applied():
        pass
    average.apply()
    assert parameter._version == version and average.ema is None
