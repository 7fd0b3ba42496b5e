"""The training of the miniature family."""

import torch

from data.miniature.training.steps import train


def test_averaged_weights_of_a_short_training_forget_the_initialization():
    layer = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 50.0)
    target = torch.tensor([[1.0, -2.0, 3.0, 0.5]])

    def distance():
        return (layer.weight - target).square().sum()

    steps = train([layer], distance, rate=1.0, steps=300, warmup=10, weight_decay=0, ema=0.999)
    assert steps == 300
    assert torch.allclose(layer.weight, target, atol=0.05)
