"""The command lines of docs/studies.md for Stable Diffusion 1.5, up to where its pretrained weights are needed."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data.benchmark import load_benchmark
from eval import plan as eval_plan
from eval import study as eval_study
from eval.comparison import METHODS, settings_of
from eval.plan import tasks_of_all
from eval.studies import STUDIES
from eval.study import add_arguments, plan
from tests.conftest import ROOT, draw_photographs
from train_dreambooth_delora import check, parse_arguments

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LINES = [line.strip() for line in (ROOT / "docs" / "studies.md").read_text().splitlines() if line.startswith("    ")]
VARIABLE = next(line for line in LINES if line.startswith("SD15="))
COMMANDS = {line.split(" study ")[1].split()[0]: line for line in LINES if "$SD15" in line or "study norms" in line}


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """A folder in which the photographs lie as the dataset has them."""
    folder = tmp_path_factory.mktemp("sd15")
    for subject in load_benchmark("dreambooth").subjects:
        draw_photographs(folder / "dreambooth" / "dataset" / subject.name, 4)
    return folder


def test_every_study_has_its_line():
    assert set(COMMANDS) == {*STUDIES, "comparison", "norms"}


@pytest.mark.parametrize("name", ["lr", "comparison", "norms"])
def test_as_typed_it_ends_at_the_missing_weights(name, downloaded):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(
        ["bash", "-c", f"{VARIABLE}\n{COMMANDS[name]}"], cwd=downloaded, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    (refusal,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert MODEL in refusal and ("could not be had from the hub" in refusal or "could not be loaded" in refusal)
    assert not (downloaded / "studies").exists(), "nothing is left behind"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "norms"])
def test_with_the_weights_every_training_is_one_that_the_script_takes(name, downloaded, monkeypatch):
    monkeypatch.chdir(downloaded)
    for module in (eval_plan, eval_study):
        monkeypatch.setattr(module, "check_base_model", lambda name_or_path: None)
    typed = shlex.split(VARIABLE.removeprefix('SD15="').removesuffix('"'))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args([name, *typed])
    if name == "comparison":
        settings = [setting for method in METHODS for setting in settings_of(method, (0.5, 1, 2))]
    else:
        settings = STUDIES[name].settings(options.methods, options.places or STUDIES[name].places)
    trials = plan(options, settings)
    assert len(trials) == len(settings)
    _, first, _ = trials[0]
    assert len(first.benchmark.subjects) == 30 and len(first.benchmark.prompts_of(first.benchmark.subjects[0])) == 25
    waiting = tasks_of_all([one for _, one, _ in trials], together=1)
    items = [item for task in waiting for item in task.items]
    assert len(items) == 30 * 3 * len({one.folder for _, one, _ in trials})
    checked = set()
    for task in waiting:
        for step in task.steps[::2]:  # of a training and a drawing each
            _, script, *flags = step.command()
            assert script.endswith("train_dreambooth_delora.py")
            same = " ".join(flags[: flags.index("--instance_data_dir")])  # the flags that all subjects have in common
            if same not in checked:
                checked.add(same)
                args = parse_arguments(flags)
                (subject,) = check(args)
                assert args.pretrained_model_name_or_path == MODEL and args.max_train_steps >= 600
                assert len(subject.photographs) == 4
    assert len(checked) == len({one.folder for _, one, _ in trials})
