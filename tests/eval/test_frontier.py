"""The study ``frontier``: its grid, its numbers from rows, its page, and a tiny run from start to end."""

import argparse
import html
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from delora_diffusers.errors import InputError
from eval.benchmark.schedule import tasks_of_all
from eval.commands.study import add_arguments, check_study_flags
from eval.study import frontier, frontier_page, frontier_report
from eval.study.frontier_analysis import analyse
from eval.study.frontier_settings import BASE, CLIP_T_LOSSES, VARIANTS, settings_of
from eval.study.frontier_words import in_words
from tests.eval.test_hostile_names import HOSTILE
from tests.helpers import run_eval
from train_dreambooth_delora import check_arguments, parse_arguments


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["frontier", *map(str, words)])
    check_study_flags(options)
    return options


def made_up_rows(keys=("delora", "delora-zero", "lora"), names=("a", "b", "c", "d"), seeds=2) -> pd.DataFrame:
    """Rows of four settings per variant at two strengths; the base model is at CLIP-T 0.7."""
    random, rows = np.random.default_rng(0), []
    for number, key in enumerate((BASE, *keys)):
        settings = [0.0] if key == BASE else [0.25, 0.5, 1.0, 2.0]
        for rate, strength in [(r, s) for r in settings for s in ((0.0,) if key == BASE else (0.7, 1.0))]:
            push = rate * strength
            for index, name in enumerate(names):
                for seed in range(seeds):
                    noise = 0 if key == BASE else random.normal(0, 0.003)
                    row = {"key": key, "label": "base model" if key == BASE else VARIANTS[key].title, "method": key}
                    row |= {"run": f"{key}-{rate}", "learning_rate": rate, "rate": rate, "bound": None}
                    row |= {"schedule": "cosine", "steps": 300, "step_multiple": 1.0, "strength": strength}
                    row |= {"subject": name, "seed": seed, "clip_i": 0.5, "real_dino": 0.8, "distance": push}
                    row["dino"] = 0.1 + 0.05 * index + (0.5 + 0.02 * number) * (1 - np.exp(-2 * push)) + noise
                    row["clip_t"] = 0.7 + 0.02 * index - 0.02 * push**2 + noise / 10
                    row["drift"] = 0.1 * push
                    rows.append(row)
    return frontier.in_order(rows)


def test_every_variant_has_the_same_number_of_distinct_settings():
    settings = {key: settings_of(key, {}) for key in VARIANTS}
    assert {key: len(of_variant) for key, of_variant in settings.items()} == {**dict.fromkeys(VARIANTS, 20), "full": 4}
    slugs = [setting.slug for of_variant in settings.values() for setting in of_variant]
    assert len(set(slugs)) == len(slugs)
    replaced = settings_of("delora", {"multipliers": [1, 2], "bounds": [0.2], "schedules": ["cosine"]})
    assert [(s.x, s.train["relative_bound"], s.train["steps"]) for s in replaced] == [
        (rate, 0.2, steps) for rate in (1, 2) for steps in (1, 3)
    ]
    assert {s.train["coft_eps"] for s in settings_of("coft", {"bounds": [0.2]})} == {6e-5, 6e-4}


@pytest.mark.integration
def test_the_script_accepts_every_training_and_strengths_share_it(tmp_path):
    options = parse("--output_dir", tmp_path, "--subjects", "car", "--strengths", "0.5", "0.7", "--seeds", "2")
    trials = frontier.plan(options)
    *of_methods, base = trials
    assert len(of_methods) == sum(len(settings_of(key, {})) for key in VARIANTS) and base.setting.method == BASE
    steps = [trial.setting.train["steps"] for trial in of_methods]
    full = len(settings_of("full", {}))
    assert [trial.setting.method for trial in of_methods].index("delora") == full, "a model per subject takes longest"
    assert steps[full:] == sorted(steps[full:], reverse=True), "then the longest come first"
    tasks = tasks_of_all([trial.plan for trial in trials], together=2)
    drift = [task for task in tasks if task.folder.name == ".base"]
    assert [task.folder.parents[1] for task in drift] == [base.plan.folder] * 2, "once for each seed"
    checked = 0
    for task in tasks:
        commands = [step.command() for step in task.steps]
        if len(commands) == 2 and commands[0] is not None:
            args = parse_arguments(list(commands[0][2:]))
            check_arguments(args)
            assert args.max_train_steps in (300, 900) and args.lr_scheduler in ("constant", "cosine")
            checked += 1
    # Both seeds are trained together, except by full fine-tuning.
    assert checked == 20 * (len(VARIANTS) - 1) + 2 * full
    assert {len(result.strengths) for task in tasks for result in task.results if result.strengths} == {2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "oft"], "--methods oft is not part of frontier; choose from delora, delora-frob"),
        (["--judges", "mug"], "--judges mug is not a subject of the study, which has car, duck"),
        (["--judges", "car", "duck"], "--judges names all subjects"),
        (["--strengths", "0"], "--strengths 0 is not positive"),
        (["--clip_t_drop", "-1"], "--clip_t_drop is -1; give a number of at least 0"),
        (["--score_every", "10"], "--score_every keeps the best step"),
        (["--methods", "full", "--protocol", "oft"], "--protocol oft does not fit frontier"),
        (["--train", "relative_bound=0.2"], "--train relative_bound is what frontier varies"),
        (["--from_rows"], "--subjects has no effect on rows that are there already; leave it out"),
    ],
)
def test_errors(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "start_accelerator", lambda: pytest.fail("the flags were accepted"))
    with pytest.raises(InputError, match=re.escape(message)):
        frontier.run(parse("--output_dir", tmp_path / "out", "--subjects", "car", "duck", *words))


def test_missing_rows(tmp_path):
    with pytest.raises(InputError, match=r"frontier\.parquet does not exist; run the study without --from_rows first"):
        frontier.run(parse("--output_dir", tmp_path / "out", "--from_rows"))


def test_rows_without_the_base_model(tmp_path):
    rows = made_up_rows()
    for wrong, message in ((rows[rows["key"] != BASE], "no rows of the base model"), (rows[["key"]], "something else")):
        wrong.to_parquet(tmp_path / "frontier.parquet")
        with pytest.raises(InputError, match=f"{message}; run the study without --from_rows first"):
            frontier.run(parse("--output_dir", tmp_path, "--from_rows"))


def test_other_studies_reject_its_flags(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for words, message in (
        (["--strengths", "0.5"], "--strengths applies to frontier, not to lr"),
        (["--methods", "delora-zero"], "--methods delora-zero is a variant that only frontier has"),
    ):
        with pytest.raises(InputError, match=message):
            check_study_flags(parser.parse_args(["lr", "--output_dir", str(tmp_path), *words]))


def test_the_numbers_of_made_up_rows():
    rows = made_up_rows()
    analysis = analyse(rows)
    by_key = {result.scores.key: result for result in analysis.results}
    assert analysis.base == pytest.approx(0.73) and analysis.target == pytest.approx(0.72)
    assert {len(result.scores.points) for result in analysis.results} == {9}, "eight points and the base model"
    lora, delora = by_key["lora"], by_key["delora"]
    push = np.sqrt(0.5)  # at which CLIP-T is the target, between the settings 0.7 and 1.0 at rates of 1 and 1
    expected = 0.175 + 0.56 * (1 - np.exp(-2 * push))
    assert lora.at_target.value == pytest.approx(expected, abs=0.02) and lora.difference.value == 0
    assert delora.difference.value == pytest.approx(-0.04 * (1 - np.exp(-2 * push)), abs=0.01)
    assert delora.difference.low < delora.difference.value < delora.difference.high < 0
    assert delora.difference.high - delora.difference.low < 0.03, "paired, though the subjects differ by 0.15"
    assert lora.reverse.value == pytest.approx(analysis.target) and delora.reverse_difference.high < 0
    assert lora.judged[1].value >= analysis.target - 0.005 and lora.chosen == [
        "1x the default rate (1), cosine, 300 steps, strength 0.7"
    ]
    assert (delora.fidelity.low <= delora.fidelity.value + 1e-9).all() and np.isfinite(delora.fidelity.low).all()

    assert delora.at_losses[CLIP_T_LOSSES.index(0.01)] == delora.difference
    weaker = [delora.at_losses[CLIP_T_LOSSES.index(loss)].value for loss in (0.005, 0.02)]
    assert weaker == pytest.approx([-0.025, -0.035], abs=0.01), "0.04 (1 - exp(-2 push)) where push^2 is loss / 0.02"
    lowest = rows[rows["key"] == "delora"].groupby(["run", "strength"])["clip_t"].mean().min()
    assert frontier_report.envelope_table(analysis).rows[0][-1] == f"{lowest:.3f}"
    table = frontier_report.loss_table(analysis)
    assert [row[0] for row in table.rows] == ["DeLoRA", "DeLoRA, zero start"]
    assert table.header[1] == "0.005" and table.rows[0][2].startswith(f"{delora.difference.value:+.3f} [")

    on_grid = np.interp(analysis.target, analysis.grid, delora.fidelity.difference)
    assert on_grid == pytest.approx(delora.difference.value, abs=0.005) and (lora.fidelity.difference == 0).all()

    shuffled = analyse(reordered(rows))
    assert shuffled.results[0].at_target == analysis.results[0].at_target
    judged = analyse(rows, judges=["d"])
    assert judged.results[-1].judged[0].value == pytest.approx(
        rows.query("key == 'lora' and subject == 'd' and rate == 1 and strength == 0.7")["dino"].mean()
    )


def reordered(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows with the settings of each method in another order."""
    return rows.iloc[np.lexsort((np.arange(len(rows)), -rows["strength"], rows["key"] != BASE))]


def test_an_incomplete_setting_is_left_out_and_said():
    rows = made_up_rows()
    best = rows.query("key == 'lora'").groupby(["run", "strength"])["dino"].mean().idxmax()
    where = (rows["run"] == best[0]) & (rows["strength"] == best[1])
    rows.loc[where & (rows["subject"] == "a") & (rows["seed"] == 1), "dino"] = np.nan
    analysis = analyse(rows)
    assert analysis.incomplete == [("LoRA", 1)]
    text = frontier_report.caption(analysis, "frontier", 0.01, None)
    assert "Left out, since a run of a subject or seed did not finish: LoRA 1." in text
    assert "Points: DeLoRA 8, DeLoRA, zero start 8, LoRA 7." in text
    rows.loc[(rows["key"] == BASE) & (rows["seed"] == 0), "dino"] = np.nan
    with pytest.raises(InputError, match="the base model has no images of some subjects"):
        analyse(rows)


def test_a_method_that_does_not_reach_the_other():
    rows = made_up_rows(("etherplus", "lora"))
    rows.loc[rows["key"] == "etherplus", "dino"] = 0.2
    text = frontier_report.caption(analyse(rows), "frontier", 0.01, None)
    (line,) = [line for line in text.splitlines() if line.startswith("| ETHER+ |") and "not reached" in line]
    assert line.count("not reached") == 2 and "inf" not in text and "nan" not in text


@pytest.mark.integration
@pytest.mark.parametrize("keys", [("delora", "delora-zero", "lora"), ("delora",)])
def test_everything_is_written_from_rows_without_images(tmp_path, keys):
    made_up_rows(keys).to_parquet(tmp_path / "frontier.parquet", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "plan", lambda options: pytest.fail("something is trained"))
        frontier.run(parse("--output_dir", tmp_path, "--from_rows"))
    with Image.open(tmp_path / "frontier-small.png") as small:
        assert small.width == 700
    for name in ("frontier.png", "frontier.svg", "frontier.html", "frontier.md"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "NaN" not in embedded(tmp_path / "frontier.html")


def embedded(page: Path) -> str:
    """The JSON that the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', page.read_text(), re.DOTALL)
    return text


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_escapes_prompts_and_subjects(tmp_path, name):
    rows = made_up_rows()
    Image.new("RGB", (224, 112)).save(tmp_path / "photos.webp")
    (tmp_path / "shown.json").write_text(json.dumps([[name, name], ["b", f"a photo of {name}"]]))
    rows["label"] = [label if key == BASE else name for key, label in zip(rows["key"], rows["label"])]
    rows["schedule"] = name
    analysis = analyse(rows)
    text = frontier_page.render(analysis, tmp_path, frontier_report.tables(analysis))
    page = tmp_path / "page.html"
    page.write_text(text)
    assert "<script>alert" not in text and "<img src=x" not in text
    assert html.unescape(text).count(name) > 10
    data = json.loads(embedded(page))
    assert data["series"][0]["label"] == name and name in data["series"][0]["points"][0]["words"]
    assert not re.findall(r"(?:src|href)=[\"']?(?:http|/)", text), "the page needs nothing else"


def test_settings_in_words():
    record = {"key": "delora", "rate": 0.25, "learning_rate": 0.005, "bound": 0.15, "schedule": "cosine"}
    record |= {"steps": 900, "strength": 0.7}
    assert in_words(record) == "1/4x the default rate (0.005), bound 0.15, cosine, 900 steps, strength 0.7"
    assert in_words(record | {"rate": 1.5, "bound": None}).startswith("1.5x the default rate (0.005), cosine")


@pytest.mark.integration
def test_a_tiny_study_from_start_to_end(tmp_path, tiny_sd, tiny_scorers):
    flags: list[object] = ["--output_dir", tmp_path / "out", "--subjects", "car", "duck", "--images_per_prompt", 1]
    flags += ["--methods", "delora", "lora", "--multipliers", "1", "--bounds", "0.2", "--schedules", "cosine"]
    flags += ["--step_multipliers", "1", "--strengths", "0.5", "--together", "2", "--jobs", "2"]
    flags += ["--train", "max_train_steps=2", "resolution=32", "rank=2", "--generate", "num_inference_steps=1"]
    flags += ["--pretrained_model_name_or_path", tiny_sd, "--dino", f"local-dir:{tiny_scorers / 'dino'}"]
    flags += ["--clip", f"local-dir:{tiny_scorers / 'clip'}"]
    result = run_eval("study", "frontier", *flags)
    assert result.returncode == 0, result.stderr[-2000:]
    out = tmp_path / "out"
    assert (out / "frontier.md").read_text() in result.stdout
    rows = pd.read_parquet(out / "frontier.parquet")
    assert rows.groupby("key").size().to_dict() == {BASE: 2, "delora": 4, "lora": 4}
    assert rows.notna().all()[["dino", "clip_t", "clip_i", "drift", "distance"]].all()
    assert sorted(rows["strength"].unique()) == [0, 0.5, 1]
    runs = sorted(path.name for path in (out / "runs").iterdir() if not path.name.startswith("."))
    assert len(runs) == 3 and len(list(out.glob("runs/*/seed-0/*/adapter/*.safetensors"))) == 4
    assert [path.parents[1].name for path in out.glob("runs/*/seed-0/.base")] == ["none"]
    trained = rows[rows["key"] != BASE]
    by_strength = trained.pivot(index=["run", "subject"], columns="strength", values=["distance", "drift"])
    np.testing.assert_allclose(by_strength["distance", 0.5], by_strength["distance", 1.0] / 2)
    images = [out / "runs" / runs[0] / "seed-0" / "car" / name for name in ("pictures", "pictures-at-strength-0.5")]
    metadata = [[json.loads(line) for line in (f / "metadata.jsonl").read_text().splitlines()] for f in images]
    assert {record["strength"] for record in metadata[1]} == {0.5}
    prompts = [[record["prompt"] for record in records] for records in metadata]
    assert prompts[0] == prompts[1] and "a photo of a mug on the beach" in prompts[0]
    for name in ("none", "delora", "lora", "photos"):
        with Image.open(out / "frontier-images" / f"{name}.webp") as sheet:
            assert sheet.height == frontier_page.SIDE and np.asarray(sheet.convert("L")).std() > 5
    assert (out / "frontier.html").read_text().count("data:image/webp") == 4

    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*.safetensors")}
    more = run_eval("study", "frontier", *flags)
    assert more.returncode == 0, more.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*.safetensors")} == before, "trained again"
    pd.testing.assert_frame_equal(pd.read_parquet(out / "frontier.parquet"), rows)
