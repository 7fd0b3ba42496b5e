"""The time to quality: the fastest setting that is good enough, and a setting from training to its scores."""

import argparse
import json

import pandas as pd
import pytest

from benchmarks import miniature_runs, strength_dial, time_to_quality
from benchmarks.time_to_quality import BASE, DEFAULT, all_runs, check_settings, fastest, report, summarize, toys_of
from delora_diffusers.errors import InputError
from tests.helpers import run_in_child
from train_dreambooth_delora import parse_arguments


def options(out_dir, *train: str) -> argparse.Namespace:
    return argparse.Namespace(
        out_dir=out_dir, train=list(train), pretrained_model_name_or_path=None, batch_sizes=[1, 4], rates=[1.0, 2.0],
        steps=[2, 300], subjects=[210, 211], methods=["delora", "lora"], seeds=1, timed_steps=3,
    )  # fmt: skip


def test_the_training_script_gets_the_flags_of_each_method(tmp_path):
    timings, runs = all_runs(options(tmp_path, "relative_bound=0.15", "rank=4", "center_crop=false"))
    assert len(timings) == 4 and len(runs) == 2 * 8 + 1 and runs[-1].method == BASE
    assert len({run.folder for run in [*timings, *runs]}) == len(timings) + len(runs)
    steps = [run.steps * run.batch_size for run in runs]
    assert steps == sorted(steps, reverse=True), "the longest runs start first"
    for run in runs[:-1]:
        args = parse_arguments(["--output_dir", "out", *miniature_runs.flags(time_to_quality.training_flags(run))])
        assert args.relative_bound == (0.15 if run.method == "delora" else None) and args.rank == 4
        assert args.train_batch_size == run.batch_size
    with pytest.raises(InputError, match="learning_rate is what this benchmark sets itself"):
        all_runs(options(tmp_path, "learning_rate=1"))
    check_settings(options(tmp_path), timings)
    with pytest.raises(InputError, match="has runs with other flags"):
        check_settings(options(tmp_path), [timings[0]._replace(train={"rank": 4})])


def rows_of(method: str, steps: int, dino: list[float], clip_t: float, batch_size: int = DEFAULT[0]) -> list[dict]:
    """Rows of two toys at strength 1, and for a trained method at 0.5, halfway to a base model at 0.3 and 0.70."""
    setting = {"name": f"{method}-{batch_size}-{steps}", "method": method, "batch_size": batch_size, "rate": 1.0}
    rows = []
    for subject, value in enumerate(dino):
        points = [(1.0, value, clip_t), (0.5, (0.3 + value) / 2, (0.70 + clip_t) / 2)]
        rows += [
            setting | {"steps": steps, "seed": 0, "subject": subject, "strength": s, "dino": d, "clip_t": c}
            for s, d, c in (points if method != BASE else points[:1])
        ]
    return rows


def test_the_fastest_setting_that_is_good_enough():
    rows = pd.DataFrame(
        [
            *rows_of(BASE, 0, [0.3, 0.3], 0.70, 0),
            *rows_of("delora", DEFAULT[2], [0.5, 0.6], 0.68),  # half of the way keeps CLIP-T: 0.425
            *rows_of("delora", 100, [0.44, 0.42], 0.69),  # all of it
            *rows_of("delora", 50, [0.40, 0.42], 0.70),  # DINO 0.41, more than 0.01 below
            *rows_of("delora", 25, [0.8, 0.8], 0.50),  # 5% of the way: 0.325
            *rows_of("lora", DEFAULT[2], [0.4, 0.4], 0.70),
            *rows_of("lora", 50, [0.395, 0.395], 0.70),
        ]
    )
    timings = [{"method": m, "batch_size": 4, "ms": 20.0, "start_up": 5.0} for m in ("delora", "lora")]
    timings = [t | {"device": "CPU", "torch": "2"} for t in timings]
    table = summarize(rows, timings)
    quality = table.set_index(["method", "steps"])["quality"]
    assert quality["delora", DEFAULT[2]] == pytest.approx(0.425) and quality["delora", 100] == pytest.approx(0.43)
    assert quality["delora", 25] == pytest.approx(0.325)
    best = fastest(table, "delora", "delora")
    assert best is not None and best["steps"] == 100 and best["seconds"] == pytest.approx(2.0)
    of_lora = fastest(table, "lora", "lora")
    assert of_lora is not None and of_lora["steps"] == 50
    assert fastest(table, "lora", "delora") is None, "LoRA's DINO is below DeLoRA's default"
    text = report(table, rows, timings, ["lora-batch-1"])
    assert "| DeLoRA | DeLoRA | 4 | 1x | 100 | 2.0 | 5.0 | 0.430 | 0.430 | 0.690 |" in text
    assert "| LoRA | DeLoRA | none |" in text and "lora-batch-1" in text


def test_processes_take_turns_on_the_gpus():
    assert [miniature_runs.gpu_of(number, 4, None) for number in range(6)] == ["0", "1", "2", "3", "0", "1"]
    assert [miniature_runs.gpu_of(number, 2, "5, GPU-7") for number in range(3)] == ["5", "GPU-7", "5"]


def _number_of_gpu(task: tuple) -> dict:
    import os

    miniature_runs._use_gpu(2)
    return {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]}


@pytest.mark.integration
def test_a_pool_starts_with_its_initializer():
    gpus = [result["gpu"] for result in miniature_runs.run_all(_number_of_gpu, [("a",), ("b",)], 1, per_process=1)]
    assert sorted(gpus) == ["0", "1"]


def _run_both(out_dir) -> None:
    miniature_runs.GENERATION |= {"num_inference_steps": 1, "resolution": 64}
    strength_dial.PLACES, strength_dial.LOOKS = ("at night",), ()
    small = {"resolution": "64"}
    timings, runs = all_runs(options(out_dir))
    strength_dial.write_photos(out_dir / "photos", (210, 211))
    (run,) = [run for run in runs if run[2:6] == ("delora", 1, 1.0, 2)]
    results = [strength_dial.run_toys(toys_of(r)) for r in (run._replace(train=small), runs[-1])]
    assert strength_dial.run_toys(toys_of(run)) == results[0], "a finished run is not read"
    timing = time_to_quality.time_training(timings[0]._replace(train=small))
    (out_dir / "results.json").write_text(json.dumps([results, timing]))


@pytest.mark.integration
def test_a_setting_is_trained_scored_and_timed(tmp_path):
    run_in_child(_run_both, tmp_path)
    results, timing = json.loads((tmp_path / "results.json").read_text())
    rows = strength_dial.as_rows(results)
    assert rows["name"].tolist() == ["delora-batch-1-rate-1-steps-2"] * 6 + [BASE] * 2
    assert rows["strength"].tolist() == [0.5, 0.5, 0.7, 0.7, 1.0, 1.0, 0.0, 0.0]
    assert rows["subject"].tolist() == [210, 211] * 4
    assert rows["dino"].between(-1, 1).all() and rows["dino"].nunique() > 4
    assert timing["ms"] > 0 and timing["start_up"] > 0 and timing["device"]
    rows = rows.assign(method=["delora"] * 6 + [BASE] * 2, batch_size=1, rate=1.0, steps=2)
    time_to_quality.plot(summarize(rows, [timing]), rows, tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
