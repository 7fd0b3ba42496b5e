"""Mean column norms of the pretrained attention projections by position in the UNet (the paper's figure 4).

DeLoRA scales its update by these norms, so they show where its bound is wide and where it is tight.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from diffusers import UNet2DConditionModel

from data.miniature import MINI_SD
from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.errors import InputError
from eval.benchmark.tables import markdown
from eval.study import figures

PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
PARTS = ("down", "mid", "up")
KINDS = {"attn1": "self-attention", "attn2": "cross-attention"}


def column_norms(name_or_path: str | None) -> pd.DataFrame:
    """A row per projection of the UNet, in forward order: place, part, kind, projection, mean_norm, in, out.

    Raises:
        InputError: the model cannot be loaded.
    """
    try:
        unet: Any = UNet2DConditionModel.from_pretrained(name_or_path or MINI_SD, subfolder="unet")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the UNet of {name_or_path} could not be loaded ({reason}); give a pipeline folder or a hub id."
        ) from error
    names = [name for name, _ in unet.named_modules()]
    # The middle block runs between down and up, but is registered last.
    names.sort(key=lambda name: PARTS.index(part) if (part := name.split("_")[0]) in PARTS else -1)
    rows: list[dict[str, Any]] = []
    positions: dict[str, int] = {}
    for name in names:
        block, _, projection = name.partition(".attn")
        kind, _, projection = ("attn" + projection).partition(".")
        if projection in PROJECTIONS and kind in KINDS:
            weight = unet.get_submodule(name).weight.detach().float()
            position = positions.setdefault(block, len(positions))
            row = {"place": position, "part": block.split(".attentions")[0], "kind": KINDS[kind]}
            row |= {"projection": PROJECTIONS[projection], "mean_norm": float(weight.norm(dim=0).mean())}
            rows.append(row | {"in": weight.shape[1], "out": weight.shape[0]})
    return pd.DataFrame(rows)


def write(name_or_path: str | None, path: Path) -> Path:
    """The figure, its data and its caption: ``path`` with .png, .svg, .parquet and .md."""
    rows = column_norms(name_or_path)
    with atomic_write(path.with_suffix(".parquet")) as temporary:
        rows.to_parquet(temporary, index=False)
    figures.plot_positions(rows, path)
    shows = "Mean column norm of the pretrained q, k, v and out by position in the UNet (the paper's figure 4)."
    table = rows.pivot_table(index=["part", "kind"], columns="projection", values="mean_norm", sort=False)
    names = list(PROJECTIONS.values())
    cells = [[part, kind, *(f"{row[name]:.3g}" for name in names)] for (part, kind), row in table.iterrows()]  # pyright: ignore
    parts = [f"![{shows}]({path.name}.png)\n", f"{shows} Mean over the layers of each part:\n"]
    file = path.with_suffix(".md")
    write_text(file, "\n".join([*parts, markdown(["part", "attention", *names], cells, left=2)]))
    return file
