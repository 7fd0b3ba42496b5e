"""One training step as a CUDA graph: these networks are so small that launching kernels would cost most of the time."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Schedule:
    """Warm-up, then a cosine down to zero over the steps, or over the seconds given, whichever ends first."""

    def __init__(self, rate: float, steps: int, seconds: float | None, warmup: int):
        self.rate, self.steps, self.seconds, self.warmup = rate, steps, seconds, warmup
        self.began = time.monotonic()

    def progress(self, step: int) -> float:
        done = step / self.steps
        if self.seconds:
            done = max(done, (time.monotonic() - self.began) / self.seconds)
        return min(done, 1.0)

    def rate_at(self, step: int) -> float:
        return self.rate * min(1, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.progress(step)))


def train(
    modules: Sequence[nn.Module],
    loss_of: Callable[[], Tensor],
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
    """Train with AdamW until the steps or the seconds are over; the modules end with the averaged weights.

    Args:
        modules: whose parameters with ``requires_grad`` train.
        loss_of: draws its own batch and gives the loss; on CUDA it is captured once and replayed, so it must be made
            of device work only.
        ema: greatest decay of the exponential moving average of the weights, or None for none. It grows to that as
            (1 + step) / (10 + step), so that a short training is not averaged with where it began.

    Returns:
        Steps done.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    cuda = device.type == "cuda"
    rate_now = torch.zeros((), device=device)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate_now if cuda else rate, betas=betas, fused=cuda, capturable=cuda)
    averages = [p.detach().clone() for p in parameters]
    running = torch.zeros((), device=device)
    fresh = torch.zeros((), device=device)  # share of the newest weights in the average

    def step_once() -> None:
        for p in parameters:
            p.grad = None
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        optimizer.step()
        if ema is not None:
            news = torch._foreach_sub([p.data for p in parameters], averages)
            torch._foreach_mul_(news, fresh)
            torch._foreach_add_(averages, news)
        running.lerp_(loss.detach().float(), 0.02)

    replay = step_once
    if cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):  # at rate 0: memory is laid out, nothing moves
                step_once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step_once()
        replay = graph.replay
        print(f"{label}: captured", flush=True)
    schedule = Schedule(rate, steps, seconds, warmup)
    done = 0
    while done < steps and schedule.progress(done) < 1:
        now = schedule.rate_at(done)
        if ema is not None:
            fresh.fill_(1 - min(ema, (1 + done) / (10 + done)))
        if cuda:
            rate_now.fill_(now)
        else:
            for group in optimizer.param_groups:
                group["lr"] = now
        replay()
        done += 1
        if done % 100 == 0:
            value = running.item()
            spent = time.monotonic() - schedule.began
            print(f"{label}: step {done}, {spent:.0f} s, loss {value:.4f}, rate {now:.2e}", flush=True)
            if not math.isfinite(value):
                raise RuntimeError(f"{label}: the loss is not finite at step {done}")
    if ema is not None:
        for parameter, average in zip(parameters, averages):
            parameter.data.copy_(average)
    return done
