"""Time and peak memory of one training step on a UNet of Stable Diffusion 1.5's shape with random weights, on a GPU.

    python benchmarks/train_step.py [--targets attention|maps] [--batch_sizes 1 4 16] [--output table.md]

A step is forward, loss, backward and, where something trains, gradient clipping and fused AdamW; 512-pixel latents,
frozen UNet in bfloat16. Each time is the median of many steps between CUDA events after a warm-up, the variants taking
turns. The floor is the frozen UNet with gradients carried to its input. "autocast" rows are what diffusers' own script
does: float32 adapters under bfloat16 autocast.
"""

import argparse
import gc
import itertools
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from torch import nn

from delora_diffusers import AdapterConfig, attach
from delora_diffusers.config import MAP_TARGETS, UNET_TARGETS

RANK = 16
TARGETS = {"attention": UNET_TARGETS, "maps": MAP_TARGETS}
"""Which modules are adapted; maps adds the feed-forward layers."""

Prepare = Callable[[nn.Module, tuple[str, ...]], tuple[list, bool]]
"""Adapts a UNet's targets; returns what trains, and whether it wants autocast."""


def build_unet(device: str) -> nn.Module:
    """Stable Diffusion 1.5's UNet (860M parameters), random, frozen, bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            unet: nn.Module = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    finally:
        torch.set_default_dtype(torch.float32)
    return unet.requires_grad_(False)


def floor(unet: nn.Module, targets: tuple[str, ...]) -> tuple[list, bool]:
    return [], False


def ours(**settings) -> Prepare:
    def prepare(unet: nn.Module, targets: tuple[str, ...]) -> tuple[list, bool]:
        adapter = attach(unet, AdapterConfig(rank=RANK, targets=targets, **settings))
        return list(adapter.parameters()), False

    return prepare


def with_peft(config_name: str, dtype: torch.dtype, **settings) -> Prepare:
    def prepare(unet: nn.Module, targets: tuple[str, ...]) -> tuple[list, bool]:
        import peft

        config = getattr(peft, config_name)(r=RANK, target_modules=list(targets), **settings)
        peft.inject_adapter_in_model(config, unet)
        parameters = [p for p in unet.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        return parameters, dtype == torch.float32

    return prepare


VARIANTS: dict[str, Prepare] = {
    "floor: frozen UNet, no adapter": floor,
    "ours, DeLoRA, fast path": ours(method="delora"),
    "ours, DeLoRA, split path": ours(method="delora", path="split"),
    "ours, LoRA, fast path": ours(method="lora"),
    "PEFT LoRA, bf16 adapters": with_peft("LoraConfig", torch.bfloat16, lora_alpha=2 * RANK),
    "PEFT LoRA, autocast": with_peft("LoraConfig", torch.float32, lora_alpha=2 * RANK),
    "PEFT DeLoRA, autocast": with_peft("DeloraConfig", torch.float32),
}


class Trial:
    """One variant with a model of its own, whose step can be timed at any moment."""

    def __init__(self, prepare: Prepare, targets: tuple[str, ...], batch_size: int, device: str = "cuda"):
        self.unet = build_unet(device)
        self.parameters, autocast = prepare(self.unet, targets)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True) if self.parameters else None
        shape, trains = (batch_size, 4, 64, 64), bool(self.parameters)
        self.latents = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=not trains)
        self.text = torch.randn(batch_size, 77, 768, device=device, dtype=torch.bfloat16)
        self.target = torch.randn(shape, device=device)
        self.timesteps = torch.randint(0, 1000, (batch_size,), device=device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=autocast)

    def step(self) -> None:
        with self.autocast:
            prediction = self.unet(self.latents, self.timesteps, self.text, return_dict=False)[0]
        nn.functional.mse_loss(prediction.float(), self.target).backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.latents.grad = None

    def peak_gib(self, others: int, steps: int = 3) -> float:
        """Peak memory of a step beside ``others`` bytes that belong to other trials."""
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return (torch.cuda.max_memory_allocated() - others) / 2**30

    def milliseconds(self, steps: int) -> list[float]:
        """Times of a few steps, each between two events, run without waiting in between."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def measure(targets: tuple[str, ...], batch_size: int, rounds: int, steps: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a step and peak GiB of each variant; the variants take turns, round after round."""
    trials, memory = {}, {}
    for name, prepare in VARIANTS.items():
        gc.collect()
        others = torch.cuda.memory_allocated()
        trials[name] = Trial(prepare, targets, batch_size)
        memory[name] = trials[name].peak_gib(others)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, trial in trials.items():
            trial.step()
            times[name] += trial.milliseconds(steps)
    gc.enable()
    return {name: (statistics.median(times[name]), memory[name]) for name in VARIANTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of each variant in each round")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: dict[str, list] = {name: [] for name in VARIANTS}
    for batch_size in options.batch_sizes:
        timed = measure(TARGETS[options.targets], batch_size, options.rounds, options.steps)
        for name, (milliseconds, gib) in timed.items():
            rows[name].append((milliseconds, gib))
            print(f"batch {batch_size:2}  {name:32} {milliseconds:7.1f} ms  {gib:6.2f} GiB", flush=True)
    base = rows["floor: frozen UNet, no adapter"]
    head = " | ".join(f"batch {size}: ms | / floor | GiB" for size in options.batch_sizes)
    lines = [f"| | {head} |", "| --- |" + " ---: |" * (3 * len(options.batch_sizes))]
    for name, cells in rows.items():
        text = " | ".join(f"{ms:.1f} | {ms / base[i][0]:.2f} | {gib:.2f}" for i, (ms, gib) in enumerate(cells))
        lines.append(f"| {name} | {text} |")
    import diffusers
    import peft

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}"
    counted = f"rank {RANK}, targets {options.targets}, median of {options.rounds * options.steps} steps"
    lines += ["", f"{torch.cuda.get_device_name()}, {versions}, python {platform.python_version()}; {counted}."]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
