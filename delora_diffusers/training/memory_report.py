"""What a training run will need of the GPU's memory, before it starts, and what helps if that is too much."""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from delora_diffusers.adapter.attach import attach
from delora_diffusers.errors import InputError
from delora_diffusers.families.family import Family
from delora_diffusers.families.loading import OpenModel
from delora_diffusers.families.quantization import BYTES, PACKAGES
from delora_diffusers.launching import has_bf16
from delora_diffusers.memory import free_bytes
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS, AdapterConfig
from delora_diffusers.methods.table import METHODS
from delora_diffusers.pipelines.offload import repeated_blocks
from delora_diffusers.precision import denoiser_dtype, dtype_of
from delora_diffusers.training.memory_estimate import (
    LIBRARIES,
    StepMemory,
    build_model,
    estimate_step,
    shapes_only,
)
from delora_diffusers.training.objective import denoising_losses
from delora_diffusers.training.setup import checkpoint_denoiser, checkpoint_text_encoder

GIB = 2**30
MARGIN = 1.03
"""A step is refused if this multiple of its peak is not free, since PyTorch reserves more than it allocates."""
TOO_SMALL_TO_MATTER = 100_000_000
"""Weights of a denoiser below which nothing is estimated: it fits any GPU."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the memory of a training step depends on.

    Attributes:
        batch_size: samples per step, class images and all subjects included. resolution: side in pixels.
        dtype: of the frozen models. base_precision: see ``--base_precision``.
        adapter: of the denoiser. subjects: trained at once.
        optimizer: see ``--optimizer``. use_ema: whether an average of the adapter is kept.
        text_encoder: whether the text encoders are trained too. prompt_chunks: in which prompts are encoded.
    """

    batch_size: int
    resolution: int
    dtype: torch.dtype
    adapter: AdapterConfig
    base_precision: str | None = None
    checkpointing: bool = False
    offload: bool = False
    optimizer: str = "adamw"
    use_ema: bool = False
    subjects: int = 1
    text_encoder: bool = False
    prompt_chunks: int = 1


def plan_of(
    args: argparse.Namespace, adapter: AdapterConfig, mixed_precision: str, subjects: int, prompt_chunks: int = 1
) -> Plan:
    """The plan that the flags of a training script describe."""
    parts = ("with_prior_preservation", "with_output_preservation")
    return Plan(
        batch_size=args.train_batch_size * (1 + sum(getattr(args, part, False) for part in parts)) * subjects,
        resolution=args.resolution,
        dtype=denoiser_dtype(args.base_precision, mixed_precision),
        adapter=adapter,
        base_precision=args.base_precision,
        checkpointing=args.gradient_checkpointing,
        offload=args.offload,
        optimizer=args.optimizer,
        use_ema=args.use_ema,
        subjects=subjects,
        text_encoder=getattr(args, "train_text_encoder", False),
        prompt_chunks=prompt_chunks,
    )


def step_memory(model: OpenModel, plan: Plan) -> StepMemory:
    """The memory of a training step, from shapes alone; takes seconds."""
    with shapes_only():
        skeletons = model.skeletons
        skeleton, family = skeletons[model.family.DENOISER], model.family
        denoiser: Any = build_model(lambda: type(skeleton).from_config(skeleton.config), plan.dtype)
        shapes = family.condition_shapes(skeleton.config)
        encoders: dict[str, Any] = {
            name: build_model(lambda skeleton=skeletons[name]: type(skeleton)(skeleton.config), plan.dtype)
            for name in (() if shapes else model.text_encoders)
        }
        config = plan.adapter
        if plan.base_precision in PACKAGES and config.path == "auto":
            config = dataclasses.replace(config, path="split", split_dtype="model")
        generators = [torch.Generator() for _ in range(plan.subjects)]
        adapters = [attach(denoiser, config, generators, torch.device("cpu") if plan.offload else None)]
        trained = model.trainable_encoders if plan.text_encoder else []
        if trained:
            text_config = dataclasses.replace(plan.adapter, targets=TEXT_ENCODER_TARGETS)
            adapters += [attach(encoders[name], text_config) for name in trained]
        if plan.checkpointing:
            checkpoint_denoiser(denoiser)
            for name in trained:
                checkpoint_text_encoder(encoders[name])
        pipeline = SimpleNamespace(**encoders)
        tokens = {name: _tokens(family, name, encoder, plan) for name, encoder in encoders.items()}
        with torch.no_grad():
            outputs = {name: family.read(pipeline, name, ids) for name, ids in tokens.items()}
        encoded = {name: torch.empty(plan.batch_size, *shape) for name, shape in shapes.items()}
        encoded = encoded or family.conditions(outputs, skeleton.config)
        batch = _batch(model, plan)

        def loss() -> torch.Tensor:
            conditions = encoded
            if trained:
                read = {name: family.read(pipeline, name, tokens[name]) for name in trained}
                conditions = family.conditions(outputs | read, skeleton.config)
            return denoising_losses(
                family, denoiser, **batch, subjects=plan.subjects, loss_type="l2", **conditions
            ).sum()

        models = [denoiser, *(encoders[n] for n in trained)]
        memory = estimate_step(models, adapters, loss, plan.optimizer, plan.use_ema)
    weights = memory.weights - _bytes_saved(model.family, denoiser, plan)
    return dataclasses.replace(memory, weights=weights)


def _batch(model: OpenModel, plan: Plan) -> dict[str, torch.Tensor]:
    """The tensors of a micro-batch that do not come from the text encoders."""
    channels, factor = model.family.latent_shape(model.skeletons["vae"].config)
    latents = torch.empty(plan.batch_size, channels, plan.resolution // factor, plan.resolution // factor)
    batch = {"noisy": latents, "target": torch.empty_like(latents), "weights": torch.empty(plan.batch_size)}
    batch["timesteps"] = torch.zeros(plan.batch_size, dtype=torch.float32 if model.family.IS_FLOW else torch.long)
    return batch | ({"time_ids": torch.zeros(plan.batch_size, 6)} if model.family.HAS_SIZES else {})


def _tokens(family: Family, name: str, encoder: Any, plan: Plan) -> torch.Tensor:
    """Token ids of a text encoder; see ``Family.tokenize``."""
    length = family.PROMPT_LENGTHS.get(name) or encoder.config.max_position_embeddings
    chunks = [plan.prompt_chunks] if plan.prompt_chunks > 1 else []
    return torch.zeros(plan.batch_size, *chunks, length, dtype=torch.long)


def _bytes_saved(family: Family, denoiser: nn.Module, plan: Plan) -> int:
    """Bytes of the denoiser's weights that quantizing or offloading saves."""
    if plan.base_precision in BYTES:
        linears = ((name, m) for name, m in denoiser.named_modules() if isinstance(m, nn.Linear))
        count = sum(m.weight.numel() for name, m in linears if not set(name.split(".")) & set(family.UNQUANTIZED))
        return round(count * (plan.dtype.itemsize - BYTES[plan.base_precision]))
    if plan.offload:
        sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in repeated_blocks(denoiser)]
        return sum(sizes) - 2 * max(sizes, default=0)
    return 0


def report_memory(accelerator: Accelerator, model: OpenModel, plan: Plan) -> None:
    """Print what training will need of the GPU's memory and what is free.

    Raises:
        InputError: it will not fit; the message says which flags help, and what each saves.
    """
    if accelerator.device.type != "cuda" or _weights(model) < TOO_SMALL_TO_MATTER:
        return
    memory, free = step_memory(model, plan), free_bytes()
    if MARGIN * memory.total + LIBRARIES > free:
        helps = ", ".join(f"{flag} (saves {saved / GIB:.1f} GiB)" for flag, saved in savings(model, plan, memory.total))
        raise InputError(
            f"a training step needs about {memory.total / GIB:.1f} GiB of GPU memory, but {free / GIB:.1f} GiB are "
            f"free; use {helps or 'a smaller --resolution'}."
        )
    if accelerator.is_local_main_process:
        print(f"GPU memory: a training step needs about {described(memory)}; {free / GIB:.1f} GiB are free", flush=True)


def described(memory: StepMemory) -> str:
    """The parts of a step's memory in words."""
    parts = {"weights": memory.weights, "adapter": memory.adapter, "activations": memory.activations}
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return f"{memory.total / GIB:.1f} GiB ({listed})"


def savings(model: OpenModel, plan: Plan, total: int) -> list[tuple[str, int]]:
    """Flags that are not used yet, with the bytes that each saves by itself, the largest first."""
    saved = [(flag, total - step_memory(model, changed).total) for flag, changed in _smaller_plans(plan)]
    return sorted(((flag, size) for flag, size in saved if size > total / 50), key=lambda pair: -pair[1])


def _smaller_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    low_rank = METHODS[plan.adapter.method].has_factors and plan.adapter.path != "fast" and plan.subjects == 1
    if not plan.checkpointing:
        yield "--gradient_checkpointing", dataclasses.replace(plan, checkpointing=True)
    if plan.dtype == torch.float32:
        precision = "bf16" if torch.cuda.is_available() and has_bf16() else "fp16"
        yield f"--mixed_precision {precision}", dataclasses.replace(plan, dtype=dtype_of(precision))
    if plan.batch_size > plan.subjects:
        yield "--train_batch_size 1", dataclasses.replace(plan, batch_size=plan.subjects)
    if low_rank and plan.base_precision not in PACKAGES and not plan.offload:
        precision = "nf4" if importlib.util.find_spec("bitsandbytes") is not None else "int8"
        yield f"--base_precision {precision}", dataclasses.replace(plan, base_precision=precision)
        yield "--offload", dataclasses.replace(plan, offload=True, checkpointing=True)
    if plan.resolution > 512:
        yield "--resolution 512", dataclasses.replace(plan, resolution=512)


def _weights(model: OpenModel) -> int:
    return sum(parameter.numel() for parameter in model.skeletons[model.family.DENOISER].parameters())


CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 141)
"""Memory of GPUs, GB."""


def memory_table(model: OpenModel, resolution: int) -> str:
    """What training DeLoRA on a model needs, by flags: a Markdown table."""
    base = Plan(1, resolution, torch.bfloat16, AdapterConfig())
    rows: Sequence[tuple[str, Plan]] = (
        ("--mixed_precision bf16 or fp16", base),
        ("the same, --train_batch_size 4", dataclasses.replace(base, batch_size=4)),
        ("the same, --gradient_checkpointing", dataclasses.replace(base, checkpointing=True)),
        ("... and --base_precision int8", dataclasses.replace(base, checkpointing=True, base_precision="int8")),
        ("... and --base_precision nf4", dataclasses.replace(base, checkpointing=True, base_precision="nf4")),
        ("... and --offload", dataclasses.replace(base, checkpointing=True, offload=True)),
    )
    lines = [
        f"| {resolution} pixels, rank {base.adapter.rank} | weights | adapter | activations | GiB in all | GPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, plan in rows:
        memory = step_memory(model, plan)
        parts = (memory.weights, memory.adapter, memory.activations, memory.total)
        cells = " | ".join(f"{part / GIB:.2f}" for part in parts)
        lines.append(f"| {title} | {cells} | {smallest_gpu(memory.total)} |")
    return "\n".join(lines)


def smallest_gpu(total: int) -> str:
    """The smallest GPU for a step: a tenth more than its peak is reserved, and the CUDA context needs 0.5 GiB."""
    needed = (1.1 * total + LIBRARIES) / GIB + 0.5
    size = next((card for card in CARDS if needed <= card), None)
    return f"{size} GB" if size else f"over {math.floor(needed)} GB"
