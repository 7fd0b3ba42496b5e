"""Time and peak memory of one training step of transformers at their true shapes with random weights, on a GPU.

    python -m benchmarks.families [--shapes klein zimage sd35 flux-nf4] [--checkpointing] [--only WAY ...]
        [--cap GIB] [--output FILE.json]
    python -m benchmarks.families --rehearse         # the same on tiny models; also on a CPU

A step is that of the training scripts at batch 1, 1,024 pixels and rank 16: forward, loss, backward and, if there is
something to train, gradient clipping and fused AdamW. The base model is in bfloat16, or in nf4. Times are medians of
many steps between CUDA events after a warm-up; the ways take turns and share the frozen weights. Memory is the peak of
what a step allocates, the weights included. The floor is the frozen transformer without an adapter, with gradients
backpropagated to the latents. The "autocast" rows train as diffusers' own scripts do, with float32 adapters under
bfloat16 autocast.

``--cap`` limits what PyTorch may reserve once the weights are in memory, which a single way then uses without a copy.
"""

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.train_step import _load_libraries, cuda_milliseconds
from benchmarks.true_shapes import TRANSFORMERS
from data.tiny_pipelines import KINDS
from delora_diffusers import Adapter, AdapterConfig, attach
from delora_diffusers.adapter.attach import find_targets
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.families.family import Family
from delora_diffusers.families.table import family_of
from delora_diffusers.training.cuda_graph import EAGER_FIRST, MicroBatches
from delora_diffusers.training.objective import denoising_losses
from delora_diffusers.training.setup import checkpoint_denoiser

RANK = 16
GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A base model and what it is trained on.

    Attributes:
        kind: a key of ``KINDS`` and ``TRANSFORMERS``. latents: (channels, height, width) of an image of 1,024 pixels.
        tokens: of the prompt, if the family's ``condition_shapes`` does not say so. nf4: whether it is quantized.
    """

    title: str
    kind: str
    latents: tuple[int, int, int]
    tokens: int = 0
    nf4: bool = False

    @property
    def family(self) -> Family:
        return family_of(KINDS[self.kind].pipeline)


SHAPES = {
    "klein": Shape("FLUX.2-klein-base-4B", "flux2-klein", (128, 64, 64)),
    "zimage": Shape("Z-Image", "zimage", (16, 128, 128)),
    "sd35": Shape("SD3.5-medium", "sd3", (16, 128, 128), tokens=77 + 256),
    "flux-nf4": Shape("Flux.1-dev, nf4", "flux", (16, 128, 128), tokens=512, nf4=True),
}


def build(shape: Shape, rehearse: bool) -> Any:
    """A frozen transformer with random weights in bfloat16, or quantized."""
    import diffusers

    name, config = KINDS[shape.kind].transformer if rehearse else TRANSFORMERS[shape.kind]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            torch.manual_seed(0)
            model = getattr(diffusers, name)(**config).bfloat16().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    if shape.nf4 and DEVICE == "cuda":
        quantize(model, shape.family.UNQUANTIZED)
    shape.family.prepare_to_train(model)
    return model


def quantize(model: Any, skipped: tuple[str, ...]) -> None:
    """Replace linear modules by bitsandbytes', as diffusers does while it loads a model in nf4."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        if set(name.split(".")) & set(skipped):
            continue
        settings: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        four_bit: Any = bitsandbytes.nn.Linear4bit(*sizes, torch.bfloat16, **settings, device="meta")
        four_bit.bias = linear.bias
        weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, module=four_bit, **settings)
        four_bit.weight = weight.to(DEVICE)  # quantizes
        model.set_submodule(name, four_bit)
        linear.weight = None  # frees it
    model.is_loaded_in_4bit = True  # PEFT asks for it


def with_shared_weights(model: nn.Module) -> Any:
    """A copy of a model whose parameters and buffers have the model's memory."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # Dense ones are parameters of their own, because the lean path gives them other memory.
            shared[id(parameter)] = parameter if is_quantized(module) else nn.Parameter(parameter.data, False)
        if is_quantized(module):
            shared[id(module.quant_state)] = module.quant_state
    return copy.deepcopy(model, shared)


def build_batch(shape: Shape, config: Any, rehearse: bool) -> dict[str, Tensor]:
    """A micro-batch of random numbers, as ``denoising_losses`` takes it."""
    channels, *sides = shape.latents
    size = (1, channels, *((8, 8) if rehearse else sides))
    conditions = shape.family.condition_shapes(config)
    if shape.tokens:
        conditions = {
            "encoder_hidden_states": (shape.tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
    return {
        "noisy": torch.randn(size, device=DEVICE),
        "target": torch.randn(size, device=DEVICE),
        "timesteps": torch.rand(1, device=DEVICE),
        "weights": torch.ones(1, device=DEVICE),
        **{name: torch.randn(1, *shape, device=DEVICE).bfloat16() for name, shape in conditions.items()},
    }


Prepare = Callable[[Family, Any], tuple[list[Adapter], list[nn.Parameter]]]
"""Adapts the family's default targets of a transformer; returns the toolkit's adapter and what is trained."""


def floor(family: Family, denoiser: Any) -> tuple[list[Adapter], list[nn.Parameter]]:
    return [], []


def ours(**settings: Any) -> Prepare:
    def prepare(family: Family, denoiser: Any) -> tuple[list[Adapter], list[nn.Parameter]]:
        adapter = attach(denoiser, AdapterConfig(rank=RANK, targets=family.TARGETS, **settings))
        return [adapter], list(adapter.parameters())

    return prepare


def with_peft(config_name: str, dtype: torch.dtype, **settings: Any) -> Prepare:
    def prepare(family: Family, denoiser: Any) -> tuple[list[Adapter], list[nn.Parameter]]:
        import peft

        names = list(find_targets(denoiser, family.TARGETS))
        peft.inject_adapter_in_model(getattr(peft, config_name)(r=RANK, target_modules=names, **settings), denoiser)
        parameters = [p for p in denoiser.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        return [], parameters

    return prepare


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of training. autocast: run under bfloat16 autocast. graph: forward and backward as a CUDA graph."""

    prepare: Prepare
    autocast: bool = False
    graph: bool = False


PEFT_LORA = with_peft("LoraConfig", torch.bfloat16, lora_alpha=2 * RANK)
FLOOR, PEFT = "floor: frozen transformer, no adapter", "PEFT LoRA, bf16 adapters"
WAYS: dict[str, Way] = {
    FLOOR: Way(floor),
    "ours, DeLoRA, lean path": Way(ours(path="lean")),
    PEFT: Way(PEFT_LORA),
    "PEFT LoRA, autocast": Way(with_peft("LoraConfig", torch.float32, lora_alpha=2 * RANK), autocast=True),
    "PEFT DeLoRA, autocast": Way(with_peft("DeloraConfig", torch.float32), autocast=True),
    "floor, CUDA graph": Way(floor, graph=True),
    "ours, DeLoRA, lean path, CUDA graph": Way(ours(path="lean"), graph=True),
    "PEFT LoRA, bf16 adapters, CUDA graph": Way(PEFT_LORA, graph=True),
}
QUANTIZED_WAYS: dict[str, Way] = {
    FLOOR: Way(floor),
    "ours, DeLoRA, split path": Way(ours()),
    "ours, DeLoRA, lean path": Way(ours(path="lean")),
    PEFT: Way(PEFT_LORA),
    "PEFT LoRA, autocast": WAYS["PEFT LoRA, autocast"],
    "floor, CUDA graph": Way(floor, graph=True),
    "ours, DeLoRA, split path, CUDA graph": Way(ours(), graph=True),
    "ours, DeLoRA, lean path, CUDA graph": Way(ours(path="lean"), graph=True),
    "PEFT LoRA, bf16 adapters, CUDA graph": Way(PEFT_LORA, graph=True),
}
"""PEFT's DeLoRA has no layers for quantized modules."""


class Trial:
    """A way of training with its own modules, on the shared weights; its training step can be run at any time."""

    def __init__(self, shape: Shape, base: Any, batch: dict[str, Tensor], way: Way, checkpointing: bool, copied: bool):
        self.family = shape.family
        self.denoiser = with_shared_weights(base) if copied else base
        if checkpointing:
            checkpoint_denoiser(self.denoiser)
        adapters, self.parameters = way.prepare(self.family, self.denoiser)
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        self.noisy = self.batch["noisy"].requires_grad_() if not self.parameters else None
        if self.noisy is not None:
            del self.batch["noisy"]  # nothing may be copied into a leaf
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True) if self.parameters else None
        self.autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=way.autocast)
        self.graph = way.graph
        # The lean path puts adapted weights elsewhere; in a run without other ways, they would not exist twice.
        pointers = {parameter.data_ptr() for parameter in base.parameters()}
        moved = (p for p in self.denoiser.parameters() if not p.requires_grad and p.data_ptr() not in pointers)
        self.moved = sum(parameter.nbytes for parameter in moved)
        self.accumulate = MicroBatches(Accelerator(), adapters, self.parameters, self.losses_of, way.graph)

    def losses_of(self, **batch: Tensor) -> Tensor:
        noisy = batch.pop("noisy") if self.noisy is None else self.noisy
        arguments = (noisy, *(batch.pop(name) for name in ("timesteps", "target", "weights")))
        with self.autocast:
            return denoising_losses(self.family, self.denoiser, *arguments, subjects=1, **batch)

    def step(self) -> None:
        self.accumulate(self.batch)
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=not self.graph)
        elif self.graph:
            self.noisy.grad.zero_()  # pyright: ignore
        else:
            self.noisy.grad = None  # pyright: ignore[reportOptionalMemberAccess]

    def peak_gib(self, others: int, steps: int = 2) -> float:
        """Peak GiB allocated during a step, or while it is recorded as a CUDA graph.

        Args:
            others: bytes that do not count.
        """
        for _ in range(EAGER_FIRST if self.graph else 1):
            self.step()
        if DEVICE == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - others - self.moved) / GIB

    def milliseconds(self, steps: int) -> list[float]:
        """The times of consecutive steps, measured so that nothing waits between the steps."""
        if DEVICE == "cpu":
            marks = [time.perf_counter()]
            for _ in range(steps):
                self.step()
                marks.append(time.perf_counter())
            return [1000 * (end - start) for start, end in itertools.pairwise(marks)]
        return cuda_milliseconds(self.step, steps)


def measure(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median ms of a step and its peak memory in GiB by way, a record each; the ways take turns."""
    before = allocated()
    base = build(shape, options.rehearse)
    batch = build_batch(shape, base.config, options.rehearse)
    weights = allocated() - before
    if options.cap:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * GIB / total)
    parameters = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in base.parameters())
    print(f"{shape.title}: {parameters / 1e9:.2f} B parameters, {weights / GIB:.2f} GiB", flush=True)
    trials: dict[str, Trial] = {}
    peaks: dict[str, float] = {}
    for title, way in (QUANTIZED_WAYS if shape.nf4 and DEVICE == "cuda" else WAYS).items():
        if (way.graph and DEVICE == "cpu") or not is_chosen(title, options.only):
            continue
        others = allocated() - weights
        try:
            trial = Trial(shape, base, batch, way, options.checkpointing, copied=not options.cap)
            peaks[title] = trial.peak_gib(others)
            trials[title] = trial
        except torch.OutOfMemoryError:
            print(f"{title}: out of memory beside the {len(trials)} ways before it", flush=True)
        trial = None
        free()
    times: dict[str, list[float]] = {title: [] for title in trials}
    gc.disable()
    for _ in range(options.rounds):
        for title, trial in trials.items():
            trial.step()
            times[title] += trial.milliseconds(options.steps)
    gc.enable()
    record = {"shape": shape.title, "checkpointing": options.checkpointing, "parameters": parameters}
    return [record | {"way": t, "ms": statistics.median(times[t]), "all_ms": times[t], "gib": peaks[t]} for t in trials]


def is_chosen(title: str, only: list[str] | None) -> bool:
    """Whether a way is to run, given titles or parts of titles; None for all."""
    titles = WAYS.keys() | QUANTIZED_WAYS.keys()
    return only is None or title in only or any(part in title for part in only if part not in titles)


def allocated() -> int:
    """Bytes allocated on the GPU."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def table(records: list[dict[str, Any]]) -> str:
    """A shape's records as a Markdown table."""
    by_way = {record["way"]: record for record in records}
    references = [by_way.get(FLOOR, {}).get("ms"), *(by_way.get(PEFT, {}).get(key) for key in ("ms", "gib"))]
    checkpointing = ", checkpointing" if records[0]["checkpointing"] else ""
    lines = [
        f"| {records[0]['shape']}{checkpointing} | ms | / floor | / {PEFT} | GiB | / {PEFT} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, record in by_way.items():
        values = (record["ms"], record["ms"], record["gib"])
        floor_ms, peft_ms, peft_gib = (f"{v / r:.2f}" if r else "" for v, r in zip(values, references))
        lines.append(f"| {way} | {record['ms']:.1f} | {floor_ms} | {peft_ms} | {record['gib']:.2f} | {peft_gib} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", nargs="+", metavar="WAY", help="run these ways: titles or parts of titles")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--cap", type=float, help="GiB that PyTorch may reserve")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="steps per way and round")
    parser.add_argument("--rehearse", action="store_true", help="use tiny models")
    parser.add_argument("--output", type=Path, help="a file for the records, JSON")
    options = parser.parse_args()
    import diffusers
    import peft

    diffusers.utils.logging.set_verbosity_error()
    if DEVICE == "cuda":
        _load_libraries()
    records: list[dict[str, Any]] = []
    for name in options.shapes:
        records += (measured := measure(SHAPES[name], options))
        free()
        if measured:
            print(f"\n{table(measured)}\n", flush=True)
        if options.output:
            options.output.write_text(json.dumps(records))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}"
    settings = f"rank {RANK}, median of {options.rounds * options.steps} steps"
    print(f"{device}, {versions}, python {platform.python_version()}; {settings}.")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
