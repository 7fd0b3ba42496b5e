"""The command lines of docs/studies.md for Stable Diffusion 1.5, up to the point that needs pretrained weights."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_controlnet_map2img
from data.benchmark import load_benchmark
from data.palettes import read_palette
from eval.benchmark import checks as benchmark_checks
from eval.benchmark.recipes import MAPS, with_recipe
from eval.benchmark.schedule import tasks_of_all
from eval.commands.study import OTHER_STUDIES, add_arguments
from eval.study import boundary, flatness
from eval.study import trials as study_trials
from eval.study.comparison import COMPARED, settings_of
from eval.study.frontier_settings import settings_of as frontier_settings
from eval.study.maps import MapCommands, MapRun
from eval.study.settings import STUDIES, ablation
from eval.study.trials import plan_trials
from tests.helpers import ROOT, run_eval, write_photos
from train_dreambooth_delora import check_arguments, find_subjects, parse_arguments

pytestmark = pytest.mark.integration  # seconds a test

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LINES = [line.strip() for line in (ROOT / "docs" / "studies.md").read_text().splitlines() if line.startswith("    ")]
VARIABLE = next(line for line in LINES if line.startswith("SD15="))
COMMANDS = {
    line.split(" study ")[1].split()[0]: line
    for line in LINES
    if " study " in line and ("$SD15" in line or MODEL in line)
}


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """A folder with photos laid out like the downloaded dataset."""
    folder = tmp_path_factory.mktemp("sd15")
    for subject in load_benchmark("dreambooth").subjects:
        write_photos(folder / "dreambooth" / "dataset" / subject.name, 4)
    return folder


def test_every_study_has_a_command_line():
    assert set(COMMANDS) == {*STUDIES, *OTHER_STUDIES}


def run_in_bash(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user does."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["norms", "ablation-maps", "comparison"])
def test_the_command_line_stops_at_the_missing_weights(name, downloaded):
    """The comparison is launched as it stands; of the others bash only splits the words, which starts faster."""
    if name == "comparison":
        result = run_in_bash(f"{VARIABLE}\n{COMMANDS[name]}", downloaded)
    else:
        show = "accelerate() { printf '%s\\0' \"$@\"; }; python() { printf '%s\\0' \"$@\"; }"
        words = run_in_bash(f"{show}\n{VARIABLE}\n{COMMANDS[name]}", downloaded).stdout.split("\0")[:-1]
        assert words[: words.index("study")] in (["launch", "-m", "eval"], ["-m", "eval"])
        result = run_eval(*words[words.index("study") :], cwd=downloaded)
    assert result.returncode == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert MODEL in message and ("cannot be downloaded from the hub" in message or "could not be loaded" in message)
    assert not (downloaded / "studies").exists(), "the output folder was created"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_the_script_accepts_every_training_on_maps(tmp_path):
    options = with_recipe(parse(shlex.split(COMMANDS["ablation-maps"].split(" study ")[1])), MAPS)
    palette = read_palette("ade20k")
    for part in ("images", "maps"):
        (tmp_path / "train" / part).mkdir(parents=True)
        Image.fromarray(palette[np.zeros((40, 40), int)]).save(tmp_path / "train" / part / "a.png")
    (tmp_path / "train" / "images" / "a.txt").write_text("a room")
    settings = ablation(None, (), maps=True)
    checked = set()
    for setting in settings:
        run = MapRun(setting, 2, tmp_path / setting.slug)
        train, generate, score = MapCommands(run, options, tmp_path / "train", tmp_path / "val").task().steps
        _, script, *flags = train.command() or ()
        assert script.endswith("train_controlnet_map2img.py")
        args = train_controlnet_map2img.parse_arguments(flags)
        train_controlnet_map2img.check_arguments(args)
        (pair,), _, _ = train_controlnet_map2img.find_data(args)
        assert pair.caption == "a room" and args.seed == 2 and args.max_train_steps == 13910
        assert args.mixed_precision == "bf16" and args.train_batch_size == 16
        assert args.targets == ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
        checked.add((args.method, args.rank, args.weight_norm, args.learning_rate))
        for command in (generate.command(), score.command()):
            assert command is not None and "--map_dir" in command
        assert "--scheduler ddim --num_inference_steps 50 --guidance_scale 9" in " ".join(generate.command() or ())
        assert "ade20k" in (score.command() or ())
    assert len(checked) == len(settings) == 7


@pytest.mark.parametrize("name", [name for name in COMMANDS if "$SD15" in COMMANDS[name]])
def test_the_script_accepts_every_training(name, downloaded, monkeypatch):
    monkeypatch.chdir(downloaded)
    for module in (benchmark_checks, study_trials):
        monkeypatch.setattr(module, "check_base_model", lambda name_or_path: None)
    flags = shlex.split(VARIABLE.removeprefix('SD15="').removesuffix('"'))
    recipe = ["--recipe", "paper"] if "--recipe paper" in COMMANDS[name] else []
    options = with_recipe(parse([name, *recipe, *flags]))
    if name == "comparison":
        settings = [setting for method in COMPARED for setting in settings_of(method, (0.5, 1, 2))]
    elif name in ("flatness", "boundary"):
        settings = {"flatness": flatness, "boundary": boundary}[name].settings_of(options)
    elif name == "frontier":
        settings = [s for key in ("delora", "coft") for s in frontier_settings(key, {})]
    else:
        settings = STUDIES[name].settings(options.methods, options.multipliers or STUDIES[name].multipliers)
    trials = plan_trials(options, settings)
    assert len(trials) == len(settings)
    first = trials[0].plan
    assert len(first.benchmark.subjects) == 30 and len(first.benchmark.prompts_of(first.benchmark.subjects[0])) == 25
    tasks = tasks_of_all([trial.plan for trial in trials], together=1)
    results = [result for task in tasks for result in task.results]
    folders = {trial.plan.folder for trial in trials}
    assert len(results) == 30 * 3 * len(folders)
    checked = set()
    for task in tasks:
        if len(task.steps) == 1:  # images of the base model
            continue
        for step in task.steps[::2]:  # training and generating alternate
            _, script, *flags = step.command()
            assert script.endswith("train_dreambooth_delora.py")
            shared = " ".join(flags[: flags.index("--instance_data_dir")])  # the flags that all subjects share
            if shared not in checked:
                checked.add(shared)
                args = parse_arguments(flags)
                check_arguments(args)
                (subject,) = find_subjects(args)
                assert args.pretrained_model_name_or_path == MODEL and args.max_train_steps >= 400
                assert len(subject.prompts) == 4
    assert len(checked) == len({trial.plan.folder for trial in trials if trial.setting.method != "none"})
