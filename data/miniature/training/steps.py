"""Training with each step as a CUDA graph: for networks this small, kernel launches would dominate the time."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Schedule:
    """Warm-up, then cosine decay to zero over the given steps or seconds, whichever ends first."""

    def __init__(self, rate: float, steps: int, seconds: float | None, warmup: int):
        self.rate, self.steps, self.seconds, self.warmup = rate, steps, seconds, warmup
        self.start = time.monotonic()

    def progress(self, step: int) -> float:
        """The finished share of the training, 0 to 1."""
        share = step / self.steps
        if self.seconds:
            share = max(share, (time.monotonic() - self.start) / self.seconds)
        return min(share, 1.0)

    def rate_at(self, step: int) -> float:
        """The learning rate."""
        return self.rate * min(1, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.progress(step)))


def compiled_or_eager(module: nn.Module, run_on_zeros: Callable[[Callable], Tensor], label: str) -> Callable[..., Any]:
    """The module compiled, by a forward and a backward; if that fails, the module itself, which is only slower.

    Args:
        run_on_zeros: calls the module that it is given on zeros of the shapes and dtypes of training.
    """
    device = next(module.parameters()).device
    compiled = torch.compile(module)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            y = run_on_zeros(compiled)
        y.float().square().mean().backward()
    except Exception as error:  # the compiler's errors have no common class
        print(f"{label}: not compiled, because of {type(error).__name__}: {str(error)[:500]}", flush=True)
        return module
    print(f"{label}: compiled", flush=True)
    return compiled


def train(
    modules: Sequence[nn.Module],
    compute_loss: Callable[[], Tensor],
    *,
    rate: float,
    steps: int,
    seconds: float | None = None,
    warmup: int = 200,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    clip: float = 1.0,
    ema: float | None = None,
    label: str = "",
) -> int:
    """Train with AdamW for the given steps or seconds; afterwards, the modules contain the averaged weights.

    Args:
        modules: modules whose parameters with ``requires_grad`` are trained.
        compute_loss: samples a batch and returns its loss. On CUDA it is captured once and replayed, so it may only
            do work on the device.
        ema: maximum decay of the exponential moving average of the weights; None disables it. The decay grows to it as
            (1 + step) / (10 + step), so that the initial weights do not dominate the average of a short training.

    Returns:
        Number of steps.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    cuda = device.type == "cuda"
    device_rate = torch.zeros((), device=device)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=device_rate if cuda else rate, betas=betas, fused=cuda, capturable=cuda)
    averages = [p.detach().clone() for p in parameters]
    running = torch.zeros((), device=device)
    newest_share = torch.zeros((), device=device)  # share of the newest weights in the average

    def step_once() -> None:
        for p in parameters:
            p.grad = None
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        optimizer.step()
        if ema is not None:
            change = torch._foreach_sub([p.data for p in parameters], averages)
            torch._foreach_mul_(change, newest_share)
            torch._foreach_add_(averages, change)
        running.lerp_(loss.detach().float(), 0.02)

    replay = step_once
    if cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):  # at rate 0: allocates memory, changes no weights
                step_once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step_once()
        replay = graph.replay
        print(f"{label}: CUDA graph captured", flush=True)
    schedule = Schedule(rate, steps, seconds, warmup)
    done = 0
    while done < steps and schedule.progress(done) < 1:
        current_rate = schedule.rate_at(done)
        if ema is not None:
            newest_share.fill_(1 - min(ema, (1 + done) / (10 + done)))
        if cuda:
            device_rate.fill_(current_rate)
        else:
            for group in optimizer.param_groups:
                group["lr"] = current_rate
        replay()
        done += 1
        if done % 100 == 0:
            value = running.item()
            elapsed = time.monotonic() - schedule.start
            print(f"{label}: step {done}, {elapsed:.0f} s, loss {value:.4f}, rate {current_rate:.2e}", flush=True)
            if not math.isfinite(value):
                raise RuntimeError(f"{label}: the loss is not finite at step {done}")
    if ema is not None:
        for parameter, average in zip(parameters, averages):
            parameter.data.copy_(average)
    return done
