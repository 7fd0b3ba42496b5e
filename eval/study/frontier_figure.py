"""The figures of the study ``frontier``: points, envelopes and their bands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.study.figures import COLOURS, save
from eval.study.frontier_analysis import Analysis, Result
from eval.study.frontier_settings import CLIP_T_DROP

STYLES: dict[str, tuple[str, str]] = {
    "delora": (COLOURS[0], "-"),
    "lora": (COLOURS[1], "-"),
    "dora": (COLOURS[2], "-"),
    "etherplus": (COLOURS[3], "-"),
    "coft": (COLOURS[4], "-"),
    "full": (COLOURS[5], "-"),
    "delora-frobenius": ("#e07a1f", "-"),
    "delora-zero": ("#6a4c93", "--"),
    "delora-frobenius-zero": ("#3a7d34", "-."),
}
"""Colour and line of each variant; those of DeLoRA share a panel with DeLoRA and LoRA only."""
POINTS: dict[str, Any] = {"markersize": 3, "alpha": 0.45, "markeredgewidth": 0}
NOTE: dict[str, Any] = {"color": "#555", "fontsize": 9}
SMALL = ("delora", "lora", "dora", "etherplus")
MOST_BANDS = 3
"""With more envelopes in a panel their bands hide one another; those of the differences, below, are kept."""
SHOWN_BELOW = 5
"""How many times the target's distance from the base model the axis of CLIP-T extends below the base model."""


Ranges = tuple[tuple[float, float], tuple[float, float]]
"""The ranges of the horizontal and of the vertical axis."""


def plot(analysis: Analysis, path: Path) -> None:
    """Above, DINO against CLIP-T of the methods and of the variants of DeLoRA, and DINO against drift; below, the
    difference from the reference's envelope.

    Args:
        path: without a suffix.
    """
    import matplotlib.pyplot as plt

    results = {result.scores.key: result for result in analysis.results}
    methods = [result for key, result in results.items() if not key.startswith("delora-")]
    variants = [result for key, result in results.items() if key.startswith("delora") or key == analysis.reference]
    has_variants = len(methods) < len(results)
    groups = [("Methods", methods)] if len(methods) > has_variants else []
    groups += [("Variants of DeLoRA", variants)] if has_variants else []
    count = len(groups) + analysis.has_drift
    size = (0.6 + 5.0 * count, 8.6)
    figure, panels = plt.subplots(
        2, count, figsize=size, layout="constrained", squeeze=False, sharex="col", height_ratios=(3, 2)
    )
    ranges = limits(analysis, analysis.results)
    for (upper, lower), (title, group) in zip(panels.T, groups):
        upper.set_title(f"{title}\n", fontsize=11, loc="left")
        _draw_fidelity(upper, analysis, group, ranges)
        _draw_difference(lower, analysis, group, "fidelity")
        lower.set_xlabel("CLIP-T (prompt fidelity)")
    if analysis.has_drift:
        upper, lower = panels[:, -1]
        upper.set_title("Drift\n", fontsize=11, loc="left")
        _draw_drift(upper, analysis, groups[0][1], ranges)
        _draw_difference(lower, analysis, groups[0][1], "drift")
        lower.set_xlabel("drift on prompts without the subject")
    handles: dict[str, Any] = {}
    for panel in panels[0]:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels())}
    columns = min(len(handles), 2 * count)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    save(figure, path)


def plot_small(analysis: Analysis, path: Path, width: int = 700) -> None:
    """DINO against CLIP-T of four methods, for a README; ``width`` is in pixels."""
    import matplotlib.pyplot as plt

    chosen = [result for result in analysis.results if result.scores.key in SMALL] or analysis.results[:4]
    with plt.rc_context({"font.size": 11}):
        figure, panel = plt.subplots(figsize=(width / 100, 4.6), layout="constrained")
        _draw_fidelity(panel, analysis, chosen, limits(analysis, chosen))
        panel.set_xlabel("CLIP-T (prompt fidelity)")
        handles, labels = panel.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        save(figure, path, dpi=100)


def limits(analysis: Analysis, results: Sequence[Result]) -> Ranges:
    """The ranges of CLIP-T and DINO that are shown, where prompts are still followed and subjects are learned."""
    drop = analysis.base - analysis.target or CLIP_T_DROP
    x, y = (np.concatenate([_means(result, name) for result in results]) for name in ("clip_t", "dino"))
    left = min(max(x.min(), analysis.base - SHOWN_BELOW * drop), analysis.target)
    right, top = max(x.max(), analysis.base), y[x >= left].max(initial=analysis.base_dino)
    weakest = min(result.at_target.value for result in results)
    bottom = max(weakest - max(top - weakest, 0.02), min(y.min(), analysis.base_dino) - 0.02)
    margin = 0.03 * (right - left) or 0.01
    return (left - margin, right + margin), (bottom, top + 0.1 * (top - bottom))


def _means(result: Result, name: str) -> Any:
    """The mean of a score at each point of a method, without the base model."""
    return getattr(result.scores, name)[:-1].mean(axis=(1, 2))


def _draw_fidelity(
    panel: Any,
    analysis: Analysis,
    results: Sequence[Result],
    ranges: Ranges,
) -> None:
    panel.set_xlim(*ranges[0])
    panel.set_ylim(*ranges[1])
    for result in results:
        (colour, line), label = STYLES[result.scores.key], result.scores.label
        panel.plot(_means(result, "clip_t"), _means(result, "dino"), "o", color=colour, **POINTS)
        panel.plot(analysis.grid, result.fidelity.value, line, color=colour, linewidth=1.8, label=label)
        if len(results) <= MOST_BANDS:
            low, high = result.fidelity.low, result.fidelity.high
            panel.fill_between(analysis.grid, low, high, color=colour, alpha=0.08, linewidth=0)
    _mark(panel, analysis)
    for x, text, side in ((analysis.target, "target", "right"), (analysis.base, "base model", "center")):
        panel.annotate(text, (x, 1.01), xycoords=("data", "axes fraction"), ha=side, va="bottom", **NOTE)
    if np.isfinite(analysis.real_dino):
        text = f"real images: DINO {analysis.real_dino:.3f}"
        panel.annotate(text, (0.02, 0.02), xycoords="axes fraction", **NOTE)
    _finish(panel, "DINO (subject fidelity)")


def _draw_drift(panel: Any, analysis: Analysis, results: Sequence[Result], ranges: Ranges) -> None:
    """DINO against drift: the higher and the further left the better."""
    shown = np.empty(0)
    for result in results:
        (colour, line), label = STYLES[result.scores.key], result.scores.label
        kept = _means(result, "clip_t") >= ranges[0][0]
        drift, dino = _means(result, "drift")[kept], _means(result, "dino")[kept]
        shown = np.concatenate([shown, drift[dino >= ranges[1][0]]])
        panel.plot(drift, dino, "o", color=colour, **POINTS)
        if result.drift is not None:
            panel.plot(analysis.drift_grid, result.drift.value, line, color=colour, linewidth=1.8, label=label)
            if len(results) <= MOST_BANDS:
                low, high = result.drift.low, result.drift.high
                panel.fill_between(analysis.drift_grid, low, high, color=colour, alpha=0.08, linewidth=0)
    if len(shown):
        margin = 0.1 * np.ptp(shown) or 0.01
        panel.set_xlim(shown.min() - margin, shown.max() + margin)
    panel.set_ylim(*ranges[1])
    _finish(panel, "DINO (subject fidelity)")


def _draw_difference(panel: Any, analysis: Analysis, results: Sequence[Result], kind: str) -> None:
    """The difference of each envelope from the reference's, with its band."""
    grid = analysis.grid if kind == "fidelity" else analysis.drift_grid
    left, right = panel.get_xlim()
    # Near the base model the envelopes are so steep that their difference is mostly noise.
    shown = (grid >= left) & (grid <= ((analysis.target + analysis.base) / 2 if kind == "fidelity" else right))
    heights = [0.0]
    for result in results:
        (colour, line), values = STYLES[result.scores.key], getattr(result, kind)
        panel.plot(grid[shown], values.difference[shown], line, color=colour, linewidth=1.8)
        heights += [*values.difference[shown]]
        if result.scores.key != analysis.reference:
            low, high = values.difference_low[shown], values.difference_high[shown]
            panel.fill_between(grid[shown], low, high, color=colour, alpha=0.12, linewidth=0)
            if kind == "fidelity":
                heights += [*low, *high]
    if kind == "fidelity":
        _mark(panel, analysis)
    margin = 0.06 * (max(heights) - min(heights)) or 0.01
    panel.set_ylim(min(heights) - margin, max(heights) + margin)
    _finish(panel, f"DINO minus {analysis.reference_label}'s")


def _mark(panel: Any, analysis: Analysis) -> None:
    """Lines at the CLIP-T of the base model and at the target."""
    for x, style in ((analysis.base, "--"), (analysis.target, ":")):
        panel.axvline(x, color="#777", linewidth=1, linestyle=style, zorder=0)


def _finish(panel: Any, label: str) -> None:
    panel.set_ylabel(label)
    panel.spines[["top", "right"]].set_visible(False)
