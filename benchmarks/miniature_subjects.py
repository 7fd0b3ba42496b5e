"""DreamBooth on unseen toybox subjects with mini-sd, scored by the miniature DINO and CLIP.

``python -m benchmarks.miniature_subjects OUT_DIR`` trains on 5 photographs of each subject with the default settings,
draws every prompt with the base model and with the adapter, and writes a table per subject. ``--search`` tries the
settings of ``SEARCH`` on other subjects. Each finished run is kept, so that a stopped one continues.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IDENTIFIER = "sks"
PROMPT_PLACES = ("on the beach", "in the snow", "in the jungle", "on a wooden floor", "at night", "in a meadow")
SUBJECTS = tuple(range(8))
SEARCH_SUBJECTS = (100, 101, 103, 104, 107)
PHOTOGRAPHS, PICTURES = 5, 2
DRAWING: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 4.0, "batch_size": 12}
WIDTH = 140
"""About the width of mini-sd's projections: lambda is the relative bound times its square root."""


def relative(bound: float) -> float:
    return round(bound * WIDTH**0.5, 3)


SEARCH: dict[str, dict[str, Any]] = {
    name: {"learning_rate": 2e-2, **changes}
    for name, changes in {
        "rate 2e-2": {},
        "rate 5e-3": {"learning_rate": 5e-3},
        "rate 1e-2": {"learning_rate": 1e-2},
        "rate 5e-2": {"learning_rate": 5e-2},
        "bound 0.1": {"delora_lambda": relative(0.1)},
        "bound 0.2": {"delora_lambda": relative(0.2)},
        "bound 0.7": {"delora_lambda": relative(0.7)},
        "bound 1.4": {"delora_lambda": relative(1.4)},
        "150 steps": {"max_train_steps": 150},
        "600 steps": {"max_train_steps": 600},
        "batch 1": {"train_batch_size": 1},
        "rate 1e-2, bound 0.2": {"learning_rate": 1e-2, "delora_lambda": relative(0.2)},
        "rate 5e-3, bound 0.7": {"learning_rate": 5e-3, "delora_lambda": relative(0.7)},
    }.items()
}
"""Around the paper's rate, bound 0.35, 300 steps of batch 4."""


def flags(values: dict[str, Any]) -> list[str]:
    """``{"rank": 4}`` as typed flags."""
    typed = []
    for name, value in values.items():
        typed += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return typed


def run_one(task: tuple[Path, int, str | None, dict[str, Any]]) -> dict[str, Any]:
    """Train (or not, where the setting is None), draw and score one subject; a result that is there is read."""
    folder, number, setting, values = task
    result_file = folder / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text())

    from accelerate.state import AcceleratorState

    import train_dreambooth_delora
    from data.toybox.write import write_unseen_subject
    from delora_diffusers.__main__ import main as library
    from eval import dreambooth

    folder.mkdir(parents=True, exist_ok=True)
    photographs = folder / "photographs"
    kind = write_unseen_subject(photographs, number, PHOTOGRAPHS)
    name = f"{IDENTIFIER} {kind}"
    began = time.monotonic()
    common = {"output_dir": folder / "pictures", "num_images": PICTURES, **DRAWING}
    common["prompt"] = [f"a photo of {name} {place}" for place in PROMPT_PLACES]
    if setting is not None:
        training = {"instance_data_dir": photographs, "instance_prompt": f"a photo of {name}"}
        training |= {"output_dir": folder / "adapter", "report_to": "none", **values}
        AcceleratorState._reset_state(reset_partial_state=True)
        train_dreambooth_delora.main(flags(training))
        common["adapter"] = folder / "adapter"
    seconds = time.monotonic() - began
    AcceleratorState._reset_state(reset_partial_state=True)
    library(["generate", *flags(common)])
    options = argparse.ArgumentParser()
    dreambooth.add_arguments(options)
    scoring = {"generated_dir": folder / "pictures", "reference_dir": photographs, "protocol": "toybox"}
    scored = dreambooth.score(options.parse_args(flags(scoring | {"output": folder / "scores.json"})))
    result = {"subject": number, "kind": kind, "setting": setting, "values": values, "seconds": round(seconds, 1)}
    result |= {"scores": scored["scores"], "real": scored["real"]}
    temporary = result_file.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(result_file)
    return result


def quietly(task: tuple, run: Callable[[Any], dict[str, Any]] = run_one) -> dict[str, Any] | None:
    """Run one; what goes wrong with it is said and does not stop the others."""
    import torch

    torch.set_num_threads(1)
    try:
        return run(task)
    except BaseException as error:
        print(f"{task[0]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def subject_table(results: list[dict[str, Any]]) -> str:
    """A row for each subject: base, trained, real, and how far of the way the score came."""
    base = {r["subject"]: r for r in results if r["setting"] is None}
    lines = [
        "| subject | DINO base | trained | real | of the way | CLIP-T base | trained | change |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = [r for r in results if r["setting"] is not None and r["subject"] in base]
    numbers = []
    for r in sorted(rows, key=lambda r: r["subject"]):
        before, after = base[r["subject"]]["scores"], r["scores"]
        numbers.append((before["dino"], after["dino"], r["real"]["dino"], before["clip_t"], after["clip_t"]))
        lines.append(_row(f"{r['subject']}: {r['kind']}", *numbers[-1]))
    if numbers:
        lines.append(_row("mean", *(sum(column) / len(column) for column in zip(*numbers))))
    return "\n".join(lines)


def _row(label: str, d0: float, d1: float, real: float, t0: float, t1: float) -> str:
    way, change = (d1 - d0) / (real - d0), (t1 - t0) / t0
    return f"| {label} | {d0:.3f} | {d1:.3f} | {real:.3f} | {way:.0%} | {t0:.3f} | {t1:.3f} | {change:+.0%} |"


def search_table(results: list[dict[str, Any]]) -> str:
    """A row for each setting, the mean over its subjects."""
    lines = ["| setting | DINO | CLIP-I | CLIP-T | subjects |", "| --- | ---: | ---: | ---: | ---: |"]
    for setting in dict.fromkeys(r["setting"] for r in results):
        rows = [r["scores"] for r in results if r["setting"] == setting]
        means = [sum(row[name] for row in rows) / len(rows) for name in ("dino", "clip_i", "clip_t")]
        cells = " | ".join(f"{value:.3f}" for value in means)
        lines.append(f"| {setting or 'base model'} | {cells} | {len(rows)} |")
    real = {r["subject"]: r["real"]["dino"] for r in results}
    lines.append(f"| real photographs | {sum(real.values()) / max(1, len(real)):.3f} | | | {len(real)} |")
    return "\n".join(lines)


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_subjects", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--search", action="store_true", help="the settings of SEARCH instead of the default")
    parser.add_argument("--subjects", type=int, nargs="+")
    parser.add_argument("--settings", nargs="+", choices=list(SEARCH), help="only these of the search")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(typed)
    if options.settings and not options.search:
        parser.error("--settings names settings of the search; give --search too.")
    settings = {name: SEARCH[name] for name in options.settings or SEARCH} if options.search else {"default": {}}
    tasks = []
    for setting, values in [(None, {}), *settings.items()]:
        for number in options.subjects or (SEARCH_SUBJECTS if options.search else SUBJECTS):
            folder = options.out_dir / (setting or "base").replace(" ", "-").replace(",", "") / f"{number:03}"
            tasks.append((folder, number, setting, values))
    results = []
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(tasks)), maxtasksperchild=8) as pool:
        for result in pool.imap_unordered(quietly, tasks, chunksize=1):
            if result is not None:
                results.append(result)
                print(json.dumps({k: result[k] for k in ("subject", "setting", "seconds", "scores")}), flush=True)
    order = [None, *settings]
    results.sort(key=lambda r: (order.index(r["setting"]), r["subject"]))
    table = search_table(results) if options.search else subject_table(results)
    (options.out_dir / ("search.md" if options.search else "subjects.md")).write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
