"""Studies as a user runs them: two subjects, a killed start, a figure and a caption with all numbers."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from delora_diffusers.methods.table import METHODS
from eval.commands.study import add_arguments
from eval.study.settings import STUDIES
from eval.study.trials import plan_trials
from tests.helpers import ROOT, run_eval, write_photos


def test_every_study_has_settings_of_their_own():
    for study in STUDIES.values():
        settings = study.settings(None, study.multipliers)
        assert len({(setting.label, setting.x) for setting in settings}) == len(settings) > 1
        assert len({setting.slug for setting in settings}) > 0.9 * len(settings), "few points are the same training"
        assert (study.axis is None) == (settings[0].x is None)


@pytest.fixture(scope="module")
def typed(tiny_sd, tiny_scorers, tmp_path_factory):
    """Flags of a small study but for its name, and its folder."""
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


def study(name: str, typed: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return run_eval("study", name, *typed, *more)


def start(name: str, typed: list[str], *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "eval", "study", name, *typed, *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_study_killed_and_continued_and_what_it_shares(typed):
    flags, out = typed
    more = ("--methods", "delora", "--multipliers", "1", "4")
    first = start("lr", flags, *more)
    while not list(out.glob("runs/*/seed-0/*/adapter/*.safetensors")):
        assert first.poll() is None, first.communicate()[1][-2000:]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    made = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/seed-0/*/adapter/*.safetensors")}
    at_once = start("start", flags, "--multipliers", "1")  # shares the frozen copy; one waits for the other
    again = start("lr", flags, *more)
    printed, errors = again.communicate()
    assert again.returncode == 0, errors[-2000:]
    assert at_once.communicate() and at_once.returncode == 0
    assert all(file.stat().st_mtime_ns == when for file, when in made.items()), "what was there was made anew"

    rows = pd.read_parquet(out / "lr.parquet")
    assert sorted(rows["x"].unique()) == [1, 4] and len(rows) == 4
    assert (rows["distance"] > 0).all()
    far, near = (rows[rows["x"] == x].set_index("subject")["distance"] for x in (4, 1))
    assert (far > near).all(), "a higher rate goes further"
    caption = (out / "lr.md").read_text()
    assert caption in printed and "2 subjects, 1 seeds" in caption
    one = rows[rows["x"] == 4]["dino"].mean()
    assert f"| DeLoRA | 4 | {one:.3f} [" in caption and "| | | 4 times |" in caption
    with Image.open(out / "lr.png") as figure:
        assert figure.width > 1000
    assert "<svg" in (out / "lr.svg").read_text()[:500]
    with Image.open(out / "lr-pictures.png") as figure:
        assert figure.width > 300
    rates = json.loads((out / "runs" / "delora-learning_rate-0.08" / "settings.json").read_text())["made"]["train"][
        "learning_rate"
    ]
    assert float(rates) == pytest.approx(4 * METHODS["delora"].learning_rate)

    assert len(list(out.glob("runs/delora*"))) == 3, "the frozen copy is lr's DeLoRA"
    both = pd.read_parquet(out / "start.parquet")
    frozen = both[both["label"] == "frozen copy"]
    assert frozen["dino"].tolist() == rows[rows["x"] == 1]["dino"].tolist() and len(both) == 4


def test_subjects_trained_together_are_trained_as_alone(typed):
    """The same distances from one command for all subjects and seeds, and from one for each."""
    flags, out = typed
    more = ("--methods", "lora", "--multipliers", "1", "--seeds", "2")
    found = {}
    for together in ("1", "4"):
        place = out.with_name(f"together-{together}")
        done = study("lr", [str(place) if word == str(out) else word for word in flags], *more, "--together", together)
        assert done.returncode == 0, done.stderr[-2000:]
        found[together] = pd.read_parquet(place / "lr.parquet").set_index(["subject", "seed"]).sort_index()
        logs = list(place.glob("runs/lora-learning_rate-0.0006/**/log.txt"))
        assert len(logs) == 4 // int(together), logs
    assert len(found["1"]) == 4 and found["1"]["distance"].nunique() == 2, "a seed is another start"
    for name in ("distance", "dino", "clip_t"):
        assert found["4"][name].tolist() == pytest.approx(found["1"][name].tolist(), abs=2e-3), name


def test_a_table(typed):
    flags, out = typed
    done = study("ablation", flags, "--methods", "delora", "--subjects", "one")
    assert done.returncode == 0, done.stderr[-2000:]
    caption = (out / "ablation.md").read_text()
    assert "| normalized, boundary, no weight scaling |" in caption and "| DeLoRA |" in caption
    rows = pd.read_parquet(out / "ablation.parquet").set_index("label")["dino"]
    apart = rows["normalized, boundary, no weight scaling"] - rows["DeLoRA"]
    assert f"| normalized, boundary, no weight scaling | {apart:+.3f} [" in caption
    with Image.open(out / "ablation-pictures.png") as figure:
        assert figure.width > 100


def test_a_setting_that_fails_is_said_and_the_others_are_shown(typed):
    flags, out = typed
    done = study("lr", flags, "--methods", "lora", "--multipliers", "1", "1e35", "--subjects", "one")
    assert done.returncode == 1 and "the loss was not finite" in done.stderr and "2 failed" in done.stderr
    caption = (out / "lr.md").read_text()
    assert "Did not end, and in no mean: LoRA at 1e+35 (1 of 1)." in caption
    assert "| LoRA | 1 |" in caption and "| LoRA | 1e+35 |" not in caption


def test_comparison_tunes_on_some_and_scores_the_others(typed):
    flags, out = typed
    small, photographs = (Path(flags[flags.index(flag) + 1]) for flag in ("--benchmark", "--photographs"))
    content = yaml.safe_load(small.read_text())
    for name in ("three", "four"):
        content["subjects"][name] = content["subjects"]["one"]
        shutil.copytree(photographs / "one", photographs / name, dirs_exist_ok=True)
    small.write_text(yaml.safe_dump(content, sort_keys=False))
    done = study("comparison", flags, "--methods", "delora", "--multipliers", "1", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    grid = pd.read_parquet(out / "comparison-grid.parquet")
    assert set(grid["subject"]) == {"one", "two", "three"} and set(grid["x"]) == {1, 2}
    best = grid.groupby("x")["dino"].mean().idxmax()
    rows = pd.read_parquet(out / "comparison.parquet")
    assert set(rows["subject"]) == {"four"} and set(rows["x"]) == {best}
    adapter = load_file(next(out.glob("runs/*/seed-0/four/adapter/*.safetensors")))
    for name in ("comparison.png", "comparison.svg", "comparison-pictures.png"):
        assert (out / name).stat().st_size > 5_000
    trained = sum(t.numel() for name, t in adapter.items() if name.endswith(("delora_A", "delora_B", "delora_lambda")))
    assert (
        f"| DeLoRA | {trained:,} | {METHODS['delora'].learning_rate * best:g} |" in (out / "comparison.md").read_text()
    )


def test_norms_are_those_of_the_weights(tmp_path):
    done = study("norms", ["--output_dir", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
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
    assert parts == sorted(parts, key=lambda part: ("down", "mid", "up").index(part.split("_")[0])), "as it is run"
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_longer_trainings_continue_the_shorter(typed):
    """Ten steps from the checkpoint of the four are the ten steps from the start; studies share what they trained."""
    flags, out = typed
    places = {"continued": ("1", "2.5"), "alone": ("2.5",)}
    found = {}
    for name, steps in places.items():
        place = out.with_name(name)
        flags_there = [str(place) if word == str(out) else word for word in flags]
        more = ("--methods", "delora", "--together", "2", "--multipliers", *steps)
        done = study("prolonged", flags_there, *more)
        assert done.returncode == 0, done.stderr[-2000:]
        (run,) = place.glob("runs/*max_train_steps-10")
        command = json.loads((run / "seed-0" / "one" / "adapter" / "config.json").read_text())["command"]
        assert ("checkpoint-4" in command) == (name == "continued"), command
        found[name] = load_file(run / "seed-0" / "two" / "adapter" / "pytorch_delora_weights.safetensors")
    assert found["continued"].keys() == found["alone"].keys()
    for name, tensor in found["continued"].items():
        torch.testing.assert_close(tensor, found["alone"][name], rtol=1e-4, atol=1e-6, msg=name)
    rows = pd.read_parquet(out.with_name("continued") / "prolonged.parquet")
    assert sorted(rows["x"].unique()) == [1, 2.5]


def test_steps_are_multiples_of_those_given(typed):
    flags, _ = typed
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["prolonged", *flags, "--methods", "delora", "lora"])
    trials = plan_trials(options, STUDIES["prolonged"].settings(options.methods, (1, 2.5)))
    asked = [(setting.label, one.made["train"]["max_train_steps"]) for setting, one, _ in trials]
    assert asked == [("DeLoRA", "4"), ("DeLoRA", "10"), ("LoRA", "4"), ("LoRA", "10")]
    before = [None if one.continues is None else one.continues.folder.name for _, one, _ in trials]
    assert before == [None, trials[0][1].folder.name, None, trials[2][1].folder.name]
    options.train = [*options.train, "lr_scheduler=cosine"]
    trials = plan_trials(options, STUDIES["prolonged"].settings(options.methods, (1, 2.5)))
    assert [one.continues for _, one, _ in trials] == [None] * 4, "its rates depend on the steps to come"


def test_refuses_to_vary_what_is_fixed(typed):
    flags, _ = typed
    flags = [*flags[: flags.index("--train") + 1], "learning_rate=1", *flags[flags.index("--train") + 1 :]]
    refused = study("lr", flags)
    assert "--train learning_rate is what lr varies" in refused.stderr and refused.returncode == 1
    flags = [word.replace("max_train_steps=4", "max_train_steps=four") for word in flags if word != "learning_rate=1"]
    refused = study("prolonged", flags)
    assert "--multipliers -1 is not positive" in study("lr", flags, "--multipliers", "2", "-1").stderr
    assert "max_train_steps=four is no number of steps" in refused.stderr and refused.returncode == 1
