"""The paper's recipe: the flags it sets, class images that are shared, and a run that is killed and continued."""

import argparse
import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from data.benchmark import load_benchmark
from delora_diffusers import InputError
from eval.benchmark.checks import check, with_defaults
from eval.benchmark.plan import make_plan, write_settings
from eval.benchmark.recipes import MAPS, training_flags, with_recipe
from eval.benchmark.schedule import class_image_tasks, tasks
from eval.commands.study import add_arguments, check_study_flags
from eval.study.settings import at_rate
from eval.study.trials import plan_trials
from tests.helpers import ROOT, run_eval, start_eval, write_photos


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_a_flag_that_is_given_overrides_the_recipe(tmp_path):
    words = ["comparison", "--recipe", "paper", "--output_dir", tmp_path]
    options = with_recipe(parse(*words))
    train = training_flags(options, "oft")
    assert train == {
        "recipe": "paper",
        "max_train_steps": "1400",
        "with_prior_preservation": True,
        "num_class_images": "200",
        "prior_loss_weight": "1.0",
        "coft_eps": 6e-5,
    }
    assert "coft_eps" not in training_flags(options, "lora")
    looser = argparse.Namespace(**vars(options) | {"train": [*options.train, "coft_eps=1e-4"]})
    assert training_flags(looser, "oft")["coft_eps"] == "1e-4" and "coft_eps" not in training_flags(looser, "lora")
    assert options.generate == ["scheduler=dpm++", "num_inference_steps=25"]
    assert (options.identifier, options.images_per_prompt, options.score_every) == ("qwe", 4, 200)
    changed = ["--train", "max_train_steps=600", "with_prior_preservation=false", "--score_every", 100]
    options = with_recipe(parse(*words, *changed, "--identifier", "sks", "--generate", "scheduler=ddim"))
    train = training_flags(options, "lora")
    assert train["max_train_steps"] == "600" and train["with_prior_preservation"] is False
    assert (options.identifier, options.images_per_prompt, options.score_every) == ("sks", 4, 100)
    assert options.generate == ["num_inference_steps=25", "scheduler=ddim"]
    maps = with_recipe(parse("ablation-maps", "--recipe", "paper", "--output_dir", tmp_path), MAPS)
    assert "max_train_steps=13910" in maps.train and "guidance_scale=9" in maps.generate


@pytest.fixture
def paper(tmp_path):
    """The options and plan of the paper's experiment with DreamBooth's 30 subjects and a base model without weights."""
    for subject in load_benchmark("dreambooth").subjects:
        write_photos(tmp_path / "photographs" / subject.name, 2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    words = ["comparison", "--recipe", "paper", "--benchmark", "dreambooth", "--output_dir", tmp_path / "out"]
    words += ["--pretrained_model_name_or_path", tmp_path / "model", "--photographs", tmp_path / "photographs"]
    options = with_recipe(parse(*words, "--seeds", 2))
    return options, [trial.plan for trial in plan_trials(options, [at_rate(method, 1.0) for method in ("oft", "lora")])]


def test_a_class_is_generated_once_for_all_subjects_settings_and_seeds(paper):
    _, plans = paper
    classes = {subject.class_name for subject in plans[0].benchmark.subjects}
    commands = [task.steps[0].command() for task in class_image_tasks(plans)]
    assert len(commands) == len(classes) == 15
    (dog,) = [command for command in commands if command[-1] == "a photo of dog"]
    flags = dict(zip(dog[4::2], dog[5::2]))
    assert flags["--num_images"] == "200" and "--adapter" not in flags
    trainings = [task.steps[0].command() for plan in plans for task in tasks(plan)]
    folders = {words[words.index("--class_data_dir") + 1] for words in trainings}
    assert len(trainings) == 2 * 2 * 30 and len(folders) == len(classes) and flags["--output_dir"] in folders
    for words in trainings:
        assert words[words.index("--instance_prompt") + 1].startswith("a photo of qwe ")
        assert words[words.index("--checkpointing_steps") + 1] == "200" and "--keep_checkpoint_adapters" in words


def test_every_checkpoint_is_scored(paper):
    options, plans = paper
    plain = argparse.Namespace(**vars(options) | {"recipe": None})
    (other,) = (trial.plan for trial in plan_trials(plain, [at_rate("lora", 1.0)]))
    assert plans[1].folder.name == f"paper-{other.folder.name}", "studies without the recipe may have other settings"
    assert plans[0].steps == [200, 400, 600, 800, 1000, 1200, None]
    (run,) = tasks(plans[0])[0].results
    assert [folder.name for _, folder in run.images()] == [
        *(f"pictures-{s}" for s in range(200, 1400, 200)),
        "pictures",
    ]
    assert [adapter.name for adapter, _ in run.images()][-2:] == ["checkpoint-1200", "adapter"]


def test_flags_that_the_benchmark_sets_are_refused(paper):
    options, _ = paper
    options.generated_dir = None
    for words, message in (
        (["class_prompt=a dog"], "--train class_prompt differs between subjects"),
        (["checkpointing_steps=100"], "--train checkpointing_steps is set by --score_every; leave it out"),
        (["config=flags.yaml"], "--train config may hide the steps"),
        (["num_class_images=0"], "num_class_images=0 is not a number of images"),
        (["max_train_steps=many"], "max_train_steps=many is not a number of steps"),
    ):
        changed = argparse.Namespace(**vars(options) | {"train": words})
        with pytest.raises(InputError, match=message):
            check(changed)
    with pytest.raises(InputError, match="--score_every is -1; give a number of steps, 0 for the last only"):
        check(argparse.Namespace(**vars(options) | {"score_every": -1}))


def test_the_recipe_where_it_does_not_apply(tmp_path):
    words = ["--recipe", "paper", "--output_dir", tmp_path]
    assert with_recipe(parse("prolonged", *words)).score_every is None, "its images are those of the last step"
    options = with_recipe(argparse.Namespace(**vars(parse("lr", *words)) | {"generated_dir": tmp_path}))
    assert not options.train and not options.generate and options.identifier == "qwe"
    for name, flag in (("ablation-maps", "--identifier sks"), ("prolonged", "--score_every 5")):
        with pytest.raises(InputError, match=flag.split()[0]):
            check_study_flags(parse(name, "--output_dir", tmp_path, *flag.split()))


def test_a_run_with_other_settings_is_refused_in_plain_words(paper):
    options, (plan, _) = paper
    changed = plan.settings | {"train": plan.settings["train"] | {"rank": "8"}}
    write_settings(plan, with_defaults(options))
    for settings, message in (
        (changed, 'was created without train rank, not with "8"'),
        ({name: v for name, v in plan.settings.items() if name != "score_every"}, "with score_every 200, not without"),
    ):
        with pytest.raises(InputError, match=message):
            write_settings(dataclasses.replace(plan, settings=settings), with_defaults(options))


def test_class_images_of_the_user(paper, tmp_path):
    options, plans = paper
    given = tmp_path / "given"
    for name in {subject.class_name for subject in plans[0].benchmark.subjects}:
        write_photos(given / name, 3)
    options.class_images, options.method, options.generated_dir = given, "lora", None
    with pytest.raises(InputError, match="has 3 class images instead of 200"):
        make_plan(with_defaults(options))
    options.train = [*options.train, "num_class_images=3"]
    plan = make_plan(with_defaults(options))
    assert not class_image_tasks([plan])
    words = tasks(plan)[-1].steps[0].command()
    assert words[words.index("--class_data_dir") + 1] == str(given / plan.benchmark.subjects[-1].class_name)


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.glob(pattern)}


@pytest.mark.integration
def test_the_recipe_on_toybox_is_killed_and_continued(tmp_path):
    """Two subjects with every part of the recipe; the numbers of steps, prompts, images and pixels are small."""
    content = yaml.safe_load((ROOT / "data" / "benchmarks" / "toybox.yaml").read_text())
    content["prompts"]["toy"] = content["prompts"]["toy"][:3]
    (tmp_path / "toybox.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["comparison", "--recipe", "paper", "--subjects", "car", "duck", "--methods", "delora", "--protocol"]
    words += ["toybox", "--benchmark", str(tmp_path / "toybox.yaml"), "--train", "max_train_steps=3"]
    words += ["num_class_images=2", "resolution=64", "train_batch_size=1"]
    words += ["validation_inference_steps=2", "--generate", "num_inference_steps=2", "resolution=64", "batch_size=16"]
    words += ["--images_per_prompt", "1", "--score_every", "2", "--together", "2"]
    words += ["--jobs", "2", "--output_dir"]  # one thread per command: more of them wait for other tests
    out = tmp_path / "killed"
    first = start_eval("study", *words, out)
    while not list(out.glob("runs/*/seed-0/*/adapter/checkpoint-2/*.safetensors")):
        assert first.process.is_alive()
        time.sleep(0.05)
    os.killpg(first.process.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    class_images = times(out, "class-images/*/*/0*.png")
    assert len(class_images) == 2 * 2 and not (out / "comparison.md").exists()
    for folder in (out, tmp_path / "whole"):
        result = run_eval("study", *words, folder)
        assert result.returncode == 0, result.stderr[-2000:]
    assert times(out, "class-images/*/*/0*.png") == class_images, "the class images were generated again"
    (run,) = out.glob("runs/*")
    summary = json.loads((run / "summary.json").read_text())
    steps = summary["steps"]["toybox"]
    assert list(steps) == ["2", "3"] and summary["kept_best_by"] == "dino"
    assert summary["step"] == int(max(steps, key=lambda step: steps[step]["dino"]))
    assert summary["protocols"]["toybox"]["scores"]["dino"]["mean"] == pytest.approx(
        steps[str(summary["step"])]["dino"]
    )
    rows, whole = (pd.read_parquet(folder / "comparison.parquet") for folder in (out, tmp_path / "whole"))
    pd.testing.assert_frame_equal(rows, whole)
    assert set(rows["subject"]) == {"car", "duck"} and set(rows["step"]) == {summary["step"]}
    caption = (out / "comparison.md").read_text()
    assert f"| 0.02 | {summary['step']} |" in caption and "The learning rates were not tuned." in caption
    config = json.loads((run / "seed-0" / "car" / "adapter" / "config.json").read_text())["arguments"]
    assert Path(config["class_data_dir"]).match("class-images/*/car") and config["class_prompt"] == "a photo of car"
    assert config["instance_prompt"] == "a photo of qwe car" and config["num_class_images"] == 2
    images = (run / "seed-0" / "car" / "pictures-2" / "metadata.jsonl").read_text().splitlines()
    assert len(images) == 3 and "checkpoint-2" in json.loads(images[0])["adapter"]
