"""Where the time of a training step goes: number of kernels, time the GPU is busy, and what the GPU could reach.

    python -m benchmarks.step_budget [--batch_sizes 1 4 16] [--output OUT]

Compares a frozen UNet of Stable Diffusion 1.5's shape without an adapter, with ours, and with PEFT's LoRA. The columns
are the time of a step, eager and with a CUDA graph (between CUDA events); the number of kernels of an eager step, and
the time they keep the GPU busy (from the profiler); the floating-point operations of the step, the bytes it reads and
writes (counted at dispatch), and the time these would take at the speed of a large bf16 product and a large copy on the
same GPU.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reporting import print_and_save
from benchmarks.step_counts import Counter
from benchmarks.train_step import FLOOR, GRAPH_VARIANTS, VARIANTS, Trial
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.methods.config import UNET_TARGETS

COMPARED = {
    FLOOR: "floor, CUDA graph",
    "ours, DeLoRA, fast path": "ours, DeLoRA, CUDA graph",
    "PEFT LoRA, bf16 adapters": "PEFT LoRA, bf16 adapters, CUDA graph",
}
"""Eager variants, each with its counterpart that uses a CUDA graph."""


def milliseconds(run: Callable[[], object], count: int = 10) -> float:
    """The median time of a call on the GPU, in ms, after a warm-up call."""
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for mark in marks:
        mark.record()
        run()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def ceilings() -> tuple[float, float]:
    """FLOP and bytes per ms, of a bf16 product of random 8,192 x 8,192 matrices and of a copy that moves 4 GiB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: a @ b)
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return product, 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def budget(batch_size: int, flops_per_ms: float, bytes_per_ms: float) -> list[str]:
    """A row per variant."""
    lines = []
    for name, graph_name in COMPARED.items():
        trial = Trial(VARIANTS[name], UNET_TARGETS, batch_size)
        eager = milliseconds(trial.step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            trial.step()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000
        with FlopCounterMode(display=False) as flops:
            trial.step()
        with Counter() as counter:
            trial.step()
        del trial
        graph_trial = Trial(GRAPH_VARIANTS[graph_name], UNET_TARGETS, batch_size, cuda_graph=True)
        for _ in range(5):
            graph_trial.step()
        graph = milliseconds(graph_trial.step)
        del graph_trial
        torch.cuda.empty_cache()
        total = flops.get_total_flops()
        cells = [f"{eager:.1f}", f"{graph:.1f}", f"{len(kernels):,}", f"{busy:.1f}", f"{total / 1e12:.2f}"]
        cells += [f"{total / flops_per_ms:.1f}", f"{counter.bytes / 1e9:.1f}", f"{counter.bytes / bytes_per_ms:.1f}"]
        lines.append(f"| {batch_size} | {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    flops_per_ms, bytes_per_ms = ceilings()
    head = "batch | | eager, ms | CUDA graph, ms | kernels | GPU busy, ms"
    head += " | TFLOP | at the ceiling, ms | GB | at the ceiling, ms"
    lines = [f"| {head} |", f"| ---: | --- |{' ---: |' * 8}"]
    for batch_size in options.batch_sizes:
        lines += budget(batch_size, flops_per_ms, bytes_per_ms)
    lines += ["", f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {flops_per_ms / 1e9:.0f} TFLOP/s, "]
    lines[-1] += f"{bytes_per_ms / 1e9:.2f} TB/s."
    print_and_save("\n".join(lines), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
