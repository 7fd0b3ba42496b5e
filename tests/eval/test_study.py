"""Studies as a user runs them: two subjects, a killed run, a figure and a caption with all numbers."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from delora_diffusers.errors import InputError
from delora_diffusers.locking import locked_folder
from delora_diffusers.methods.table import METHODS
from eval.benchmark.recipes import with_papers_training
from eval.commands.study import add_arguments, check_study_flags, is_result, run
from eval.study.settings import STUDIES
from eval.study.trials import plan_trials
from tests.helpers import ROOT, run_eval, start_eval, write_photos


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.integration
def test_the_settings_of_every_study_are_distinct():
    for study in STUDIES.values():
        settings = study.settings(None, study.multipliers)
        assert len({(setting.label, setting.x) for setting in settings}) == len(settings) > 1
        assert len({setting.slug for setting in settings}) > 0.9 * len(settings), "too many points share a training"
        assert (study.axis is None) == (settings[0].x is None)


@pytest.fixture(scope="module")
def small_study(tiny_sd, tiny_scorers, tmp_path_factory):
    """Flags of a small study without its name, and its output folder."""
    folder = tmp_path_factory.mktemp("study")
    content = {"images_per_prompt": 1, "prompts": {"thing": ["a {identifier} {class} in the snow"]}}
    content["subjects"] = {name: {"class": "toy", "kind": "thing"} for name in ("one", "two")}
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    for name in content["subjects"]:
        write_photos(folder / "photographs" / name, 3)
    words: list[object] = ["--benchmark", folder / "small.yaml", "--photographs", folder / "photographs", "--jobs", 2]
    words += ["--pretrained_model_name_or_path", tiny_sd, "--lpips", "none", "--output_dir", folder / "out"]
    words += ["--train", "max_train_steps=4", "resolution=32", "rank=2", "--generate", "num_inference_steps=1"]
    words += ["--dino", f"local-dir:{tiny_scorers / 'dino'}", "--clip", f"local-dir:{tiny_scorers / 'clip'}"]
    return [str(word) for word in words], folder / "out"


def study(name: str, flags: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return run_eval("study", name, *flags, *more)


@pytest.mark.integration
def test_a_terminated_study_ends_its_trainings(small_study, tmp_path):
    flags, out = small_study[0], tmp_path / "out"
    more = ["--output_dir", str(out), "--methods", "lora", "--multipliers", "1", "--train", "max_train_steps=5000"]
    child = start_eval("study", "lr", *flags, *more, "resolution=32", "rank=2")
    while not list(out.glob("runs/*/seed-0/*/adapter/config.json")):
        assert child.process.is_alive()
        time.sleep(0.05)
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.error() == f"SystemExit: {128 + signal.SIGTERM}"
    folders = list(out.glob("runs/*/seed-0/*"))
    for folder in folders:
        with locked_folder(folder, wait=True):  # a training that goes on holds it to its end
            assert not list(folder.glob("adapter/*.safetensors")), "a training went on to its end"
    assert len(folders) == 2


@pytest.mark.integration
def test_a_killed_study_continues_and_shares_its_runs(small_study):
    flags, out = small_study
    more = ("--methods", "delora", "--multipliers", "1", "4")
    first = start_eval("study", "lr", *flags, *more)
    while not list(out.glob("runs/*/seed-0/*/adapter/*.safetensors")):
        assert first.process.is_alive()
        time.sleep(0.05)
    os.killpg(first.process.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    times = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/seed-0/*/adapter/*.safetensors")}
    # Shares the run of the frozen copy, so they wait in turn.
    other = start_eval("study", "start", *flags, "--multipliers", "1")
    second = study("lr", flags, *more)
    assert second.returncode == 0, second.stderr[-2000:]
    assert other.wait() == 0
    assert all(file.stat().st_mtime_ns == time for file, time in times.items()), "a finished adapter was trained again"

    rows = pd.read_parquet(out / "lr.parquet")
    assert sorted(rows["x"].unique()) == [1, 4] and len(rows) == 4
    assert (rows["distance"] > 0).all()
    far, near = (rows[rows["x"] == x].set_index("subject")["distance"] for x in (4, 1))
    assert (far > near).all(), "a higher rate goes further"
    caption = (out / "lr.md").read_text()
    assert caption in second.stdout and "2 subjects, 1 seed." in caption
    mean = rows[rows["x"] == 4]["dino"].mean()
    assert f"| DeLoRA | 4 | {mean:.3f} [" in caption and "|  |  | 4x |" in caption
    with Image.open(out / "lr.png") as figure:
        assert figure.width > 1000
    assert "<svg" in (out / "lr.svg").read_text()[:500]
    with Image.open(out / "lr-images.png") as figure:
        assert figure.width > 300
    settings = json.loads((out / "runs" / "delora-learning_rate-0.08" / "settings.json").read_text())
    assert float(settings["made"]["train"]["learning_rate"]) == pytest.approx(4 * METHODS["delora"].learning_rate)

    assert len(list(out.glob("runs/delora*"))) == 3, "the frozen copy is the DeLoRA run of lr"
    starts = pd.read_parquet(out / "start.parquet")
    frozen = starts[starts["label"] == "frozen copy"]
    assert frozen["dino"].tolist() == rows[rows["x"] == 1]["dino"].tolist() and len(starts) == 4


@pytest.mark.integration
def test_training_together_equals_training_separately(small_study):
    """One command for all subjects and seeds gives the same distances as one command each."""
    flags, out = small_study
    more = ("--methods", "lora", "--multipliers", "1", "--seeds", "2")
    rows = {}
    for together in ("1", "4"):
        folder = out.with_name(f"together-{together}")
        flags_here = [str(folder) if word == str(out) else word for word in flags]
        result = study("lr", flags_here, *more, "--together", together)
        assert result.returncode == 0, result.stderr[-2000:]
        rows[together] = pd.read_parquet(folder / "lr.parquet").set_index(["subject", "seed"]).sort_index()
        logs = list(folder.glob("runs/lora-learning_rate-0.0006/**/log.txt"))
        assert len(logs) == 4 // int(together), logs
    assert len(rows["1"]) == 4 and rows["1"]["distance"].nunique() == 2, "seeds start differently"
    for name in ("distance", "dino", "clip_t"):
        assert rows["4"][name].tolist() == pytest.approx(rows["1"][name].tolist(), abs=2e-3), name


@pytest.mark.integration
def test_a_table(small_study):
    flags, out = small_study
    result = study("ablation", flags, "--methods", "delora", "--subjects", "one")
    assert result.returncode == 0, result.stderr[-2000:]
    caption = (out / "ablation.md").read_text()
    assert "| normalized, boundary, no weight scaling |" in caption and "| DeLoRA |" in caption
    rows = pd.read_parquet(out / "ablation.parquet").set_index("label")["dino"]
    difference = rows["normalized, boundary, no weight scaling"] - rows["DeLoRA"]
    assert f"| normalized, boundary, no weight scaling | {difference:+.3f} [" in caption
    with Image.open(out / "ablation-images.png") as figure:
        assert figure.width > 100


@pytest.mark.integration
def test_a_failed_setting_is_reported_and_the_others_are_shown(small_study):
    flags, out = small_study
    result = study("lr", flags, "--methods", "lora", "--multipliers", "1", "1e35", "--subjects", "one")
    assert result.returncode == 1 and "the loss was not finite" in result.stderr and "2 failed" in result.stderr
    caption = (out / "lr.md").read_text()
    assert "Not finished, and excluded from all means: LoRA at 1e+35x (1 of 1)." in caption
    assert "| LoRA | 1 |" in caption and "| LoRA | 1e+35 |" not in caption


@pytest.mark.integration
def test_comparison_tunes_on_three_subjects_and_scores_all(small_study):
    flags, out = small_study
    small, photographs = (Path(flags[flags.index(flag) + 1]) for flag in ("--benchmark", "--photographs"))
    content = yaml.safe_load(small.read_text())
    for name in ("three", "four"):
        content["subjects"][name] = content["subjects"]["one"]
        shutil.copytree(photographs / "one", photographs / name, dirs_exist_ok=True)
    small.write_text(yaml.safe_dump(content, sort_keys=False))
    result = study("comparison", flags, "--methods", "delora", "--multipliers", "1", "2")
    assert result.returncode == 0, result.stderr[-2000:]
    grid = pd.read_parquet(out / "comparison-grid.parquet")
    assert set(grid["subject"]) == {"one", "two", "three"} and set(grid["x"]) == {1, 2}
    best = grid.groupby("x")["dino"].mean().idxmax()
    rows = pd.read_parquet(out / "comparison.parquet")
    assert set(rows["subject"]) == {"one", "two", "three", "four"} and set(rows["x"]) == {best}
    adapter = load_file(next(out.glob("runs/*/seed-0/four/adapter/*.safetensors")))
    for name in ("comparison.png", "comparison.svg", "comparison-images.png"):
        assert (out / name).stat().st_size > 5_000
    trained = sum(t.numel() for name, t in adapter.items() if name.endswith(("delora_A", "delora_B", "delora_lambda")))
    row, caption = f"| DeLoRA | {trained:,} | {METHODS['delora'].learning_rate * best:g} |", out / "comparison.md"
    assert row in caption.read_text() and "chosen by DINO on one, two, three with one seed" in caption.read_text()
    four = rows[rows["subject"] == "four"]["dino"].iloc[0]
    assert f"| {four:.3f} |" in caption.read_text()


@pytest.mark.integration
def test_norms_equal_those_of_the_weights(tmp_path):
    result = study("norms", ["--output_dir", str(tmp_path)])
    assert result.returncode == 0, result.stderr[-2000:]
    rows = pd.read_parquet(tmp_path / "norms.parquet")
    files = (ROOT / "data" / "miniature" / "mini-sd" / "unet").glob("*.safetensors")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = [
        tensor.float().square().sum(dim=0).sqrt().mean().item()
        for name, tensor in weights.items()
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    ]
    assert sorted(rows["mean_norm"]) == pytest.approx(sorted(expected), rel=1e-5)
    parts = list(rows["part"].unique())
    assert parts == sorted(parts, key=lambda part: ("down", "mid", "up").index(part.split("_")[0])), "forward order"
    assert (tmp_path / "norms.png").stat().st_size > 10_000


@pytest.mark.integration
def test_longer_trainings_continue_shorter_ones(small_study):
    """Ten steps continued from the checkpoint at step four equal ten steps in one run."""
    flags, out = small_study
    multipliers = {"continued": ("1", "2.5"), "single": ("2.5",)}
    adapters = {}
    for name, steps in multipliers.items():
        folder = out.with_name(name)
        flags_here = [str(folder) if word == str(out) else word for word in flags]
        more = ("--methods", "delora", "--together", "2", "--multipliers", *steps)
        result = study("prolonged", flags_here, *more)
        assert result.returncode == 0, result.stderr[-2000:]
        (run,) = folder.glob("runs/*max_train_steps-10")
        command = json.loads((run / "seed-0" / "one" / "adapter" / "config.json").read_text())["command"]
        assert ("checkpoint-4" in command) == (name == "continued"), command
        adapters[name] = load_file(run / "seed-0" / "two" / "adapter" / "pytorch_delora_weights.safetensors")
    assert adapters["continued"].keys() == adapters["single"].keys()
    for name, tensor in adapters["continued"].items():
        torch.testing.assert_close(tensor, adapters["single"][name], rtol=1e-4, atol=1e-6, msg=name)
    rows = pd.read_parquet(out.with_name("continued") / "prolonged.parquet")
    assert sorted(rows["x"].unique()) == [1, 2.5]


def test_steps_are_multiples_of_max_train_steps(small_study):
    flags, _ = small_study
    options = with_papers_training(parsed("prolonged", *flags, "--methods", "delora", "lora"))
    trials = plan_trials(options, STUDIES["prolonged"].settings(options.methods, (1, 2.5)))
    steps = [(trial.setting.label, trial.plan.settings["train"]["max_train_steps"]) for trial in trials]
    assert steps == [("DeLoRA", "4"), ("DeLoRA", "10"), ("LoRA", "4"), ("LoRA", "10")]
    plans = [trial.plan for trial in trials]
    shorter = [None if plan.continues is None else plan.continues.folder.name for plan in plans]
    assert shorter == [None, plans[0].folder.name, None, plans[2].folder.name]
    options.train = [*options.train, "lr_scheduler=cosine"]
    trials = plan_trials(options, STUDIES["prolonged"].settings(options.methods, (1, 2.5)))
    assert [trial.plan.continues for trial in trials] == [None] * 4, "the rates depend on the number of steps"


@pytest.mark.integration
def test_errors(small_study):
    flags, _ = small_study
    flags = [*flags[: flags.index("--train") + 1], "learning_rate=1", *flags[flags.index("--train") + 1 :]]
    result = study("lr", flags)
    assert "--train learning_rate is what lr varies" in result.stderr and result.returncode == 1
    flags = [word.replace("max_train_steps=4", "max_train_steps=four") for word in flags if word != "learning_rate=1"]
    result = study("prolonged", flags)
    assert "max_train_steps=four is not a number of steps" in result.stderr and result.returncode == 1
    assert "--multipliers -1 is not positive" in study("lr", flags, "--multipliers", "2", "-1").stderr


@pytest.mark.parametrize("words", ["--seeds 3", "--multipliers 2", "--train max_train_steps=5", "--subjects car"])
def test_norms_rejects_what_only_training_uses(words, tmp_path):
    options = parsed("norms", *words.split(), "--output_dir", str(tmp_path))
    with pytest.raises(InputError, match=f"{words.split()[0]} applies to studies that train, which norms does not"):
        check_study_flags(options)
    check_study_flags(parsed("norms", "--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path)))


@pytest.mark.parametrize("name", ["lr", "norms", "frontier", "ablation-maps"])
def test_a_study_does_not_write_into_a_folder_of_photos(name, tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    before = sorted(photos.iterdir())
    with pytest.raises(InputError, match="photos contains files that are not of a study; give a new folder"):
        run(parsed(name, "--output_dir", str(photos)))
    assert sorted(photos.iterdir()) == before
    for result in ("runs", "photographs", f"{name}.parquet", f"{name}-images.png"):
        assert is_result(result)
