"""What rounding W' to the model's dtype costs: errors of one projection by its update's size, and trained subjects.

``python -m benchmarks.precision layers`` compares outputs and gradients of the fast and the split path with float64.
``python -m benchmarks.precision subjects OUT_DIR`` trains mini-sd on 8 unseen subjects with 3 seeds each way, draws
with every adapter in float32 and compares scores and distances. A finished run is kept; a stopped one continues.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.miniature_subjects import SUBJECTS, quietly, run_one

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"mixed_precision": "no", "path": "fast"},
    "bf16, fast path": {"mixed_precision": "bf16", "path": "fast"},
    "bf16, split path": {"mixed_precision": "bf16", "path": "split"},
    "fp16, fast path": {"mixed_precision": "fp16", "path": "fast"},
}
SEEDS = (0, 1, 2)
SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""|W' - W|_F / |W|_F."""
WIDTHS = (320, 640, 1280)
"""The square projections of Stable Diffusion 1.5."""


def layer_errors(width: int, size: float, dtype_name: str, path: str, device: str) -> dict[str, float]:
    """Relative errors against float64 of one adapted projection, |found - exact| / |exact|.

    Returns:
        ``weight``: of the update W' - W as the product uses it; ``output``; ``input``, ``A``, ``B``: of the gradients.
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
    wide = x.detach().double().requires_grad_()
    whole = wide @ (weight + update).T
    gradients = torch.autograd.grad((whole * direction.double()).sum(), [wide, *leaves])

    def error(found: torch.Tensor | None, right: torch.Tensor) -> float:
        assert found is not None
        return float((found.double() - right).norm() / right.norm())

    (projection,) = stack.projections
    assert projection.weight is not None
    used = projection.weight.double() - weight
    if projection.a is not None and projection.b is not None:
        used = used + (projection.b.double() @ projection.a.double())[0]
    return {
        "weight": error(used.detach(), update.detach()),
        "output": error(y.detach(), whole.detach()),
        "input": error(x.grad, gradients[0]),
        "A": error(stack.trainable["A"].grad, gradients[1]),
        "B": error(stack.trainable["B"].grad, gradients[2]),
    }


def layers_table() -> str:
    """Errors by dtype, path and size of the update, the largest over the widths."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = ("weight", "output", "input", "A", "B")
    lines = [
        "| dtype | size of the update | path | update in W' | output | gradient of x | of A | of B |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dtype in ("bfloat16", "float16"):
        for size in SIZES:
            for path in ("fast", "split"):
                found = [layer_errors(width, size, dtype, path, device) for width in WIDTHS]
                cells = " | ".join(f"{max(one[column] for one in found):.1e}" for column in columns)
                lines.append(f"| {dtype} | {size:g} | {path} | {cells} |")
    return "\n".join([*lines, "", f"Widths {', '.join(map(str, WIDTHS))}; {device}, torch {torch.__version__}."])


def run_subject(task: tuple[Path, int, str | None, dict[str, Any]]) -> dict[str, Any]:
    """Train, draw and score one subject; add its adapter's distances, relative to the weights."""
    result = run_one(task)
    if "relative" in result or task[2] is None:
        return result
    from delora_diffusers import load_adapter
    from delora_diffusers.adapter.projections import base_parameter
    from delora_diffusers.pipelines.base_model import load_pipeline

    unet = load_pipeline(None).unet
    adapter = load_adapter(unet, task[0] / "adapter")
    distances = adapter.distances()
    weights = {name: float(base_parameter(unet.get_submodule(name)).norm()) for name in distances}
    result["distance"] = statistics.mean(distances.values())
    result["relative"] = [distances[name] / weights[name] for name in distances]
    file = task[0] / "result.json"
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(file)
    return result


def subjects_table(results: list[dict[str, Any]]) -> str:
    """A row for each way: means over subjects and seeds, and the difference to float32 beside the seeds' own spread."""
    lines = [
        "| trained in | DINO | - float32 | CLIP-T | - float32 | distance | smallest, median update |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = None
    for way in WAYS:
        rows = [r for r in results if r["setting"] == way]
        if not rows:
            continue
        seeds = {s: [r for r in rows if r["values"]["seed"] == s] for s in sorted({r["values"]["seed"] for r in rows})}
        means = {
            score: [statistics.mean(r["scores"][score] for r in of) for of in seeds.values()]
            for score in ("dino", "clip_t")
        }
        spread = {k: statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else float("nan") for k, v in means.items()}
        reference = reference or means
        cells = []
        for score, values in means.items():
            mean = statistics.mean(values)
            cells += [f"{mean:.4f} ± {spread[score]:.4f}", f"{mean - statistics.mean(reference[score]):+.4f}"]
        sizes = [size for r in rows for size in r["relative"]]
        distance = statistics.mean(r["distance"] for r in rows)
        cells += [f"{distance:.3f}", f"{min(sizes):.2f}, {statistics.median(sizes):.2f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    number = len({r["subject"] for r in results})
    lines += ["", f"{number} subjects, seeds {', '.join(map(str, SEEDS))}; ± is the standard error between seeds."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers")
    subjects = commands.add_parser("subjects")
    subjects.add_argument("out_dir", type=Path)
    subjects.add_argument("--workers", type=int, default=os.cpu_count())
    subjects.add_argument("--subjects", type=int, nargs="+", default=SUBJECTS)
    subjects.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    for one in (layers, subjects):
        one.add_argument("--output", type=Path)
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
        workers = min(options.workers, len(tasks))
        results = []
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for result in pool.imap_unordered(_run_quietly, tasks, chunksize=1):
                if result is not None:
                    results.append(result)
                    shown = {key: result[key] for key in ("subject", "setting", "seconds", "scores", "distance")}
                    print(json.dumps(shown), flush=True)
        table = subjects_table(results)
    print(table)
    if options.output:
        options.output.write_text(table + "\n")


def _run_quietly(task: tuple) -> dict[str, Any] | None:
    return quietly(task, run_subject)


if __name__ == "__main__":
    main()
