"""Time and peak memory of one training step on a UNet of Stable Diffusion 1.5's shape with random weights, on a GPU.

    python -m benchmarks.train_step [--model sd15|sdxl] [--targets attention|maps|feed-forward] [--batch_sizes 1 4 16]
        [--checkpointing]

A step is forward, loss and backward and, if there is something to train, gradient clipping and fused AdamW. The
latents are those of 512-pixel images (1,024 for SDXL); the frozen UNet is in bfloat16. Times are medians of many steps
between CUDA events after a warm-up; the variants take turns. The floor is the frozen UNet without an adapter, with
gradients backpropagated to its input. The "autocast" rows train as diffusers' own script does, with float32 adapters
under bfloat16 autocast.
"""

import argparse
import gc
import itertools
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from torch import nn

from benchmarks.reporting import print_and_save
from delora_diffusers import AdapterConfig, attach
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.methods.config import MAP_TARGETS, UNET_TARGETS
from delora_diffusers.training.cuda_graph import EAGER_FIRST
from delora_diffusers.training.setup import run_checkpointed

RANK = 16
TARGETS = {"attention": UNET_TARGETS, "maps": MAP_TARGETS, "feed-forward": (*MAP_TARGETS, "ff.net.2")}
"""The modules to adapt; ``maps`` adds the feed-forward layers."""

Prepare = Callable[[nn.Module, tuple[str, ...]], tuple[list, bool]]
"""Adapts the target modules of a UNet; returns the trainable parameters, and whether to run under autocast."""

SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""The UNets of Stable Diffusion 1.5 (860M parameters) and XL (2.6B)."""
LATENT_SIZES = {"sd15": (64, 64), "sdxl": (128, 128)}
"""Height and width of the latents of 512- and 1,024-pixel images."""


def build_unet(device: str, shape: str = "sd15") -> nn.Module:
    """A frozen UNet with random weights in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            unet: nn.Module = UNet2DConditionModel(**SHAPES[shape])
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
    "ours, DeLoRA, fast path": ours(method="delora", path="fast"),
    "ours, DeLoRA, lean path": ours(method="delora", path="lean"),
    "ours, DeLoRA, split path": ours(method="delora", path="split"),
    "ours, DeLoRA, split path in bf16": ours(method="delora", path="split", split_dtype="model"),
    "ours, LoRA, fast path": ours(method="lora", path="fast"),
    "PEFT LoRA, bf16 adapters": with_peft("LoraConfig", torch.bfloat16, lora_alpha=2 * RANK),
    "PEFT LoRA, autocast": with_peft("LoraConfig", torch.float32, lora_alpha=2 * RANK),
    "PEFT DoRA, bf16 adapters": with_peft("LoraConfig", torch.bfloat16, lora_alpha=2 * RANK, use_dora=True),
    "PEFT DeLoRA, autocast": with_peft("DeloraConfig", torch.float32),
}
GRAPH_VARIANTS: dict[str, Prepare] = {
    "floor, CUDA graph": floor,
    "ours, DeLoRA, fast path, CUDA graph": ours(method="delora", path="fast"),
    "ours, DeLoRA, lean path, CUDA graph": ours(method="delora", path="lean"),
    "ours, LoRA, fast path, CUDA graph": ours(method="lora", path="fast"),
    "PEFT LoRA, bf16 adapters, CUDA graph": VARIANTS["PEFT LoRA, bf16 adapters"],
}
"""Forward and backward are recorded as a CUDA graph and replayed, as in the training scripts."""
FLOOR, PEFT = next(iter(VARIANTS)), "PEFT LoRA, bf16 adapters"


class Trial:
    """A variant with its own model, whose training step can be run at any time."""

    def __init__(
        self,
        prepare: Prepare,
        targets: tuple[str, ...],
        batch_size: int,
        device: str = "cuda",
        shape: str = "sd15",
        cuda_graph: bool = False,
        checkpointing: bool = False,
    ):
        self.unet: Any = build_unet(device, shape)
        if checkpointing:
            self.unet.enable_gradient_checkpointing(run_checkpointed)
            self.unet.train()
        self.parameters, autocast = prepare(self.unet, targets)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True) if self.parameters else None
        size, width = (batch_size, 4, *LATENT_SIZES[shape]), SHAPES[shape]["cross_attention_dim"]
        trains = bool(self.parameters)
        options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.latents = torch.randn(size, requires_grad=not trains, **options)
        self.batch = {
            "timesteps": torch.randint(0, 1000, (batch_size,), device=device),
            "text": torch.randn(batch_size, 77, width, **options),
            "target": torch.randn(size, device=device),
        }
        if trains:
            self.batch["latents"] = self.latents
        self.added = None
        if shape == "sdxl":
            sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch_size, device=device)
            self.added = {"text_embeds": torch.randn(batch_size, 1280, **options), "time_ids": sizes}
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=autocast)
        self.micro_batches = None
        if cuda_graph:
            from accelerate import Accelerator

            from delora_diffusers.training.cuda_graph import MicroBatches

            self.micro_batches = MicroBatches(Accelerator(), [], self.parameters, self.loss_of, capture=True)

    def loss_of(
        self, timesteps: torch.Tensor, text: torch.Tensor, target: torch.Tensor, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        noisy = self.latents if latents is None else latents
        with self.autocast:
            prediction = self.unet(noisy, timesteps, text, added_cond_kwargs=self.added, return_dict=False)[0]
        return nn.functional.mse_loss(prediction.float(), target)

    def step(self) -> None:
        if self.micro_batches is None:
            self.loss_of(**self.batch).backward()
        else:
            self.micro_batches(self.batch)
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self.micro_batches is None)
        elif self.micro_batches is None:
            self.latents.grad = None
        else:
            self.latents.grad.zero_()  # pyright: ignore[reportOptionalMemberAccess]

    def peak_gib(self, allocated: int, reserved: int, steps: int = 5) -> tuple[float, float]:
        """Peak GiB allocated during a step, or while it is recorded as a CUDA graph, and GiB reserved for it.

        Args:
            allocated, reserved: bytes of the other trials, which do not count.
        """
        eager = EAGER_FIRST if self.micro_batches is not None else 0
        for _ in range(eager):
            self.step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - allocated
        return peak / 2**30, (torch.cuda.memory_reserved() - reserved) / 2**30

    def milliseconds(self, steps: int) -> list[float]:
        """The times of consecutive steps."""
        return cuda_milliseconds(self.step, steps)


def cuda_milliseconds(step: Callable[[], object], steps: int) -> list[float]:
    """The times of consecutive steps, measured by CUDA events so that nothing waits between the steps."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def _load_libraries() -> None:
    """Let cuBLAS and cuDNN allocate their workspaces, which would count as the first variant's."""
    x = torch.randn(1, 64, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
    y = nn.functional.conv2d(x, weight).flatten(2)
    nn.functional.linear(y @ y.mT, weight[..., 0, 0], weight[0, :, 0, 0]).float().sum().backward()


def measure(
    targets: tuple[str, ...],
    batch_size: int,
    rounds: int,
    steps: int,
    shape: str,
    only: list[str] | None,
    checkpointing: bool,
) -> dict[str, tuple[float, float, float]]:
    """Median ms of a step, and its peak and reserved memory in GiB, by variant; the variants take turns."""
    trials, memory = {}, {}
    _load_libraries()
    for name, prepare in (VARIANTS | GRAPH_VARIANTS).items():
        if only and name != FLOOR and not any(part in name for part in only):
            continue
        if checkpointing and prepare is floor:
            continue  # without trainable tensors nothing would be recomputed
        gc.collect()
        torch.cuda.empty_cache()
        others = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        trials[name] = Trial(
            prepare, targets, batch_size, shape=shape, cuda_graph=name in GRAPH_VARIANTS, checkpointing=checkpointing
        )
        memory[name] = trials[name].peak_gib(*others)
    times: dict[str, list[float]] = {name: [] for name in trials}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, trial in trials.items():
            trial.step()
            times[name] += trial.milliseconds(steps)
    gc.enable()
    return {name: (statistics.median(times[name]), *memory[name]) for name in trials}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--model", choices=list(SHAPES), default="sd15")
    parser.add_argument("--only", nargs="+", help="run the floor and the variants whose name contains one of these")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="steps per variant and round")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: dict[str, list] = {}
    for batch_size in options.batch_sizes:
        targets = TARGETS[options.targets]
        settings = (options.rounds, options.steps, options.model, options.only, options.checkpointing)
        for name, cell in measure(targets, batch_size, *settings).items():
            rows.setdefault(name, []).append(cell)
            print(f"batch {batch_size:2}  {name:40} {cell[0]:7.1f} ms  {cell[1]:6.2f} {cell[2]:6.2f} GiB", flush=True)
    reference = PEFT if options.checkpointing else FLOOR
    base = rows[reference]
    head = " | ".join(
        f"batch {size}: ms | / {reference.split(':')[0]} | GiB | reserved" for size in options.batch_sizes
    )
    lines = [f"| | {head} |", "| --- |" + " ---: |" * (4 * len(options.batch_sizes))]
    for name, cells in rows.items():
        text = " | ".join(
            f"{ms:.1f} | {ms / base[i][0]:.2f} | {peak:.2f} | {reserved:.2f}"
            for i, (ms, peak, reserved) in enumerate(cells)
        )
        lines.append(f"| {name} | {text} |")
    import diffusers
    import peft

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}"
    steps = options.rounds * options.steps
    settings = f"{options.model}, rank {RANK}, targets {options.targets}, median of {steps} steps"
    lines += ["", f"{torch.cuda.get_device_name()}, {versions}, python {platform.python_version()}; {settings}."]
    print_and_save("\n".join(lines), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
