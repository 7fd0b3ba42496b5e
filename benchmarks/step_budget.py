"""Where a training step's time goes on a GPU: kernels, what keeps the GPU busy, and what the card itself could do.

    python -m benchmarks.step_budget [--batch_sizes 1 4 16] [--output OUT]

For the frozen UNet of Stable Diffusion 1.5's shape, ours and PEFT's LoRA: the kernels of an eager step and the time
that they keep the GPU busy (by the profiler), the eager and the recorded step (between CUDA events), floating-point
operations and bytes read and written (counted as they are dispatched), and what those would take at the speeds that
this card reaches in a large bf16 product and a large copy.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from diffusers.utils import logging
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_counts import Counter
from benchmarks.train_step import FLOOR, RECORDED, VARIANTS, Trial
from delora_diffusers.methods.config import UNET_TARGETS

SHOWN = {
    FLOOR: "floor, CUDA graph",
    "ours, DeLoRA, fast path": "ours, DeLoRA, CUDA graph",
    "PEFT LoRA, bf16 adapters": "PEFT LoRA, bf16 adapters, CUDA graph",
}
"""Eager variants and the same recorded."""


def milliseconds(run, count: int = 10) -> float:
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for mark in marks:
        mark.record()
        run()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def ceilings() -> tuple[float, float]:
    """FLOP and bytes a millisecond: a bf16 product of 8,192 on random numbers, a copy of 4 GiB read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: a @ b)
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return product, 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def budget(batch_size: int, flops_a_ms: float, bytes_a_ms: float) -> list[str]:
    lines = []
    for name, recorded in SHOWN.items():
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
        replayed = Trial(RECORDED[recorded], UNET_TARGETS, batch_size, record=True)
        for _ in range(5):
            replayed.step()
        graph = milliseconds(replayed.step)
        del replayed
        torch.cuda.empty_cache()
        total = flops.get_total_flops()
        cells = [f"{eager:.1f}", f"{graph:.1f}", f"{len(kernels):,}", f"{busy:.1f}", f"{total / 1e12:.2f}"]
        cells += [f"{total / flops_a_ms:.1f}", f"{counter.bytes / 1e9:.1f}", f"{counter.bytes / bytes_a_ms:.1f}"]
        lines.append(f"| {batch_size} | {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    flops_a_ms, bytes_a_ms = ceilings()
    head = "batch | | eager, ms | recorded, ms | kernels | GPU busy, ms"
    head += " | TFLOP | at the ceiling, ms | GB | at the ceiling, ms"
    lines = [f"| {head} |", f"| ---: | --- |{' ---: |' * 8}"]
    for batch_size in options.batch_sizes:
        lines += budget(batch_size, flops_a_ms, bytes_a_ms)
    lines += ["", f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {flops_a_ms / 1e9:.0f} TFLOP/s, "]
    lines[-1] += f"{bytes_a_ms / 1e9:.2f} TB/s."
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
