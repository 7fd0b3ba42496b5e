"""The ablation on semantic maps as a user runs it: trained, drawn, scored; continued, and refused when it differs."""

import json
import statistics
import subprocess

import pandas as pd
import pytest
from PIL import Image

from tests.helpers import run_eval, write_map_folders


@pytest.fixture(scope="module")
def typed(tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    words: list[object] = ["--train_data_dir", write_map_folders(folder / "train", ["a", "b", "c"])]
    words += ["--map_dir", write_map_folders(folder / "test", ["d", "e"]), "--output_dir", folder / "out"]
    words += ["--pretrained_model_name_or_path", tiny_sd, "--jobs", 2, "--methods", "lora", "--seeds", 2]
    words += ["--score", "protocol=toybox", "--generate", "num_inference_steps=1", "resolution=32"]
    words += ["--train", "max_train_steps=2", "resolution=32", "num_validation_images=1"]
    return [str(word) for word in [*words, "validation_inference_steps=1"]], folder / "out"


def study(typed, *more: str) -> subprocess.CompletedProcess[str]:
    return run_eval("study", "ablation-maps", *typed, *more)


def test_the_rows_on_maps(typed):
    flags, out = typed
    done = study(flags)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = pd.read_parquet(out / "ablation-maps.parquet")
    assert rows["label"].tolist() == ["LoRA", "LoRA"] and rows["seed"].tolist() == [0, 1]
    scores = [
        json.loads((out / "runs" / "maps-lora-learning_rate-0.0006" / f"seed-{seed}" / "scores.json").read_text())
        for seed in (0, 1)
    ]
    found = [one["scores"]["miou"] for one in scores]
    assert rows["miou"].tolist() == found and (rows["distance"] > 0).all()
    caption = (out / "ablation-maps.md").read_text()
    assert caption in done.stdout
    assert f"| LoRA | {statistics.mean(found):.3f} ± {statistics.stdev(found):.3f} |" in caption
    assert f"| real pictures | {scores[0]['real']['miou']:.3f} |" in caption
    for name in ("ablation-maps.png", "ablation-maps-pictures.png"):
        with Image.open(out / name) as figure:
            assert figure.width > 200
    made = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*/*/*.safetensors")}
    assert len(made) == 2
    (out / "runs" / "maps-lora-learning_rate-0.0006" / "seed-1" / "scores.json").unlink()  # as a kill leaves it
    assert study(flags).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in made} == made, "what was there was trained anew"
    assert pd.read_parquet(out / "ablation-maps.parquet")["miou"].tolist() == found

    refused = study([word.replace("max_train_steps=2", "max_train_steps=3") for word in flags])
    assert "has runs made with train" in refused.stderr and refused.returncode == 1


def test_one_folder_alone_is_refused(typed):
    flags, _ = typed
    refused = study([word for word in flags if word != "--map_dir" and not word.endswith("/test")])
    assert "wants --train_data_dir and --map_dir" in refused.stderr and refused.returncode == 1
