"""The ablation on semantic maps as a user runs it: train, generate, score; continue; reject other settings."""

import json
import statistics
import subprocess

import pandas as pd
import pytest
from PIL import Image

from tests.helpers import run_eval, write_map_folders


@pytest.fixture(scope="module")
def small_study(tiny_sd, tmp_path_factory):
    """Flags of a small ablation, and its output folder."""
    folder = tmp_path_factory.mktemp("maps")
    words: list[object] = ["--train_data_dir", write_map_folders(folder / "train", ["a", "b", "c"])]
    words += ["--map_dir", write_map_folders(folder / "test", ["d", "e"]), "--output_dir", folder / "out"]
    words += ["--pretrained_model_name_or_path", tiny_sd, "--jobs", 2, "--methods", "lora", "--seeds", 2]
    words += ["--score", "protocol=toybox", "--generate", "num_inference_steps=1", "resolution=32"]
    words += ["--train", "max_train_steps=2", "resolution=32", "num_validation_images=1"]
    return [str(word) for word in [*words, "validation_inference_steps=1"]], folder / "out"


def study(flags, *more: str) -> subprocess.CompletedProcess[str]:
    return run_eval("study", "ablation-maps", *flags, *more)


@pytest.mark.integration
def test_the_rows_on_maps(small_study):
    flags, out = small_study
    result = study(flags)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = pd.read_parquet(out / "ablation-maps.parquet")
    assert rows["label"].tolist() == ["LoRA", "LoRA"] and rows["seed"].tolist() == [0, 1]
    scores = [
        json.loads((out / "runs" / "maps-lora-learning_rate-0.0006" / f"seed-{seed}" / "scores.json").read_text())
        for seed in (0, 1)
    ]
    miou = [record["scores"]["miou"] for record in scores]
    assert rows["miou"].tolist() == miou and (rows["distance"] > 0).all()
    caption = (out / "ablation-maps.md").read_text()
    assert caption in result.stdout
    assert f"| LoRA | {statistics.mean(miou):.3f} ± {statistics.stdev(miou):.3f} |" in caption
    assert f"| real images | {scores[0]['real']['miou']:.3f} |" in caption
    for name in ("ablation-maps.png", "ablation-maps-images.png"):
        with Image.open(out / name) as figure:
            assert figure.width > 200
    times = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*/*/*.safetensors")}
    assert len(times) == 2
    (out / "runs" / "maps-lora-learning_rate-0.0006" / "seed-1" / "scores.json").unlink()  # as if killed
    assert study(flags).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times, "a finished adapter was trained again"
    assert pd.read_parquet(out / "ablation-maps.parquet")["miou"].tolist() == miou

    result = study([word.replace("max_train_steps=2", "max_train_steps=3") for word in flags])
    assert "has runs with train" in result.stderr and result.returncode == 1


@pytest.mark.integration
def test_a_single_folder_is_rejected(small_study):
    flags, _ = small_study
    result = study([word for word in flags if word != "--map_dir" and not word.endswith("/test")])
    assert "needs both --train_data_dir and --map_dir" in result.stderr and result.returncode == 1
