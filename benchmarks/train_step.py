"""Time and peak memory of one training step on a UNet of Stable Diffusion 1.5's shape with random weights, on a GPU.

    python benchmarks/train_step.py [--batch_sizes 1 4 16] [--output table.md]

A step is forward, loss, backward and, where something trains, gradient clipping and fused AdamW; 512-pixel latents,
frozen UNet in bfloat16. Each time is the median of many steps between CUDA events after a warm-up. The floor is the
frozen UNet with gradients carried to its input. "autocast" rows are what diffusers' own script does: float32 adapters
under bfloat16 autocast.
"""

import argparse
import contextlib
import gc
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from delora_diffusers import AdapterConfig, attach
from delora_diffusers.config import UNET_TARGETS

RANK = 16


def build_unet(batch_size: int) -> nn.Module:
    """Stable Diffusion 1.5's UNet (860M parameters), random, frozen, bfloat16."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return unet.to(torch.bfloat16).requires_grad_(False)


def floor(unet: nn.Module) -> tuple[list, bool]:
    return [], False


def ours(**settings) -> Callable[[nn.Module], tuple[list, bool]]:
    def prepare(unet: nn.Module) -> tuple[list, bool]:
        adapter = attach(unet, AdapterConfig(rank=RANK, **settings))
        return list(adapter.parameters()), False

    return prepare


def with_peft(config_name: str, dtype: torch.dtype, **settings) -> Callable[[nn.Module], tuple[list, bool]]:
    def prepare(unet: nn.Module) -> tuple[list, bool]:
        import peft

        config = getattr(peft, config_name)(r=RANK, target_modules=list(UNET_TARGETS), **settings)
        peft.inject_adapter_in_model(config, unet)
        parameters = [p for p in unet.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        return parameters, dtype == torch.float32

    return prepare


VARIANTS: dict[str, Callable[[nn.Module], tuple[list, bool]]] = {
    "floor: frozen UNet, no adapter": floor,
    "ours, DeLoRA, fast path": ours(method="delora"),
    "ours, DeLoRA, split path": ours(method="delora", path="split"),
    "ours, LoRA, fast path": ours(method="lora"),
    "PEFT LoRA, bf16 adapters": with_peft("LoraConfig", torch.bfloat16, lora_alpha=2 * RANK),
    "PEFT LoRA, autocast": with_peft("LoraConfig", torch.float32, lora_alpha=2 * RANK),
    "PEFT DeLoRA, autocast": with_peft("DeloraConfig", torch.float32),
}


def measure(prepare: Callable, batch_size: int, warmup: int, steps: int) -> tuple[float, float]:
    """Median milliseconds of a step, and peak memory in GiB."""
    unet = build_unet(batch_size)
    parameters, autocast = prepare(unet)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    latents = torch.randn(batch_size, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=not parameters)
    text = torch.randn(batch_size, 77, 768, device="cuda", dtype=torch.bfloat16)
    target = torch.randn(batch_size, 4, 64, 64, device="cuda")
    timesteps = torch.randint(0, 1000, (batch_size,), device="cuda")
    context = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(warmup + steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with context:
            prediction = unet(latents, timesteps, text, return_dict=False)[0]
        nn.functional.mse_loss(prediction.float(), target).backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            latents.grad = None
        end.record()
        end.synchronize()
        if step >= warmup:
            times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = {name: [] for name in VARIANTS}
    for batch_size in options.batch_sizes:
        for name, prepare in VARIANTS.items():
            milliseconds, gib = measure(prepare, batch_size, options.warmup, options.steps)
            rows[name].append((milliseconds, gib))
            print(f"batch {batch_size:2}  {name:32} {milliseconds:7.1f} ms  {gib:6.2f} GiB", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    base = rows["floor: frozen UNet, no adapter"]
    head = " | ".join(f"batch {size}: ms | / floor | GiB" for size in options.batch_sizes)
    lines = [f"| | {head} |", "| --- |" + " ---: |" * (3 * len(options.batch_sizes))]
    for name, cells in rows.items():
        text = " | ".join(f"{ms:.1f} | {ms / base[i][0]:.2f} | {gib:.2f}" for i, (ms, gib) in enumerate(cells))
        lines.append(f"| {name} | {text} |")
    import diffusers
    import peft

    lines += ["", f"{torch.cuda.get_device_name()}, torch {torch.__version__}, diffusers {diffusers.__version__}, "]
    lines[-1] += f"peft {peft.__version__}, python {platform.python_version()}; rank {RANK}, {options.steps} steps"
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
