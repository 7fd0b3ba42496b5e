"""Time of a denoising step on a GPU: the base model, with a merged adapter, and with an attached adapter.

    python -m benchmarks.generate [--model sd15|sdxl] [--batch_sizes 2 8] [--output OUT]

A step is one forward of a UNet with random weights in bfloat16, without gradients; a batch of 2 is one image with
classifier-free guidance. Times are medians of many steps between CUDA events; the variants take turns.
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from benchmarks.reporting import print_and_save
from benchmarks.train_step import LATENT_SIZES, RANK, SHAPES, build_unet
from delora_diffusers import AdapterConfig, attach, merge
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.methods.config import UNET_TARGETS


def base(unet: nn.Module) -> None:
    pass


def ours(merged: bool, path: str = "fast") -> Callable[[nn.Module], None]:
    def prepare(unet: nn.Module) -> None:
        adapter = attach(unet, AdapterConfig(rank=RANK, path=path))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.1).add_(0.01)
        if merged:
            merge(unet)

    return prepare


def with_peft(merged: bool) -> Callable[[nn.Module], None]:
    def prepare(unet: nn.Module) -> None:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = peft.LoraConfig(
            r=RANK, target_modules=list(UNET_TARGETS), lora_alpha=2 * RANK, init_lora_weights=False
        )
        peft.inject_adapter_in_model(config, unet)
        unet.to(torch.bfloat16)
        if merged:
            for module in unet.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()  # pyright: ignore[reportAttributeAccessIssue]

    return prepare


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "base model": base,
    "ours, merged": ours(merged=True),
    "ours, attached": ours(merged=False),
    "ours, attached, split path": ours(merged=False, path="split"),
    "PEFT LoRA, merged into its layers": with_peft(merged=True),
    "PEFT LoRA, attached": with_peft(merged=False),
}


@torch.no_grad()
def measure(shape: str, batch_size: int, rounds: int, steps: int) -> dict[str, float]:
    """The median time of a forward in ms, by variant."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    latents = torch.randn(batch_size, 4, *LATENT_SIZES[shape], **options)
    text = torch.randn(batch_size, 77, SHAPES[shape]["cross_attention_dim"], **options)
    timesteps = torch.full((batch_size,), 500, device="cuda")
    added_conditions = None
    if shape == "sdxl":
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch_size, device="cuda")
        added_conditions = {"text_embeds": torch.randn(batch_size, 1280, **options), "time_ids": sizes}
    models = {}
    for name, prepare in VARIANTS.items():
        models[name] = build_unet("cuda", shape).eval()
        prepare(models[name])
    times: dict[str, list[float]] = {name: [] for name in models}

    def step(unet: nn.Module) -> None:
        unet(latents, timesteps, text, added_cond_kwargs=added_conditions, return_dict=False)

    gc.collect()
    gc.disable()
    for round_number in range(rounds + 1):
        for name, unet in models.items():
            step(unet)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            marks[0].record()
            for mark in marks[1:]:
                step(unet)
                mark.record()
            torch.cuda.synchronize()
            if round_number:  # round 0 is the warm-up
                times[name] += [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
    gc.enable()
    return {name: statistics.median(milliseconds) for name, milliseconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="sd15")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    results = [measure(options.model, size, options.rounds, options.steps) for size in options.batch_sizes]
    head = " | ".join(f"batch {size}: ms | / base" for size in options.batch_sizes)
    lines = [f"| {options.model}, a denoising step | {head} |", "| --- |" + " ---: |" * (2 * len(results))]
    for name in VARIANTS:
        cells = " | ".join(f"{result[name]:.2f} | {result[name] / result['base model']:.2f}" for result in results)
        lines.append(f"| {name} | {cells} |")
    steps = options.rounds * options.steps
    lines += ["", f"{torch.cuda.get_device_name()}, torch {torch.__version__}; median of {steps} steps."]
    print_and_save("\n".join(lines), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
