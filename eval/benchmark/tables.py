"""Tables of a benchmark as Markdown and LaTeX."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from eval.benchmark.results import SCORES
from eval.metrics.protocols import PROTOCOLS

PUBLISHED = {
    "delora": [
        ("real images", {"dino": 0.703, "clip_i": 0.864}),
        ("DeLoRA r=16, three seeds", {"dino": 0.686, "clip_i": 0.820}),
        ("DeLoRA r=16, tuned", {"dino": 0.693, "clip_i": 0.820}),
        ("LoRA r=16", {"dino": 0.686, "clip_i": 0.818}),
        ("DreamBooth", {"dino": 0.644, "clip_i": 0.793}),
    ],
    "dreambooth": [("real images", {"dino": 0.774, "clip_i": 0.885})],
}
PUBLISHED["oft"] = PUBLISHED["delora"]  # which of the two pairings they hold is not known
"""Published results by protocol, on DreamBooth's 30 subjects with Stable Diffusion 1.5 (DeLoRA, arXiv 2503.18225; Ruiz
et al., CVPR 2023)."""


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def interval(score: dict[str, Any] | None) -> str:
    """``0.686 [0.660, 0.710]``"""
    return "-" if score is None else f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def summary_rows(
    runs: Sequence[tuple[str, dict[str, Any]]], protocol: str, benchmark: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each run, real images, and the published results of the protocol.

    Published results are shown only if the runs are comparable: the benchmark is dreambooth and the encoders are those
    of the protocol.

    Args:
        runs: (label, summary under the protocol) of each run.
        protocol, benchmark: their names.
    """
    models, standard = runs[0][1]["models"], PROTOCOLS[protocol]
    comparable = benchmark == "dreambooth" and (models["dino"], models["clip"]) == (standard.dino, standard.clip)
    names = [name for name in SCORES if any(name in summary["scores"] for _, summary in runs)]
    rows = [[label, *(interval(summary["scores"].get(name)) for name in names)] for label, summary in runs]
    real = runs[0][1]["real"]
    rows.append(["real images", *(interval(real.get(name)) for name in names)])
    for label, values in PUBLISHED.get(protocol, []) if comparable else []:
        rows.append([f"published: {label}", *(number(values.get(name)) for name in names)])
    return ["", *(SCORES[name] for name in names)], rows


def subject_rows(subjects: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the scores of each subject, means over its seeds."""
    names = [name for name in SCORES if name in subjects and subjects[name].notna().any()]
    means = subjects.groupby("subject", sort=False)[[*names, "real_dino", "real_clip_i"]].mean()
    header = ["subject", *(SCORES[name] for name in names), "real DINO", "real CLIP-I"]
    return header, [[str(subject), *(number(value) for value in row)] for subject, row in means.iterrows()]


def seed_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the scores of each seed, and their standard deviation over seeds."""
    seeds = pd.DataFrame(summary["by_seed"]).T
    rows = [[f"seed {seed}", *(number(value) for value in row)] for seed, row in seeds.iterrows()]
    rows.append(["standard deviation", *(number(value) for value in seeds.std())])
    return ["", *(SCORES[str(name)] for name in seeds)], rows


def step_rows(summary: dict[str, Any], protocol: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the scores after each number of training steps; the kept one is marked."""
    header = ["training steps", *(SCORES[name] for name in ("dino", "clip_i", "clip_t"))]
    rows = []
    for step, scores in summary["steps"][protocol].items():
        label = f"{step} (kept)" if int(step) == summary["step"] else step
        rows.append([label, *(number(scores[name]) for name in ("dino", "clip_i", "clip_t"))])
    return header, rows


def prompt_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the scores of each prompt, means over all its images."""
    header = ["prompt", *(SCORES[name] for name in ("dino", "clip_i", "clip_t"))]
    rows = [[prompt, *(number(value) for value in row.values())] for prompt, row in summary["by_prompt"].items()]
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table. The first ``left`` columns are aligned to the left, the others to the right."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A booktabs table."""

    def cells(line: Sequence[str]) -> str:
        return " & ".join(_escaped(cell) for cell in line) + r" \\"

    body = "\n".join(cells(row) for row in rows)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_escaped(caption)}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n\\toprule\n{cells(header)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def _escaped(text: str) -> str:
    marks = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(marks.get(c, f"\\{c}" if c in "&%$#_" else c) for c in text)
