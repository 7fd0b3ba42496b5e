"""The figures of studies, as PNG and SVG."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from delora_diffusers.atomic import atomic_write
from delora_diffusers.image_files import load_rgb
from delora_diffusers.methods.table import METHODS

COLOURS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#2e4057")


def plot_curves(table: pd.DataFrame, axis: str, real: float | None, path: Path) -> None:
    """Three panels over a logarithmic axis: DINO and CLIP-T with their intervals, the distance from the base model.

    Args:
        table: of ``captions.tabulate``.
        axis: what x is. real: DINO of real images (intra-subject).
        path: without a suffix.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = plt.subplots(1, 3, figsize=(13.2, 4.1), layout="constrained")
    for colour, (label, rows) in zip(COLOURS, table.groupby("label", sort=False)):
        style: dict[str, Any] = {"color": colour, "label": label, "marker": "o", "markersize": 4}
        for panel, name in zip(panels, ("dino", "clip_t")):
            panel.plot(rows["x"], rows[name], **style)
            panel.fill_between(
                rows["x"], rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.12, linewidth=0
            )
        panels[2].plot(rows["x"], rows["distance"], **style)
    if real is not None:
        panels[0].axhline(real, color="#888", linewidth=1, linestyle="--")
        panels[0].annotate("real images", (1, real), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    ticks = sorted(table["x"].unique())
    for panel, name in zip(panels, ("DINO", "CLIP-T", "distance |W' - W|, mean over matrices")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [multiple(x) for x in ticks])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.set_ylabel(name)
        panel.spines[["top", "right"]].set_visible(False)
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panels[2].yaxis.set_major_formatter("{x:g}")
    panels[2].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)


def plot_grid(table: pd.DataFrame, axis: str, path: Path) -> None:
    """DINO above CLIP-T, a column of panels per method: a line per number of steps over a logarithmic axis of rates.

    Args:
        table: of ``captions.tabulate``, with ``step_multiplier``.
        axis: what x is. path: without a suffix.
    """
    import matplotlib.pyplot as plt

    methods, steps = list(table["method"].unique()), sorted(table["step_multiplier"].unique())
    size = (0.8 + 3.2 * len(methods), 5.6)
    figure, panels = plt.subplots(2, len(methods), figsize=size, layout="constrained", sharey="row", squeeze=False)
    ticks = sorted(table["x"].unique())
    for column, method in zip(panels.T, methods):
        of_method = table[table["method"] == method]
        column[0].set_title(METHODS[method].title, fontsize=10)
        for panel, (name, _) in zip(column, DINO_AND_CLIP_T):
            for colour, multiplier in zip(COLOURS, steps):
                rows = pd.DataFrame(of_method[of_method["step_multiplier"] == multiplier]).sort_values("x")
                label = f"{multiple(multiplier)}x the default steps"
                panel.plot(rows["x"], rows[name], "o-", color=colour, markersize=4, label=label)
                low, high = rows[f"{name}_low"], rows[f"{name}_high"]
                panel.fill_between(rows["x"], low, high, color=colour, alpha=0.12, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [multiple(x) for x in ticks])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel(axis)
    for panel, (_, title) in zip(panels[:, 0], DINO_AND_CLIP_T):
        panel.set_ylabel(title)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)


STEP_STYLES: tuple[Any, ...] = (":", "-", "--", "-.", (0, (1, 1)), (0, (8, 2)))


def plot_models(tables: Mapping[str, pd.DataFrame], axis: str, path: Path) -> None:
    """DINO above CLIP-T, a column of panels per base model: a colour per method, a line style per number of steps.

    Args:
        tables: by name of the base model, with ``method``, ``step_multiplier``, ``x``, ``dino`` and ``clip_t``.
        axis: what x is. path: without a suffix.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    everything = pd.concat(tables.values())
    methods = list(everything["method"].unique())
    colours = dict(zip(methods, COLOURS if len(methods) <= len(COLOURS) else plt.get_cmap("tab20").colors))
    styles = dict(zip(sorted(everything["step_multiplier"].unique()), itertools.cycle(STEP_STYLES)))
    ticks = sorted(everything["x"].unique())
    size = (0.8 + 2.6 * len(tables), 5.6)
    figure, panels = plt.subplots(2, len(tables), figsize=size, layout="constrained", sharey="row", squeeze=False)
    for column, (model, table) in zip(panels.T, tables.items()):
        column[0].set_title(model, fontsize=10)
        for panel, (name, _) in zip(column, DINO_AND_CLIP_T):
            for setting, rows in table.groupby(["method", "step_multiplier"], sort=False):
                method, multiplier = cast(tuple, setting)
                style = {"color": colours[method], "linestyle": styles[multiplier]}
                panel.plot(*rows.sort_values("x")[["x", name]].to_numpy().T, marker="o", markersize=4, **style)
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [multiple(x) for x in ticks])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel(axis, fontsize=9)
    for panel, (_, title) in zip(panels[:, 0], DINO_AND_CLIP_T):
        panel.set_ylabel(title)
    handles = [Line2D([], [], color=colour, label=METHODS[method].title) for method, colour in colours.items()]
    handles += [
        Line2D([], [], color="#666", linestyle=style, label=f"{multiple(value)}x the default steps")
        for value, style in styles.items()
    ]
    columns = max(1, min(len(handles), int(size[0] / 2.9)))  # titles may be long
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    save(figure, path)


def plot_bounds(table: pd.DataFrame, base: dict[str, float], real: float | None, path: Path) -> None:
    """Three panels over a logarithmic axis of relative bounds: DINO and CLIP-T with their intervals, and the distance
    from the base model relative to its weights; a line per learning rate.

    Args:
        table: of ``captions.tabulate``, with ``relative_distance``. base: DINO and CLIP-T of the base model.
        real: DINO of real images (intra-subject). path: without a suffix.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13.2, 4.1), layout="constrained")
    for colour, (label, rows) in zip(COLOURS, table.groupby("label", sort=False)):
        style: dict[str, Any] = {"color": colour, "label": label, "marker": "o", "markersize": 4}
        for panel, (name, _) in zip(panels, DINO_AND_CLIP_T):
            panel.plot(rows["x"], rows[name], **style)
            low, high = rows[f"{name}_low"], rows[f"{name}_high"]
            panel.fill_between(rows["x"], low, high, color=colour, alpha=0.12, linewidth=0)
        panels[2].plot(rows["x"], rows["relative_distance"], **style)
    references = [(panels[0], base["dino"], "base model"), (panels[1], base["clip_t"], "base model")]
    references += [] if real is None else [(panels[0], real, "real images")]
    for panel, height, text in references:
        panel.axhline(height, color="#888", linewidth=1, linestyle="--")
        panel.annotate(text, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    ticks = sorted(table["x"].unique())
    for panel, title in zip(panels, ("DINO", "CLIP-T", "mean of |W' - W| / |W|")):
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
        panel.minorticks_off()
        panel.set_xlabel("relative bound")
        panel.set_ylabel(title)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)


DINO_AND_CLIP_T = (("dino", "DINO"), ("clip_t", "CLIP-T"))


def plot_rows(
    table: pd.DataFrame, real: float | None, path: Path, scores: Sequence[tuple[str, str]] = DINO_AND_CLIP_T
) -> None:
    """Two scores of each row with their intervals, the first row at the top.

    Args:
        table: with columns NAME, NAME_low and NAME_high of each score, and ``label``.
        real: the first score of real images.
        path: without a suffix. scores: (column, title) of both.
    """
    import matplotlib.pyplot as plt

    size = (10.4, 0.8 + 0.42 * len(table))
    figure, panels = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    heights = range(len(table), 0, -1)
    for panel, (name, title) in zip(panels, scores):
        panel.hlines(heights, table[f"{name}_low"], table[f"{name}_high"], color=COLOURS[0], linewidth=3, alpha=0.35)
        panel.plot(table[name], heights, "o", color=COLOURS[0])
        panel.set_xlabel(title)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(heights, table["label"])
    if real is not None:
        panels[0].axvline(real, color="#888", linewidth=1, linestyle="--")
        panels[0].annotate("real", (real, 1.0), xycoords=("data", "axes fraction"), ha="right", va="top")
    save(figure, path)


def plot_positions(rows: pd.DataFrame, path: Path) -> None:
    """Mean column norms along the UNet: one panel per kind of attention, one line per projection."""
    import matplotlib.pyplot as plt

    kinds = list(rows["kind"].unique())
    figure, panels = plt.subplots(1, len(kinds), figsize=(9.6, 3.8), layout="constrained", sharey=True, squeeze=False)
    starts: Any = rows.groupby("part", sort=False)["place"].min()
    for panel, kind in zip(panels[0], kinds):
        for colour, (projection, group) in zip(COLOURS, rows[rows["kind"] == kind].groupby("projection", sort=False)):
            panel.plot(group["place"], group["mean_norm"], "o-", color=colour, markersize=4, label=projection)
        for start in starts[1:]:
            panel.axvline(start - 0.5, color="#ddd", linewidth=1, zorder=0)
        panel.set_xticks(starts, [part.replace("_blocks", "").replace("_block", "") for part in starts.index])
        panel.tick_params(axis="x", labelrotation=45)
        panel.set_title(kind, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("mean column norm of W")
    panels[0][0].legend(frameon=False)
    save(figure, path)


def multiple(x: float) -> str:
    """A tick label, ``1/8`` to ``32``; no two different values have the same."""
    is_unit_fraction = x < 1 and abs(1 / x - round(1 / x)) < 1e-4
    return f"1/{round(1 / x)}" if is_unit_fraction else f"{x:g}"


def plot_images(
    rows: dict[str, dict[str, Path]], columns: Sequence[str], axis: str | None, title: str, path: Path
) -> None:
    """A grid of images: one row per label, one column per name; missing images leave a gap."""
    import matplotlib.pyplot as plt

    size = (1.0 * len(columns) + 0.4 + 0.07 * max(map(len, rows)), 1.06 * len(rows) + 0.7)
    figure, panels = plt.subplots(len(rows), len(columns), figsize=size, layout="constrained", squeeze=False)
    for row, (label, files) in zip(panels, rows.items()):
        for panel, x in zip(row, columns):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
            if x in files:
                panel.imshow(load_rgb(files[x]))
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
    for panel, x in zip(panels[-1], columns):
        panel.set_xlabel(x, fontsize=9, parse_math=False)
    figure.suptitle(title, fontsize=9, parse_math=False)
    if axis is not None:
        figure.supxlabel(axis, fontsize=9)
    with atomic_write(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")  # keeps long labels
    plt.close(figure)


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG and SVG, and close it."""
    import matplotlib.pyplot as plt

    for suffix in (".png", ".svg"):
        with atomic_write(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=dpi)
    plt.close(figure)
