"""DeLoRA against LoRA on semantic maps of toybox: same rank, same steps, several seeds, as in the paper's table 2.

``python -m benchmarks.miniature_maps OUT_DIR`` renders training and held-out pairs, trains mini-sd with each method and
seed, draws a picture for each held-out map with its caption and with none, and scores them. Each finished run is kept,
so that a stopped one continues. The base model without control is drawn too.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.miniature_subjects import flags, quietly

METHODS = ("delora", "lora")
DRAWING: dict[str, Any] = {"num_inference_steps": 25, "batch_size": 32}
CAPTIONS = ("captions", "no captions")


def without_captions(folder: Path) -> Path:
    """A list of the same maps whose captions are empty, beside the folder."""
    bare = folder.with_name(f"{folder.name}-bare")
    if not bare.exists():
        bare.mkdir()
        lines = []
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            record = json.loads(line)
            name, drawn = (str((folder / record[key]).resolve()) for key in ("file_name", "map"))
            lines.append(json.dumps({"file_name": name, "map": drawn, "text": ""}) + "\n")
        (bare / "metadata.jsonl").write_text("".join(lines))
    return bare


def run_one(task: tuple[Path, Path, Path, str | None, int, dict[str, Any]]) -> dict[str, Any]:
    """Train (or not, where the method is None), draw and score; a result that is there is read."""
    folder, pairs, test, method, seed, training = task
    file = folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    from accelerate.state import AcceleratorState

    import train_controlnet_map2img
    from delora_diffusers.__main__ import main as library
    from eval.__main__ import main as evaluate

    drawing = dict(DRAWING)
    if method is not None:
        more = {"train_data_dir": pairs, "cache_dir": pairs.with_name("cache"), "method": method, "seed": seed}
        train_controlnet_map2img.main(flags(training | more | {"output_dir": folder / "run", "report_to": "none"}))
        AcceleratorState._reset_state(True)
        drawing["adapter"] = folder / "run"
    scores = {}
    for kind, maps in zip(CAPTIONS, (test, without_captions(test))):
        place = folder / kind.replace(" ", "-")
        library(["generate", *flags(drawing | {"map_dir": maps, "output_dir": place, "seed": seed})])
        AcceleratorState._reset_state(True)
        scoring = {"protocol": "toybox", "generated_dir": place, "map_dir": maps, "output": f"{place}.json"}
        evaluate(["map2img", *flags(scoring)])
        AcceleratorState._reset_state(True)
        found = json.loads(Path(f"{place}.json").read_text())
        scores[kind] = {"generated": found["scores"], "real": found["real"]}
    result = {"method": method, "seed": seed, "scores": scores}
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(file)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = ["| | | mIoU | mAcc | aAcc | Frechet (mini-dino) |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    names = ("miou", "mean_accuracy", "pixel_accuracy", "frechet")
    for kind in CAPTIONS:
        for method in (None, *METHODS):
            rows = [r["scores"][kind]["generated"] for r in results if r["method"] == method]
            cells = []
            for name in names:
                values = [row[name] for row in rows]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
            title = {None: "base model, no control", "delora": "DeLoRA", "lora": "LoRA"}[method]
            lines.append(f"| {kind} | {title} ({len(rows)}) | {' | '.join(cells)} |")
    real = results[0]["scores"][CAPTIONS[0]]["real"]
    lines.append(f"| | real pictures | {' | '.join(f'{real[name]:.3f}' for name in names[:3])} | |")
    return "\n".join(lines)


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_maps", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pairs", type=int, default=4000, help="to train on")
    parser.add_argument("--test_maps", type=int, default=200)
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=min(6, os.cpu_count() or 1))
    options = parser.parse_args(typed)
    from data.toybox.__main__ import main as toybox

    out: Path = options.out_dir
    pairs, test = out / "pairs", out / "test"
    for folder, count, seed, more in ((pairs, options.pairs, 5, []), (test, options.test_maps, 6, ["--unseen"])):
        if not folder.exists():
            toybox(["maps", str(folder), "--count", str(count), "--seed", str(seed), *more])
    training = {
        "max_train_steps": options.max_train_steps,
        "train_batch_size": options.train_batch_size,
        "proportion_empty_prompts": 0.5,
        "validation_steps": options.max_train_steps,
        "checkpointing_steps": options.max_train_steps,
    }
    tasks: list[tuple] = [(out / "base", pairs, test, None, 0, training)]
    for method in METHODS:
        tasks += [(out / f"{method}-{seed}", pairs, test, method, seed, training) for seed in options.seeds]
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        results = [r for r in pool.imap_unordered(_quiet, tasks, chunksize=1) if r is not None]
    if not results:
        raise SystemExit("error: no run came to its end; see above.")
    results.sort(key=lambda r: (str(r["method"]), r["seed"]))
    (out / "maps.md").write_text(table(results) + "\n")
    print(table(results))


def _quiet(task: tuple) -> dict[str, Any] | None:
    return quietly(task, run_one)


if __name__ == "__main__":
    main()
