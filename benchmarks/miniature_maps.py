"""DeLoRA against LoRA on semantic maps of toybox, with the same rank and steps and several seeds; the paper's table 2.

``python -m benchmarks.miniature_maps OUT_DIR`` renders training and held-out pairs, trains mini-sd with each method and
seed, generates an image for each held-out map with its caption and without, and scores the images. The base model
without the control signal is scored too. Finished runs are kept, so the same command continues after an interruption.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.miniature_subjects import flags, run_or_report
from benchmarks.reporting import print_and_save
from delora_diffusers.atomic import write_text
from delora_diffusers.methods.table import METHODS as METHOD_TABLE

METHODS = ("delora", "lora")
GENERATION: dict[str, Any] = {"num_inference_steps": 25, "batch_size": 32}
CAPTIONS = ("captions", "no captions")


def without_captions(folder: Path) -> Path:
    """A folder beside ``folder`` whose metadata lists the same images and maps with empty captions."""
    copy = folder.with_name(f"{folder.name}-bare")
    if not copy.exists():
        copy.mkdir()
        lines = []
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            record = json.loads(line)
            paths = {key: str((folder / record[key]).resolve()) for key in ("file_name", "map")}
            lines.append(json.dumps(paths | {"text": ""}) + "\n")
        (copy / "metadata.jsonl").write_text("".join(lines))
    return copy


def run_one(task: tuple[Path, Path, Path, str | None, int, dict[str, Any]]) -> dict[str, Any]:
    """Train (unless the method is None), generate and score; an existing result is read instead."""
    folder, pairs, test, method, seed, training = task
    result_file = folder / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    outputs = {kind: folder / kind.replace(" ", "-") for kind in CAPTIONS}
    for output in (folder / "run", *outputs.values()):  # an interrupted run starts from scratch
        shutil.rmtree(output, ignore_errors=True)
        for suffix in (".json", ".png"):
            output.with_suffix(suffix).unlink(missing_ok=True)
    from accelerate.state import AcceleratorState

    import train_controlnet_map2img
    from delora_diffusers.__main__ import main as library
    from eval.__main__ import main as evaluate

    generation: dict[str, Any] = GENERATION | {"seed": seed}
    if method is not None:
        run = {"train_data_dir": pairs, "cache_dir": pairs.with_name("cache"), "method": method, "seed": seed}
        train_controlnet_map2img.main(flags(training | run | {"output_dir": folder / "run", "report_to": "none"}))
        AcceleratorState._reset_state(True)
        generation["adapter"] = folder / "run"
    scores = {}
    for kind, maps in zip(CAPTIONS, (test, without_captions(test))):
        generated, scores_file = outputs[kind], outputs[kind].with_suffix(".json")
        library(["generate", *flags(generation | {"map_dir": maps, "output_dir": generated})])
        AcceleratorState._reset_state(True)
        scoring = {"protocol": "toybox", "generated_dir": generated, "map_dir": maps, "output": scores_file}
        evaluate(["map2img", *flags(scoring)])
        AcceleratorState._reset_state(True)
        scored = json.loads(scores_file.read_text())
        scores[kind] = {"generated": scored["scores"], "real": scored["real"]}
    result = {"method": method, "seed": seed, "scores": scores}
    write_text(result_file, json.dumps(result, indent=1) + "\n")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = ["| | | mIoU | mAcc | aAcc | Frechet distance on mini-dino |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    names = ("miou", "mean_accuracy", "pixel_accuracy", "frechet")
    for kind in CAPTIONS:
        for method in (None, *METHODS):
            rows = [r["scores"][kind]["generated"] for r in results if r["method"] == method]
            cells = []
            for name in names:
                values = [row[name] for row in rows]
                deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{deviation}" if values else "")
            title = "base model, no control" if method is None else METHOD_TABLE[method].title
            lines.append(f"| {kind} | {title} ({len(rows)}) | {' | '.join(cells)} |")
    real = results[0]["scores"][CAPTIONS[0]]["real"]
    lines.append(f"| | real images | {' | '.join(f'{real[name]:.3f}' for name in names[:3])} | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_maps", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pairs", type=int, default=4000, help="training pairs")
    parser.add_argument("--test_maps", type=int, default=200, help="held-out maps to generate from")
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=min(6, os.cpu_count() or 1), help="runs at the same time")
    options = parser.parse_args(argv)
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
        results = [r for r in pool.imap_unordered(_run, tasks, chunksize=1) if r is not None]
    if not results:
        raise SystemExit("error: all runs failed; see the messages above.")
    results.sort(key=lambda r: (str(r["method"]), r["seed"]))
    print_and_save(table(results), out / "maps.md")


def _run(task: tuple) -> dict[str, Any] | None:
    return run_or_report(task, run_one)


if __name__ == "__main__":
    main()
