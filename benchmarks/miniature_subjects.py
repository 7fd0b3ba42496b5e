"""DreamBooth on unseen toybox subjects with mini-sd, scored with the miniature DINO and CLIP.

``python -m benchmarks.miniature_subjects OUT_DIR`` trains on 5 photos of each subject with the default settings,
generates images for every prompt with the base model and with the adapter, and writes a table with a row per subject.
``--earlier`` also trains with the earlier, larger boundary, and compares the two.
``--search`` compares the settings of ``SEARCH`` on other subjects. Finished runs are kept, so the same command
continues after an interruption.
"""

import argparse
import json
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.miniature_runs import (
    IDENTIFIER,
    IMAGES_PER_PROMPT,
    PROMPT_PLACES,
    generate,
    prepare,
    run_all,
    score,
    toy_number,
    train,
)
from benchmarks.reporting import print_and_save
from delora_diffusers.atomic import write_text
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.outputs import check_writable
from delora_diffusers.training.arguments import positive_int
from eval.benchmark.results import bootstrap_interval
from eval.benchmark.tables import markdown

SUBJECTS = tuple(range(8))
SEARCH_SUBJECTS = (100, 101, 103, 104, 107)
PHOTOS_PER_SUBJECT = 5
WIDTH = 140
"""Approximate width of mini-sd's projections; lambda is the relative bound times the square root of the width."""


def lambda_of(relative_bound: float) -> float:
    """The lambda that gives mini-sd a relative bound."""
    return round(relative_bound * WIDTH**0.5, 3)


SEARCH: dict[str, dict[str, Any]] = {
    name: {"recipe": "paper", "learning_rate": 2e-2, **changes}
    for name, changes in {
        "rate 2e-2": {},
        "rate 5e-3": {"learning_rate": 5e-3},
        "rate 1e-2": {"learning_rate": 1e-2},
        "rate 5e-2": {"learning_rate": 5e-2},
        "bound 0.1": {"delora_lambda": lambda_of(0.1)},
        "bound 0.2": {"delora_lambda": lambda_of(0.2)},
        "bound 0.7": {"delora_lambda": lambda_of(0.7)},
        "bound 1.4": {"delora_lambda": lambda_of(1.4)},
        "150 steps": {"max_train_steps": 150},
        "600 steps": {"max_train_steps": 600},
        "batch 1": {"train_batch_size": 1},
        "rate 1e-2, bound 0.2": {"learning_rate": 1e-2, "delora_lambda": lambda_of(0.2)},
        "rate 5e-3, bound 0.7": {"learning_rate": 5e-3, "delora_lambda": lambda_of(0.7)},
    }.items()
}
"""Changes to a learning rate of 2e-2, a bound of 0.35, and 300 steps of batch 4."""


EARLIER: dict[str, Any] = {"recipe": "paper"}
"""The earlier default, with its larger boundary."""


def run_one(task: tuple[Path, int, str | None, dict[str, Any]]) -> dict[str, Any]:
    """Train (unless the setting is None), generate and score one subject; an existing result is read instead."""
    folder, number, setting, values = task
    result_file = folder / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    prepare(folder, "adapter", "images")

    from data.toybox.write import write_unseen_subject

    photos, images = folder / "photographs", folder / "images"
    kind = write_unseen_subject(photos, number, PHOTOS_PER_SUBJECT)
    subject = f"a photo of {IDENTIFIER} {kind}"
    start = time.monotonic()
    generation: dict[str, Any] = {"output_dir": images, "num_images": IMAGES_PER_PROMPT}
    generation["seed"] = 1000 * values.get("seed", 0)
    generation["prompt"] = [f"{subject} {place}" for place in PROMPT_PLACES]
    if setting is not None:
        train({"instance_data_dir": photos, "instance_prompt": subject, "output_dir": folder / "adapter", **values})
        generation["adapter"] = folder / "adapter"
    seconds = time.monotonic() - start
    generate(generation)
    scored = score(images, photos)
    result = {"subject": number, "kind": kind, "setting": setting, "values": values, "seconds": round(seconds, 1)}
    result |= {"scores": scored["scores"], "real": scored["real"]}
    write_text(result_file, json.dumps(result, indent=1) + "\n")
    return result


def earlier_table(results: list[dict[str, Any]]) -> str:
    """A row per subject, means over its seeds: base model, trained with the earlier and with today's defaults; and the
    mean difference with its 95% bootstrap interval, paired by subject."""
    rows = pd.json_normalize(results)
    rows["setting"] = rows["setting"].fillna("base model")
    titles = {"scores.dino": "DINO", "scores.clip_t": "CLIP-T"}
    tables = {
        title: rows.pivot_table(index=["subject", "kind"], columns="setting", values=name)
        for name, title in titles.items()
    }
    settings = ("base model", "earlier default", "default")
    header = ["subject", *(f"{title}, {setting}" for title in tables for setting in settings)]
    cells = [
        [
            f"{number}: {kind}",
            *(f"{table.loc[(number, kind), name]:.3f}" for table in tables.values() for name in settings),
        ]
        for number, kind in next(iter(tables.values())).index
    ]
    cells.append(["mean", *(f"{table[name].mean():.3f}" for table in tables.values() for name in settings)])
    lines = [markdown(header, cells)]
    for title, table in tables.items():
        change = (table["default"] - table["earlier default"]).to_numpy()
        low, high = bootstrap_interval(np.ones(len(change)), change)
        lines.append(f"{title}, default minus earlier default: {change.mean():+.3f} [{low:+.3f}, {high:+.3f}].")
    return "\n".join(lines)


def subject_table(results: list[dict[str, Any]]) -> str:
    """A row per subject: base model, trained, real images, and how much of the gap between them training closed."""
    base = {r["subject"]: r for r in results if r["setting"] is None}
    lines = [
        "| subject | DINO base | trained | real images | gap closed | CLIP-T base | trained | change |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = [r for r in results if r["setting"] is not None and r["subject"] in base]
    scores = []
    for r in sorted(rows, key=lambda r: r["subject"]):
        before, after = base[r["subject"]]["scores"], r["scores"]
        scores.append((before["dino"], after["dino"], r["real"]["dino"], before["clip_t"], after["clip_t"]))
        lines.append(_row(f"{r['subject']}: {r['kind']}", *scores[-1]))
    if scores:
        lines.append(_row("mean", *(sum(column) / len(column) for column in zip(*scores))))
    return "\n".join(lines)


def _row(label: str, dino_base: float, dino: float, dino_real: float, clip_t_base: float, clip_t: float) -> str:
    gap_closed, change = (dino - dino_base) / (dino_real - dino_base), (clip_t - clip_t_base) / clip_t_base
    cells = [f"{dino_base:.3f}", f"{dino:.3f}", f"{dino_real:.3f}", f"{gap_closed:.0%}"]
    return f"| {label} | {' | '.join([*cells, f'{clip_t_base:.3f}', f'{clip_t:.3f}', f'{change:+.0%}'])} |"


def search_table(results: list[dict[str, Any]]) -> str:
    """A row per setting: means over its subjects."""
    lines = ["| setting | DINO | CLIP-I | CLIP-T | subjects |", "| --- | ---: | ---: | ---: | ---: |"]
    for setting in dict.fromkeys(r["setting"] for r in results):
        rows = [r["scores"] for r in results if r["setting"] == setting]
        means = [sum(row[name] for row in rows) / len(rows) for name in ("dino", "clip_i", "clip_t")]
        cells = " | ".join(f"{value:.3f}" for value in means)
        lines.append(f"| {setting or 'base model'} | {cells} | {len(rows)} |")
    real = {r["subject"]: r["real"]["dino"] for r in results}
    lines.append(f"| real images | {sum(real.values()) / max(1, len(real)):.3f} | | | {len(real)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_subjects", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument(
        "--search", action="store_true", help="compare the settings of SEARCH instead of running the default"
    )
    parser.add_argument("--earlier", action="store_true", help="compare the default with the earlier one")
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--subjects", type=toy_number, nargs="+", help="numbers of unseen subjects")
    parser.add_argument("--settings", nargs="+", choices=list(SEARCH), help="run only these settings of the search")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at the same time")
    options = parser.parse_args(argv)
    if options.settings and not options.search:
        parser.error("--settings selects settings of the search; give --search too.")
    if options.earlier and options.search:
        parser.error("--earlier and --search are two comparisons; give one of them.")
    check_writable(options.out_dir / "base", "OUT_DIR")
    settings = {"default": {}} | ({"earlier default": EARLIER} if options.earlier else {})
    if options.search:
        settings = {name: SEARCH[name] for name in options.settings or SEARCH}
    numbers = options.subjects or (SEARCH_SUBJECTS if options.search else SUBJECTS)
    tasks = []
    for (setting, values), seed, number in product([(None, {}), *settings.items()], range(options.seeds), numbers):
        folder = options.out_dir / (setting or "base").replace(" ", "-").replace(",", "") / f"{number:03}"
        if seed:
            folder = folder.with_name(f"{number:03}-seed-{seed}")
            values = values | {"seed": seed}
        tasks.append((folder, number, setting, values))
    results = []
    for result in run_all(run_one, tasks, options.workers):
        results.append(result)
        print(json.dumps({k: result[k] for k in ("subject", "setting", "seconds", "scores")}), flush=True)
    order = [None, *settings]
    results.sort(key=lambda r: (order.index(r["setting"]), r["subject"]))
    if options.search:
        print_and_save(search_table(results), options.out_dir / "search.md")
    elif options.earlier:
        print_and_save(earlier_table(results), options.out_dir / "earlier.md")
    else:
        print_and_save(subject_table(results), options.out_dir / "subjects.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
