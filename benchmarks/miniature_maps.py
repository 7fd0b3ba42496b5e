"""DeLoRA against LoRA on semantic maps of toybox, with captions and without, on the adapters of a finished study.

``python -m eval study ablation-maps --output_dir STUDIES`` trains mini-sd and scores images that follow maps with their
captions. ``python -m benchmarks.miniature_maps STUDIES`` adds what that study does not measure: images from the same
maps without captions, and the base model, which does not see the maps. Existing images and scores are kept.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from benchmarks.miniature_runs import flags
from benchmarks.reporting import print_and_save
from delora_diffusers.__main__ import main as library
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS as METHOD_TABLE
from delora_diffusers.text_files import read_json
from eval.__main__ import main as evaluate
from eval.study.settings import ablation

METHODS = ("delora", "lora")
CAPTIONS = ("captions", "no captions")


def without_captions(folder: Path) -> Path:
    """A copy of ``folder`` beside it whose metadata has empty captions."""
    copy = folder.with_name(f"{folder.name}-bare")
    if not copy.exists():
        shutil.copytree(folder, copy)
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        (copy / "metadata.jsonl").write_text("".join(json.dumps(line | {"text": ""}) + "\n" for line in lines))
    return copy


def score(folder: Path, maps: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Generate images from these maps to ``folder`` and score them; existing scores are read instead."""
    file = folder.with_suffix(".json")
    if not file.is_file():
        library(["generate", *flags(generation | {"map_dir": maps, "output_dir": folder})])
        AcceleratorState._reset_state(True)
        scoring = {"protocol": "toybox", "generated_dir": folder, "map_dir": maps, "output": file}
        evaluate(["map2img", *flags(scoring)])
        AcceleratorState._reset_state(True)
    return read_json(file)


def score_study(studies: Path) -> list[dict[str, Any]]:
    """A row per method (None for the base model), seed and kind of captions."""
    runs, tests = studies / "runs", studies / "test-maps"
    generation: dict[str, Any] = read_json(runs / "maps-settings.json")["generate"]
    maps = dict(zip(CAPTIONS, (tests, without_captions(tests))))
    rows = []
    for kind in CAPTIONS:
        folder = runs / "maps-base" / kind.replace(" ", "-")
        rows.append({"method": None, "kind": kind} | score(folder, maps[kind], generation | {"seed": 0}))
    default = {method: ablation([method], (), maps=True)[-1] for method in METHODS}
    for method, setting in default.items():
        for folder in sorted((runs / f"maps-{setting.slug}").glob("seed-*")):
            seed = {"adapter": folder / "adapter", "seed": int(folder.name.removeprefix("seed-"))}
            bare = score(folder / "no-captions", maps["no captions"], generation | seed)
            rows.append({"method": method, "kind": "captions"} | read_json(folder / "scores.json"))
            rows.append({"method": method, "kind": "no captions"} | bare)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = ["| | | mIoU | mAcc | aAcc | Frechet distance on mini-dino |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    names = ("miou", "mean_accuracy", "pixel_accuracy", "frechet")
    for kind in CAPTIONS:
        for method in (None, *METHODS):
            scores = [row["scores"] for row in rows if row["method"] == method and row["kind"] == kind]
            cells = []
            for name in names:
                values = [row[name] for row in scores]
                deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{deviation}" if values else "")
            title = "base model, no control" if method is None else METHOD_TABLE[method].title
            lines.append(f"| {kind} | {title} ({len(scores)}) | {' | '.join(cells)} |")
    real = [f"{rows[0]['real'][name]:.3f}" for name in names[:3]]
    lines.append(f"| | real images | {' | '.join(real)} | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_maps", description=__doc__)
    parser.add_argument("studies", type=Path, help="the output folder of the study ablation-maps")
    options = parser.parse_args(argv)
    if not (options.studies / "runs" / "maps-settings.json").is_file():
        raise InputError(f"{options.studies} has no runs of maps; give the output folder of the study ablation-maps.")
    print_and_save(table(score_study(options.studies)), options.studies / "maps.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
