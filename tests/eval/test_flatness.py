"""The flatness and the boundary study: their statistics against brute force, and both as a user runs them."""

import argparse

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from benchmarks import flatness_table
from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from eval.commands.study import add_arguments, check_study_flags
from eval.study import boundary, figures, flatness
from eval.study.boundary import crossing, knees, relative_distance
from eval.study.flatness import change_by_noise, largest_changes
from eval.study.flatness_joint import difference_table, joined, joint_table, paired_difference, plot_joint
from eval.study.settings import Setting
from eval.study.trials import continues
from tests.helpers import run_eval, write_photos
from train_dreambooth_delora import parse_arguments


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*words, "--output_dir", "out"])


def table_of(scores: np.ndarray, xs: list[float], steps: list[float], method: str = "lora") -> pd.DataFrame:
    """Rows of a grid, scores (x, steps, subject, seed)."""
    rows = [
        {"model": "m", "label": f"{method} {s}", "method": method, "x": x, "step_multiplier": s, "subject": f"s{k}"}
        | {
            "seed": seed,
            "protocol": "toybox",
            "dino": value,
            "clip_i": value,
            "clip_t": -value,
        }
        for i, x in enumerate(xs)
        for j, s in enumerate(steps)
        for k, by_seed in enumerate(scores[i, j])
        for seed, value in enumerate(by_seed)
        if not np.isnan(value)
    ]
    return pd.DataFrame(rows)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_largest_changes_are_those_of_the_means(number):
    random = np.random.default_rng(number)
    scores = random.normal(size=(3, 2, 4, 2))
    scores[2, 1, 0] = np.nan  # one subject failed there
    scores[2, 0] = np.nan  # and every subject here
    changes = largest_changes(table_of(scores, [0.5, 1.0, 8.0], [1.0, 3.0]), "dino")
    means = [
        np.nanmean(scores[i, j].mean(axis=1)) for i in range(3) for j in range(2) if not np.isnan(scores[i, j]).all()
    ]
    default = scores[1, 0].mean()
    assert changes["change"][0] == pytest.approx(max(means) - min(means))
    assert changes["deviation"][0] == pytest.approx(max(abs(mean - default) for mean in means))
    assert (changes["lowest"], changes["highest"]) == pytest.approx((min(means), max(means)))
    assert changes["default"] == pytest.approx(default)


def test_the_interval_of_a_change_resamples_subjects():
    # The scores of subject k rise by k / 10 from one rate to the other: the change is the mean of a resample.
    scores = np.zeros((2, 1, 10, 1))
    scores[1, 0, :, 0] = np.arange(10) / 10
    value, low, high = largest_changes(table_of(scores, [1.0, 2.0], [1.0]), "dino")["change"]
    means = np.random.default_rng(1).choice(np.arange(10) / 10, (20_000, 10)).mean(axis=1)
    assert value == pytest.approx(0.45)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)


def test_the_change_by_noise_is_the_expected_range_of_equal_settings():
    random = np.random.default_rng(0)
    tables = [
        table_of(random.normal(size=(1, 1, 40, 1)) + random.normal(0, 0.2, (3, 3, 40, 1)), [0.5, 1, 2], [1, 3, 9])
        for _ in range(30)
    ]
    estimates = [change_by_noise(table, "dino") for table in tables]
    observed = [largest_changes(table, "dino")["change"][0] for table in tables]
    expected = 2.970 * 0.2 / np.sqrt(40)  # the mean range of nine normal deviates is 2.970
    assert np.mean(estimates) == pytest.approx(expected, rel=0.03)
    assert np.mean(observed) == pytest.approx(expected, rel=0.1)
    better = [
        table.assign(dino=table["dino"] + 5 * (table["x"] == 1)) for table in tables
    ]  # which is a difference of settings, not noise
    assert [change_by_noise(table, "dino") for table in better] == pytest.approx(estimates)
    assert np.isnan(change_by_noise(table_of(np.zeros((2, 2, 1, 1)), [1, 2], [1, 3]), "dino"))


def test_paired_differences_are_those_of_the_same_subjects():
    random = np.random.default_rng(3)
    scores = random.normal(size=(2, 2, 6, 1))
    others = scores[:, :, :5] - np.arange(5)[:, None] / 10  # one subject fewer
    tables = [table_of(scores, [1.0, 8.0], [1.0, 3.0], "delora"), table_of(others, [1.0, 8.0], [1.0, 3.0], "lora")]
    _, cells = difference_table(pd.concat(tables))
    assert [line[1] for line in cells] == [
        "DeLoRA minus LoRA, 1x rate, 1x steps",
        "DeLoRA minus LoRA, 1x rate, 3x steps",
        "DeLoRA, 3x minus 1x the steps, mean over rates",
    ]
    assert (
        cells[1][2].startswith("0.200 [") and cells[0][2].startswith("0.200 [") and cells[0][3].startswith("-0.200 [")
    )
    assert cells[2][2].startswith(f"{(scores[:, 1] - scores[:, 0]).mean():.3f} [")
    value, low, high = paired_difference(tables[0], tables[1], "dino") or (0, 0, 0)
    assert (
        low == pytest.approx(0.08, abs=0.03) and high == pytest.approx(0.32, abs=0.03) and value == pytest.approx(0.2)
    )


def test_a_joint_table_says_which_settings_are_missing():
    scores = np.zeros((2, 2, 3, 1))
    scores[1, 1] = 0.5
    failed, partly = scores.copy(), scores.copy()
    failed[1, 0] = np.nan
    partly[1, 0, 1:] = np.nan  # one subject of three would be compared with all
    tables = [
        table_of(of_method, [1.0, 8.0], [1.0, 3.0], method)
        for of_method, method in ((scores, "lora"), (failed, "delora"), (partly, "dora"))
    ]
    everything = joined([*tables, pd.concat(tables).assign(model="n")])
    header, cells = joint_table(everything)
    assert header[2:] == [
        "DINO over rates and steps",
        "CLIP-T over rates and steps",
        "DINO over rates",
        "CLIP-T over rates",
        "missing",
    ]
    assert [line[:2] for line in cells] == [[model, title] for model in "mn" for title in ("LoRA", "DeLoRA", "DoRA")]
    moved, still = "0.500 [0.500, 0.500]", "0.000 [0.000, 0.000]"  # the scores rise only at 3 times the steps
    for line, missing in zip(cells, (False, True, True, False, True, True)):
        assert line[2] == moved and line[4] == still + (", without 8x" if missing else "")
        assert line[6] == ("1 of 4 settings" if missing else "")
    with pytest.raises(InputError, match="the rows of LoRA on m are there twice; give each study once"):
        joined([tables[0], tables[0]])
    assert len(joined([tables[0].assign(protocol="delora", model="o"), tables[1]])["model"].unique()) == 2


@pytest.mark.parametrize("models", [1, 3])
def test_a_joint_figure_sorts_rates_and_takes_all_methods(models, tmp_path):
    import matplotlib.pyplot as plt

    random = np.random.default_rng(0)
    tables = [
        table_of(random.normal(size=(3, 2, 3, 1)), [8.0, 0.125, 1.0], [1.0, 3.0], method).assign(model=model)
        for method in METHODS
        for model in "abc"[:models]
    ]
    plotted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda figure, path: plotted.append(figure))
        plot_joint(joined(tables), tmp_path / "joint")
    (figure,) = plotted
    assert len(figure.axes) == 2 * models
    for panel in figure.axes:
        assert all(list(line.get_xdata()) == [0.125, 1.0, 8.0] for line in panel.lines)
        assert len(panel.lines) == 2 * len(METHODS)
    figure.canvas.draw()
    width, (legend,) = figure.bbox.width, figure.legends
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= width
    plt.close(figure)


@given(st.lists(st.floats(0.01, 20), min_size=2, max_size=8))
def test_different_multiples_have_different_labels(values):
    values = [float(f"{value:.3g}") for value in values]
    assert len({figures.multiple(value) for value in values}) == len(set(values))
    assert [figures.multiple(x) for x in (1 / 3, 0.125, 0.4, 0.75, 3)] == ["1/3", "1/8", "0.4", "0.75", "3"]


def test_the_rows_of_other_files_are_refused(tmp_path):
    file = tmp_path / "rows.parquet"
    with pytest.raises(InputError, match=r"rows\.parquet does not exist; give the flatness\.parquet"):
        flatness_table.read(file)
    with pytest.raises(InputError, match="is a folder; give the flatness"):
        flatness_table.read(tmp_path)
    file.write_text("x")
    with pytest.raises(InputError, match="is not a parquet file"):
        flatness_table.read(file)
    rows = table_of(np.zeros((1, 1, 1, 1)), [1.0], [1.0])
    for wrong, what in (
        (rows.drop(columns="protocol"), "something else"),
        (rows.assign(method="vera"), "another study"),
    ):
        wrong.to_parquet(file)
        with pytest.raises(InputError, match=f"has rows of {what}; give the flatness"):
            flatness_table.read(file)
    rows[:0].to_parquet(file)
    with pytest.raises(InputError, match="has no rows"):
        flatness_table.read(file)


def brute_force_crossing(bounds: np.ndarray, curve: np.ndarray) -> float:
    """The first zero of the curve on a fine grid of log bounds."""
    grid = np.linspace(np.log(bounds[0]), np.log(bounds[-1]), 200_001)
    below = np.flatnonzero(np.interp(grid, np.log(bounds), curve) < 0)
    return float(np.exp(grid[max(0, below[0] - 1)])) if len(below) else float(bounds[-1])


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_a_crossing_is_the_first_zero(curve):
    bounds = np.geomspace(0.02, 0.5, len(curve))
    expected = brute_force_crossing(bounds, np.array(curve))
    (found,) = crossing(bounds, np.array([curve]))
    if all(abs(a) > 1e-3 for a in curve):  # a flat touch of zero is not resolved by the grid
        assert found == pytest.approx(expected, rel=1e-4)
    assert bounds[0] <= found * (1 + 1e-12) and found <= bounds[-1] * (1 + 1e-12)


def boundary_rows(bounds, dino, clip_t, base, subjects: int = 6) -> pd.DataFrame:
    """Rows of the boundary study; subjects differ by a constant that the base model shares."""
    rows = [
        {"method": method, "x": x, "subject": k, "dino": d + k / 100, "clip_t": c + k / 50}
        for method, x, d, c in [
            *(("delora", x, d, c) for x, d, c in zip(bounds, dino, clip_t)),
            ("none", np.nan, 0.3, base),
        ]
        for k in range(subjects)
    ]
    return pd.DataFrame(rows)


def test_knees():
    bounds = [0.1, 0.2, 0.4]
    by_score = knees(boundary_rows(bounds, [0.1, 0.5, 0.6], [0.7, 0.7, 0.66], base=0.7))
    # CLIP-T falls by 0.04 from 0.2 to 0.4, so a quarter of the way in log2 it has lost 0.01, in every resample.
    assert by_score["clip_t"] == pytest.approx((0.2 * 2**0.25,) * 3)
    # DINO's mean is 0.025 higher: 90% of 0.625 is 0.5625, and it rises from 0.525 at 0.2 to 0.625 at 0.4.
    value, low, high = by_score["dino"]
    assert value == pytest.approx(0.2 * 2 ** (0.0375 / 0.1)) and low < value < high
    never = knees(boundary_rows(bounds, [0.6, 0.6, 0.6], [0.7, 0.7, 0.7], base=0.7))
    assert never["clip_t"][0] == pytest.approx(0.4) and never["dino"][0] == pytest.approx(0.1)
    assert boundary.knee_text(never["clip_t"], bounds).startswith("≥ 0.400")
    assert boundary.knee_text(never["dino"], bounds).startswith("≤ 0.100")


@pytest.mark.parametrize("name", ["flatness", "boundary"])
def test_the_training_script_accepts_every_setting(name):
    module = {"flatness": flatness, "boundary": boundary}[name]
    points = module.settings_of(parse(name))
    trained = [setting for setting in points if setting.method != "none"]
    assert len({(s.label, s.x) for s in points}) == len({s.slug for s in points}) == len(points)
    for setting in trained:
        values = {key: value for key, value in setting.train.items() if key != "steps"}
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        args = parse_arguments(["--method", setting.method, *words])
        assert args.learning_rate == pytest.approx(setting.train["learning_rate"])
        if name == "boundary":
            assert args.relative_bound == setting.x
    if name == "flatness":
        rates = [s.train["learning_rate"] / METHODS["delora"].learning_rate for s in trained if s.method == "delora"]
        assert len(trained) == 3 * 15 and max(rates) / min(rates) == pytest.approx(64)
    else:
        assert len(trained) == 2 * 8 and points[-1].method == "none"


def test_only_a_schedule_that_ignores_the_number_of_steps_is_continued():
    assert parse_arguments([]).lr_scheduler == "constant", "what continues() takes for the default"
    shorter, longer = (Setting(f"{m}x", 1.0, "delora", {"learning_rate": 0.02, "steps": m}) for m in (1.0, 3.0))
    assert continues(shorter, longer, parse("flatness", "--train", "lr_scheduler=constant"))
    assert not continues(shorter, longer, parse("flatness", "--train", "lr_scheduler=cosine"))
    other = Setting("3x", 2.0, "delora", {"learning_rate": 0.04, "steps": 3.0})
    assert not continues(shorter, other, parse("flatness", "--train", "lr_scheduler=constant"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lr", "--bounds", "0.1"), "--bounds applies to boundary and frontier, not to lr"),
        (("boundary", "--step_multipliers", "2"), "--step_multipliers applies to flatness and frontier"),
        (("boundary", "--methods", "lora"), "only DeLoRA has the boundary"),
    ],
)
def test_flags_of_other_studies_are_rejected(words, message):
    with pytest.raises(InputError, match=message):
        check_study_flags(parse(*words))


@pytest.mark.integration
def test_both_studies_on_a_tiny_model(tiny_sd, tiny_scorers, tmp_path):
    """Two toys, a shorter and a longer training; the longer one does not continue the shorter with cosine decay."""
    toys = {name: {"class": name, "kind": "toy"} for name in ("car", "duck")}
    for name in toys:
        write_photos(tmp_path / "photographs" / name, 2)
    content = {"images_per_prompt": 1, "prompts": {"toy": ["a photo of {identifier} {class} at night"]}}
    (tmp_path / "toys.yaml").write_text(yaml.safe_dump(content | {"subjects": toys}))
    out = tmp_path / "out"
    flags = ["--output_dir", out, "--benchmark", tmp_path / "toys.yaml", "--together", 2, "--jobs", 2]
    flags += ["--photographs", tmp_path / "photographs", "--pretrained_model_name_or_path", tiny_sd]
    flags += ["--dino", f"local-dir:{tiny_scorers / 'dino'}", "--clip", f"local-dir:{tiny_scorers / 'clip'}"]
    flags += ["--lpips", "none", "--generate", "num_inference_steps=1"]
    flags += ["--train", "train_batch_size=1", "max_train_steps=3", "resolution=32", "rank=2"]
    more = ("--methods", "delora", "--multipliers", "1", "--step_multipliers", "0.34", "1")
    result = run_eval("study", "flatness", *flags, "lr_scheduler=cosine", *more)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = pd.read_parquet(out / "flatness.parquet")
    assert len(rows) == 4 and set(rows["model"]) == {"tiny-sd"}
    assert set(zip(rows["x"], rows["step_multiplier"])) == {(1, 0.34), (1, 1)}
    means = rows.groupby(["x", "step_multiplier"])["clip_t"].mean()
    caption = (out / "flatness.md").read_text()
    assert f"| {means[1, 1]:.3f} | {means.min():.3f} | {means.max():.3f} | {means.max() - means.min():.3f} [" in caption
    commands = [file.read_text() for file in out.glob("runs/*-max_train_steps-3/*/*/adapter/config.json")]
    assert len(commands) == 2 and all("checkpoint-1" not in command for command in commands)
    flatness_table.main([str(out / "flatness.parquet"), "--output_dir", str(out / "joint")])
    assert f"| tiny-sd | DeLoRA | {rows.groupby(['x', 'step_multiplier'])['dino'].mean().agg(np.ptp):.3f} [" in (
        (out / "joint/flatness.md").read_text()
    )

    result = run_eval("study", "boundary", *flags, "--bounds", "0.05", "0.2", "--multipliers", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = pd.read_parquet(out / "boundary.parquet")
    assert len(rows) == 6 and (rows["method"] == "none").sum() == 2
    assert "Base model tiny-sd" in (out / "boundary.md").read_text()
    (adapter, *_) = out.glob("runs/*relative_bound-0.2*/*/car/adapter/*.safetensors")
    expected = mean_relative_distance(tiny_sd, adapter)
    (reached,) = rows[(rows["x"] == 0.2) & (rows["subject"] == "car")]["relative_distance"]
    assert reached == pytest.approx(relative_distance(adapter)) == pytest.approx(expected, rel=1e-4)
    for name in ("flatness.png", "flatness-images.png", "joint/flatness.png", "boundary.png", "boundary-images.png"):
        with Image.open(out / name) as figure:
            assert figure.width > 200


def mean_relative_distance(model_folder, adapter) -> float:
    """The mean of |W' - W| / |W|, by the library."""
    import torch

    from delora_diffusers import load_adapter
    from delora_diffusers.families.loading import open_model

    model = open_model(str(model_folder))
    unet = model.load("unet", torch.float32)
    loaded = load_adapter(unet, adapter)
    norms = {name: float(module.weight.norm()) for name, module, _ in loaded.sites()}
    assert len(norms) == len([key for key in load_file(adapter) if key.endswith("lambda")])
    return float(np.mean([distance / norms[name] for name, distance in loaded.distances().items()]))
