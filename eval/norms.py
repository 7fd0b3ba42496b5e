"""Mean column norms of the attention's pretrained projections by their place in the UNet (the paper's figure 4).

They are the scale that DeLoRA gives its update, so they say where its bound is wide and where narrow.
"""

from pathlib import Path
from typing import Any

from data.errors import InputError
from eval.running import ROOT
from eval.writing import write_text, written_whole

MINIATURE = ROOT / "data" / "miniature" / "mini-sd"
PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
PARTS = ("down", "mid", "up")
KINDS = {"attn1": "self-attention", "attn2": "cross-attention"}


def column_norms(name_or_path: str | None) -> Any:
    """A row for each projection of the UNet, in its order: place, part, kind, projection, mean_norm, in, out.

    Raises:
        InputError: the model cannot be loaded.
    """
    import pandas as pd
    from diffusers import UNet2DConditionModel

    try:
        unet: Any = UNet2DConditionModel.from_pretrained(name_or_path or MINIATURE, subfolder="unet")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the UNet of {name_or_path} could not be loaded ({reason}); name a pipeline.") from error
    order = [name for name, _ in unet.named_modules()]
    # In the order of the forward: the middle lies between the ways down and up, but is registered last.
    order.sort(key=lambda name: PARTS.index(part) if (part := name.split("_")[0]) in PARTS else -1)
    found: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for name in order:
        block, _, projection = name.partition(".attn")
        kind, _, projection = ("attn" + projection).partition(".")
        if projection in PROJECTIONS and kind in KINDS:
            weight = unet.get_submodule(name).weight.detach().float()
            place = places.setdefault(block, len(places))
            one = {"place": place, "part": block.split(".attentions")[0], "kind": KINDS[kind]}
            one |= {"projection": PROJECTIONS[projection], "mean_norm": float(weight.norm(dim=0).mean())}
            found.append(one | {"in": weight.shape[1], "out": weight.shape[0]})
    return pd.DataFrame(found)


def write(name_or_path: str | None, path: Path) -> Path:
    """The figure, its data and its caption: ``path`` with .png, .svg, .parquet and .md."""
    from eval import figures

    rows = column_norms(name_or_path)
    with written_whole(path.with_suffix(".parquet")) as temporary:
        rows.to_parquet(temporary, index=False)
    figures.by_place(rows, path)
    shows = "Mean column norm of the pretrained q, k, v and out by place in the UNet (the paper's figure 4)."
    lines = [f"![{shows}]({path.name}.png)", "", f"{shows} Mean over the places of each part:", ""]
    table = rows.pivot_table(index=["part", "kind"], columns="projection", values="mean_norm", sort=False)
    names = list(PROJECTIONS.values())
    lines += [f"| part | attention | {' | '.join(names)} |", f"| --- | --- |{' ---: |' * len(names)}"]
    for (part, kind), row in table.iterrows():
        lines.append(f"| {part} | {kind} | {' | '.join(f'{row[name]:.3g}' for name in names)} |")
    file = path.with_suffix(".md")
    write_text(file, "\n".join(lines) + "\n")
    return file
