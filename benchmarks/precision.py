"""What rounding W' to the model's dtype costs: errors of one projection by size of its update, and trained subjects.

``python -m benchmarks.precision layers`` compares outputs and gradients of each path with float64.
``python -m benchmarks.precision subjects OUT_DIR`` trains mini-sd in several precisions on 8 unseen subjects with 3
seeds, generates with every adapter in float32 and compares scores and distances. Finished runs are kept, so the same
command continues after an interruption.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.miniature_runs import run_all
from benchmarks.miniature_subjects import SUBJECTS, run_one
from benchmarks.reporting import print_and_save
from delora_diffusers.atomic import write_text
from delora_diffusers.dispatch import exit_on_bad_input

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"mixed_precision": "no", "path": "fast"},
    "bf16, fast path": {"mixed_precision": "bf16", "path": "fast"},
    "bf16, lean path": {"mixed_precision": "bf16", "path": "lean"},
    "bf16, split path": {"mixed_precision": "bf16", "path": "split"},
    "fp16, fast path": {"mixed_precision": "fp16", "path": "fast"},
    "bf16 on int8": {"mixed_precision": "bf16", "base_precision": "int8"},
    "bf16 on fp8": {"mixed_precision": "bf16", "base_precision": "fp8"},
    "bf16 on nf4": {"mixed_precision": "bf16", "base_precision": "nf4"},
}
SEEDS = (0, 1, 2)
SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Sizes of the update, |W' - W|_F / |W|_F."""
WIDTHS = (320, 640, 1280)
"""Widths of the square projections of Stable Diffusion 1.5."""


def layer_errors(width: int, size: float, dtype_name: str, path: str, device: str) -> dict[str, float]:
    """Relative errors of one adapted projection against float64, |computed - exact| / |exact|.

    Returns:
        ``weight``: error of the update W' - W that the product uses; ``output``: of the output; ``input``, ``A``,
        ``B``: of the gradients of the input and of the factors.
    """
    import torch
    from torch import nn

    from delora_diffusers import AdapterConfig, attach
    from delora_diffusers.methods.update import delora_factors

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(width, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.to_q(x)

    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    model = Model().to(device, dtype)
    weight = model.to_q.weight.detach().double()
    adapter = attach(model, AdapterConfig(rank=16, targets=("to_q",), path=path, delora_lambda=1.0))
    (stack,) = adapter.stacks
    with torch.no_grad():
        for key in ("A", "B"):
            stack.trainable[key] += stack.trainable[key].std() * torch.randn_like(stack.trainable[key])
        stack.trainable["lambda"] *= size * float(weight.norm()) / next(iter(adapter.distances().values()))
    x = torch.randn(4096, width, device=device).to(dtype).requires_grad_()
    direction = torch.randn(4096, width, device=device).to(dtype)
    y = model(x)
    (y.float() * direction.float()).sum().backward()

    exact = {key: tensor.detach().double() for key, tensor in stack.tensors().items()}
    leaves = [exact[key].requires_grad_() for key in ("A", "B")]
    b, a = delora_factors(exact["A"], exact["B"], exact["lambda"], exact["w_norm"], exact["A0"], exact["B0"])
    update = (b @ a)[0]
    exact_x = x.detach().double().requires_grad_()
    exact_y = exact_x @ (weight + update).T
    gradients = torch.autograd.grad((exact_y * direction.double()).sum(), [exact_x, *leaves])

    def error(computed: torch.Tensor | None, reference: torch.Tensor) -> float:
        assert computed is not None
        return float((computed.double() - reference).norm() / reference.norm())

    (projection,) = stack.projections
    assert projection.weight is not None
    applied = projection.weight.double() - weight
    if projection.a is not None and projection.b is not None:
        applied = applied + (projection.b.double() @ projection.a.double())[0]
    return {
        "weight": error(applied.detach(), update.detach()),
        "output": error(y.detach(), exact_y.detach()),
        "input": error(x.grad, gradients[0]),
        "A": error(stack.trainable["A"].grad, gradients[1]),
        "B": error(stack.trainable["B"].grad, gradients[2]),
    }


def layers_table() -> str:
    """Errors by dtype, size of the update and path; the largest over the widths."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = ("weight", "output", "input", "A", "B")
    lines = [
        "| dtype | size of the update / W | path | update in W' | output | gradient of x | of A | of B |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dtype in ("bfloat16", "float16"):
        for size in SIZES:
            for path in ("fast", "lean", "split"):
                errors = [layer_errors(width, size, dtype, path, device) for width in WIDTHS]
                cells = " | ".join(f"{max(by_column[column] for by_column in errors):.1e}" for column in columns)
                lines.append(f"| {dtype} | {size:g} | {path} | {cells} |")
    return "\n".join([*lines, "", f"Widths {', '.join(map(str, WIDTHS))}; {device}, torch {torch.__version__}."])


def run_subject(task: tuple[Path, int, str | None, dict[str, Any]]) -> dict[str, Any]:
    """Train, generate and score one subject; adds the adapter's mean distance and all distances relative to |W|."""
    result = run_one(task)
    if "relative" in result or task[2] is None:
        return result
    from delora_diffusers import load_adapter
    from delora_diffusers.adapter.base_weights import base_parameter
    from delora_diffusers.families.loading import load_pipeline

    unet = load_pipeline(None).unet
    adapter = load_adapter(unet, task[0] / "adapter")
    distances = adapter.distances()
    weights = {name: float(base_parameter(unet.get_submodule(name)).norm()) for name in distances}
    result["distance"] = statistics.mean(distances.values())
    result["relative"] = [distances[name] / weights[name] for name in distances]
    write_text(task[0] / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def subjects_table(results: list[dict[str, Any]]) -> str:
    """A row per precision and path: means over subjects and seeds with their standard error, minus the first row's."""
    lines = [
        "| trained in | DINO | minus row 1 | CLIP-T | minus row 1 | distance | smallest, median update / W |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = None
    for way in WAYS:
        rows = [r for r in results if r["setting"] == way]
        if not rows:
            continue
        seeds = sorted({r["values"]["seed"] for r in rows})
        by_seed = [[r["scores"] for r in rows if r["values"]["seed"] == seed] for seed in seeds]
        means = {
            score: [statistics.mean(scores[score] for scores in subjects) for subjects in by_seed]
            for score in ("dino", "clip_t")
        }
        errors = {k: statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else float("nan") for k, v in means.items()}
        reference = reference or means
        cells = []
        for score, values in means.items():
            mean = statistics.mean(values)
            cells += [f"{mean:.4f} ± {errors[score]:.4f}", f"{mean - statistics.mean(reference[score]):+.4f}"]
        sizes = [size for r in rows for size in r["relative"]]
        distance = statistics.mean(r["distance"] for r in rows)
        cells += [f"{distance:.3f}", f"{min(sizes):.2f}, {statistics.median(sizes):.2f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    count = len({r["subject"] for r in results})
    lines += ["", f"{count} subjects, seeds {', '.join(map(str, SEEDS))}; ± is the standard error over seeds."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers", help="errors of one projection")
    subjects = commands.add_parser("subjects", help="scores of trained subjects")
    subjects.add_argument("out_dir", type=Path)
    subjects.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at the same time")
    subjects.add_argument("--subjects", type=int, nargs="+", default=SUBJECTS, help="numbers of unseen subjects")
    subjects.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="how to train")
    for command in (layers, subjects):
        command.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.command == "layers":
        table = layers_table()
    else:
        tasks = [
            (options.out_dir / way.replace(",", "").replace(" ", "-") / f"{number:03}-{seed}", number, way, values)
            for way, settings in WAYS.items()
            if way in options.ways
            for seed in SEEDS
            for values in [settings | {"seed": seed}]
            for number in options.subjects
        ]
        results = []
        for result in run_all(run_subject, tasks, options.workers, per_process=None):
            results.append(result)
            summary = {key: result[key] for key in ("subject", "setting", "seconds", "scores", "distance")}
            print(json.dumps(summary), flush=True)
        table = subjects_table(results)
    print_and_save(table, options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
