"""Rules that choose the boundary of a base model never trained before, against the boundaries that were measured.

    python -m benchmarks.boundary_rules MODEL=ROWS.parquet MODEL=ROWS.parquet ... [--output_dir OUT] [--device cuda]

MODEL is a pipeline folder, a hub id, or mini-sd; ROWS are those of ``python -m eval study boundary`` on it. Each rule
is a quantity that grows with the relative bound b = lambda / sqrt(in). It keeps the value that this quantity has at one
model's knee, and so predicts the knees of the others; every model is the reference in turn. The rules:

- same relative bound: b itself.
- same lambda: lambda, the geometric mean over all adapted matrices of b sqrt(in).
- spectral norm: lambda as a multiple of |W|_2 / max_j |W_j|, the spectral norm over the largest column norm; geometric
  mean over all adapted matrices.
- change of the prediction: |f(W + dW) - f(W)| / |f(W)| for random updates with |dW| = b |W| in every adapted matrix,
  where f is the denoiser's prediction for noise at several timesteps with a few prompts. Needs no data.
- change of the prompt's part: the same with f(x, prompt) - f(x, "") in the place of f.

Writes ``rules.md`` and ``rules.json``.
"""

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from delora_diffusers.atomic import write_text
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from eval.benchmark.tables import markdown
from eval.study.boundary import KNEES, Interval, knees
from eval.study.captions import first_protocol
from eval.study.saved_rows import read_rows

BOUNDS = tuple(float(bound) for bound in np.geomspace(0.0125, 1.6, 8))
"""At which probes are measured; between them they are interpolated."""
PROMPTS = ("a photo", "a photo on the beach", "a photo at night", "")
"""The last one is that of the prompt-free prediction."""
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Timesteps as shares of the noise schedule."""
NOISES = 2
DRAWS = 3
RANK = 16

COLUMNS = ("protocol", "method", "rate_multiplier", "x", "subject", "seed", "dino", "clip_t")
"""What the rows of the study have."""
RULES = {
    "bound": "same relative bound",
    "lambda": "same lambda",
    "spectral": "spectral norm",
    "prediction": "change of the prediction",
    "prompt": "change of the prompt's part",
}


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What a rule keeps constant, as a function of the relative bound: values at increasing bounds, which grow with it.

    Between and beyond the bounds it is linear in logarithms.
    """

    bounds: np.ndarray
    values: np.ndarray

    def at(self, bound: float) -> float:
        return _interpolated(self.bounds, self.values, bound)

    def bound_with(self, value: float) -> float:
        """The bound at which the quantity has this value."""
        return _interpolated(self.values, self.bounds, value)


def _interpolated(x: np.ndarray, y: np.ndarray, at: float) -> float:
    logs_x, logs_y, position = np.log(x), np.log(y), math.log(at)
    k = int(np.clip(np.searchsorted(logs_x, position), 1, len(x) - 1))
    slope = (logs_y[k] - logs_y[k - 1]) / (logs_x[k] - logs_x[k - 1])
    return math.exp(logs_y[k - 1] + slope * (position - logs_x[k - 1]))


def growing(bounds: Sequence[float], values: Sequence[float] | np.ndarray) -> Quantity:
    """A measured quantity up to its maximum; a probe may saturate beyond."""
    kept = [0]
    for k in range(1, len(values)):
        if values[k] > values[kept[-1]]:
            kept.append(k)
    return Quantity(np.asarray(bounds)[kept], np.asarray(values)[kept])


def proportional(factor: float) -> Quantity:
    """A quantity that is a multiple of the bound."""
    ends = np.array([BOUNDS[0], BOUNDS[-1]])
    return Quantity(ends, factor * ends)


def weight_factors(weights: Sequence[Tensor]) -> dict[str, float]:
    """By rule, the quantity at a relative bound of 1: geometric means over matrices W (out, in)."""
    lambdas, spectral = [], []
    for weight in weights:
        in_features = weight.shape[1]
        largest_column = weight.norm(dim=0).max()
        lambdas.append(math.sqrt(in_features))
        spectral.append(math.sqrt(in_features) / float(torch.linalg.matrix_norm(weight, 2) / largest_column))
    return {name: math.exp(np.log(values).mean()) for name, values in (("lambda", lambdas), ("spectral", spectral))}


@torch.no_grad()
def measure(name: str | None, device: torch.device | str, targets: Sequence[str] | None = None) -> dict[str, Quantity]:
    """The quantity of every rule on a base model.

    Args:
        name: see ``open_model``. targets: modules to adapt; the family's by default.
    """
    from delora_diffusers import AdapterConfig, attach
    from delora_diffusers.families.loading import open_model
    from delora_diffusers.pipelines.conditions import conditions, read_prompts

    model = open_model(name)
    family = model.family
    encoded: dict[str, Tensor] = {}
    for encoder in model.text_encoders:
        model.load(encoder, torch.float32, device)
        encoded |= read_prompts(model.pipeline, encoder, PROMPTS, device)
        model.drop(encoder)
    denoiser = model.load(family.DENOISER, torch.float32, device)
    denoiser.eval()
    prompts = conditions(model.pipeline, encoded, denoiser.config)
    rank = min(RANK, *(min(w.shape) for w in adapted_weights(denoiser, targets or family.TARGETS)))
    config = AdapterConfig(rank=rank, start="zero", relative_bound=1.0, targets=tuple(targets or family.TARGETS))
    factors = weight_factors(adapted_weights(denoiser, config.targets))
    adapter = attach(denoiser, config, torch.Generator().manual_seed(0))
    predict = predictions(model, denoiser, prompts, torch.device(device))
    adapter.strength = 0.0
    base = predict()
    curves = {"prediction": np.zeros(len(BOUNDS)), "prompt": np.zeros(len(BOUNDS))}
    for draw in range(DRAWS):
        randomize(adapter, torch.Generator().manual_seed(1 + draw))
        for k, bound in enumerate(BOUNDS):
            adapter.strength = bound
            changes = relative_changes(predict(), base)
            for rule, change in changes.items():
                curves[rule][k] += change / DRAWS
    quantities = {rule: growing(BOUNDS, values) for rule, values in curves.items()}
    return quantities | {rule: proportional(factor) for rule, factor in ({"bound": 1.0} | factors).items()}


def adapted_weights(denoiser: Any, targets: Sequence[str]) -> list[Tensor]:
    """The weights that an adapter with these targets changes, (out, in) each."""
    from delora_diffusers.adapter.attach import find_targets

    return [linear.weight.detach().float() for linear in find_targets(denoiser, tuple(targets)).values()]


@torch.no_grad()
def randomize(adapter: Any, generator: torch.Generator) -> None:
    """Make every update random, with ``|dW|_F = |W|_F``.

    The bound ``|dW| <= lambda`` is reached by aligned terms only. Random terms are almost orthogonal, so lambda is
    raised until the norm of their sum is that of the bound.
    """
    adapter.strength = 1.0
    for stack in adapter.stacks:
        for key in ("A", "B"):
            tensor = stack.trainable[key]
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    norms = {name: float(module.weight.detach().norm()) for name, module, _ in adapter.sites()}
    distances = adapter.distances()
    for stack in adapter.stacks:
        ratios = [norms[name] / distances[name] for name in stack.names]
        stack.trainable["lambda"].mul_(torch.tensor(ratios).to(stack.trainable["lambda"]))


def predictions(model: Any, denoiser: Any, prompts: Mapping[str, Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that gives the denoiser's predictions for noise, (times, prompts, noises, values).

    Noise and timesteps are the same for all prompts and at every call.
    """
    family = model.family
    channels, pixels = family.latent_shape(model.skeletons["vae"].config)
    side = getattr(denoiser.config, "sample_size", None) or 512 // pixels
    side = min(side, 64) // family.PATCH * family.PATCH
    noise = torch.randn(NOISES, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    count = len(PROMPTS)
    repeated = {name: tensor.repeat_interleave(NOISES, dim=0) for name, tensor in prompts.items()}
    if family.HAS_SIZES:
        size = side * pixels
        repeated["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]] * count * NOISES).to(noise)
    steps = getattr(model.pipeline.scheduler.config, "num_train_timesteps", 1000)

    def predict() -> Tensor:
        with torch.no_grad():
            rows = []
            for share in TIMES:
                at = torch.full((count * NOISES,), share if family.IS_FLOW else round(share * (steps - 1)))
                output = family.predict(denoiser, noise.repeat(count, 1, 1, 1), at.to(device), **repeated)
                rows.append(output.float().reshape(count, NOISES, -1))
            return torch.stack(rows)

    return predict


def relative_changes(adapted: Tensor, base: Tensor) -> dict[str, float]:
    """``|adapted - base| / |base|`` of the prediction, and of its part that depends on the prompt.

    Args:
        adapted, base: (times, prompts, noises, values); the last prompt is the empty one.
    """

    def change(after: Tensor, before: Tensor) -> float:
        return float((after - before).norm() / before.norm())

    parts = [tensor[:, :-1] - tensor[:, -1:] for tensor in (adapted, base)]
    return {"prediction": change(adapted, base), "prompt": change(*parts)}


def predicted(quantities: Mapping[str, Quantity], measured: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(reference, model, predicted bound) for every ordered pair of models.

    Args:
        quantities: of one rule, by model. measured: knees by model.
    """
    return [
        (reference, model, quantities[model].bound_with(quantities[reference].at(measured[reference])))
        for reference, model in itertools.permutations(measured, 2)
    ]


def spread(pairs: Sequence[tuple[str, str, float]], measured: Mapping[str, float]) -> float:
    """The standard deviation of ``log(predicted / measured)`` over all pairs. Its mean over them is about zero, since
    every model is the reference of every other; the deviation is from zero."""
    return float(np.sqrt(np.mean([math.log(bound / measured[model]) ** 2 for _, model, bound in pairs])))


def compare(
    quantities: Mapping[str, Mapping[str, Quantity]], measured: Mapping[str, Mapping[str, Interval]]
) -> dict[str, Any]:
    """By knee: what was measured, and by rule its spread, its predictions and the value that it keeps on each model.

    Args:
        quantities: by model and rule. measured: by model and knee.
    """
    result: dict[str, Any] = {}
    for knee in KNEES:
        values = {model: by_knee[knee][0] for model, by_knee in measured.items()}
        rules = {}
        for rule in RULES:
            of_rule = {model: by_rule[rule] for model, by_rule in quantities.items()}
            pairs = predicted(of_rule, values)
            rules[rule] = {
                "spread": spread(pairs, values),
                "kept": {model: of_rule[model].at(values[model]) for model in values},
                "predicted": [
                    {"reference": reference, "model": model, "predicted": bound, "measured": values[model]}
                    for reference, model, bound in pairs
                ],
            }
        result[knee] = {"measured": {model: list(by_knee[knee]) for model, by_knee in measured.items()}, "rules": rules}
    return result


def report(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown: for each knee a row per rule."""
    parts = []
    for knee, meaning in KNEES.items():
        measured, rules = result[knee]["measured"], result[knee]["rules"]
        models = list(measured)
        header = ["rule", "spread (log)", "factor", *(f"{model}, predicted from the others" for model in models)]
        intervals = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in measured.values()]
        cells = [["measured", "", "", *intervals]]
        for rule, title in RULES.items():
            pairs = rules[rule]["predicted"]
            by_model = [", ".join(f"{p['predicted']:.3f}" for p in pairs if p["model"] == model) for model in models]
            deviation = rules[rule]["spread"]
            cells.append([title, f"{deviation:.3f}", f"{math.exp(deviation):.2f}", *by_model])
        kept = [[title, *(f"{value:.3g}" for value in rules[rule]["kept"].values())] for rule, title in RULES.items()]
        parts += [f"{meaning}.\n", markdown(header, cells)]
        parts += ["What each rule would keep constant, at the measured bounds:\n", markdown(["rule", *models], kept)]
    parts.append(
        "Spread: standard deviation of log(predicted / measured), every model the reference of every other. Factor:\n"
        "its exponential. In brackets: 95% bootstrap interval over subjects."
    )
    return "\n".join(parts)


def read_knees(
    file: Path, rate: float | None = None, bounds: tuple[float, float] = (0, math.inf)
) -> dict[str, Interval]:
    """The knees of a base model.

    Args:
        file: rows of the study ``boundary``. rate: multiple of the default rate whose rows count; None for all.
        bounds: the lowest and the highest relative bound whose rows count.

    Raises:
        InputError: the file has no rows of the base model or of that rate.
    """
    rows = first_protocol(read_rows(file, COLUMNS, "give the boundary.parquet of a finished study"))
    if rate is not None:
        rows = rows[(rows["method"] == "none") | np.isclose(rows["rate_multiplier"], rate)]
    rows = rows[(rows["method"] == "none") | rows["x"].between(*bounds)]
    counts = rows["method"].value_counts()
    if not counts.get("none") or not counts.get("delora"):
        raise InputError(f"{file} lacks rows of the base model or of DeLoRA; run eval study boundary to its end.")
    return knees(pd.DataFrame(rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.boundary_rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL=ROWS.parquet", help="at least two")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--rate", type=float, help="use the rows at this multiple of the default rate; default: all")
    parser.add_argument(
        "--bounds",
        type=float,
        nargs=2,
        default=(0.0, math.inf),
        metavar=("LOW", "HIGH"),
        help="use the rows within these relative bounds; default: all",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    pairs = [word.rpartition("=") for word in options.models]
    if len(pairs) < 2 or not all(name and file for name, _, file in pairs):
        raise InputError("give at least two base models, each as MODEL=ROWS.parquet.")
    labels = [Path(name).name for name, _, _ in pairs]
    if len(set(labels)) < len(labels):
        raise InputError(f"two base models are named {max(labels, key=labels.count)}; rename the folder of one.")
    measured = {
        label: read_knees(Path(file), options.rate, tuple(options.bounds)) for label, (_, _, file) in zip(labels, pairs)
    }
    quantities = {}
    for label, (name, _, _) in zip(labels, pairs):
        start = time.monotonic()
        quantities[label] = measure(name, options.device)
        print(f"{label}: measured in {time.monotonic() - start:.1f} s", flush=True)
    result = compare(quantities, measured)
    print(report(result))
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        curves = {
            label: {rule: [q.bounds.tolist(), q.values.tolist()] for rule, q in by_rule.items()}
            for label, by_rule in quantities.items()
        }
        text = json.dumps({"comparison": result, "quantities": curves}, indent=1)
        write_text(options.output_dir / "rules.json", text + "\n")
        write_text(options.output_dir / "rules.md", report(result) + "\n")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
