"""The comparison of training options: its statistics, and scores whose true values rendered images give."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks import toy_scores, training_options
from benchmarks.miniature_runs import PROMPT_PLACES, flags
from benchmarks.paired_table import difference, interval, table
from benchmarks.training_options import BASE, COMPARISONS, Run, training_flags
from data.toybox.places import PLACES, STUFF
from data.toybox.render import render
from data.toybox.scenes import photograph, unseen_subject
from delora_diffusers.json_lines import write_json_lines

RESULTS = [
    {"arm": arm, "subject": subject, "seed": seed, "scores": {"dino": value}}
    for arm, subject, seed, value in (
        # The differences are 0.3 and 0.1 for toy 1, 0.6 for toy 2; toy 3 and one seed of toy 2 have no counterpart.
        ("new", 2, 0, 0.9), ("new", 1, 1, 0.5), ("new", 1, 0, 0.5), ("new", 3, 0, 0.1),
        ("old", 1, 0, 0.2), ("old", 1, 1, 0.4), ("old", 2, 0, 0.3), ("old", 2, 1, 0.0),
        (BASE, 1, None, 0.0), (BASE, 2, None, 0.2),
    )
]  # fmt: skip


def test_interval_is_the_percentile_bootstrap_over_toys():
    # The sum of a resample of five zeros and five ones is binomial (10, 1/2); its 2.5% and 97.5% quantiles are 2 and 8.
    toys = pd.MultiIndex.from_tuples([(toy, 0) for toy in range(10)], names=["subject", "seed"])
    assert interval(pd.Series([0.0] * 5 + [1.0] * 5, toys)) == pytest.approx((0.5, 0.2, 0.8))


def test_seeds_are_averaged_before_toys():
    runs = pd.MultiIndex.from_tuples([(1, 0), (1, 1), (1, 2), (2, 0)], names=["subject", "seed"])
    # Two toys with means 0.2 and 0.6; a resample is one of them twice with probability 1/4 each.
    assert interval(pd.Series([0.1, 0.2, 0.3, 0.6], runs)) == pytest.approx((0.4, 0.2, 0.6))


def test_differences_are_paired_by_toy_and_seed():
    frame = pd.DataFrame([{**row, "seed": row["seed"] or 0, **row["scores"]} for row in RESULTS])
    pairs = difference(frame, "new", "old", "dino")
    assert pairs.to_dict() == pytest.approx({(1, 0): 0.3, (1, 1): 0.1, (2, 0): 0.6})
    assert interval(pairs) == pytest.approx((0.4, 0.2, 0.6))


def test_table():
    text = table(RESULTS, [BASE, "old", "new"], "old", ["new"], {"dino": "DINO", "drift": "drift"})
    assert "| base model | 0.100 [0.000, 0.200] |  |" in text
    assert "| old | 0.225 [0.150, 0.300] |  |" in text
    assert "| minus old | DINO | drift |" in text and "| new | +0.400 [+0.200, +0.600] |  |" in text


def test_every_prompt_has_a_place():
    for name, place in PLACES.items():
        assert {toy_scores.place_of(f"a photo of a mug {phrase}") for phrase in place.phrases} == {name}
    assert len({toy_scores.place_of(phrase) for phrase in PROMPT_PLACES}) == len(PROMPT_PLACES)
    # What an image has leaked from the photos cannot be what its prompt asks for.
    assert not {toy_scores.place_of(phrase) for phrase in PROMPT_PLACES} & set(training_options.PHOTO_PLACES)


def test_a_toy_at_the_border_is_cut_off():
    toys = np.zeros((4, 96, 160), bool)
    toys[0, 10:80, 10:150] = True  # inside
    toys[1, 10:80, 120:] = True  # at the right border
    toys[2, 90:, 60:100] = True  # at the bottom
    toys[3, 0, 3] = True  # a stray pixel
    assert toy_scores.touches_border(toys).tolist() == [False, True, True, False]


def test_flags_of_an_arm(tmp_path):
    run = Run(tmp_path / "214", "preservation", "prior preservation", 214, 1, 20)
    arguments = flags(training_flags(run))
    assert "--with_prior_preservation" in arguments and "True" not in arguments
    assert arguments[arguments.index("--class_prompt") + 1] == "a photo of a car"
    assert arguments[arguments.index("--class_data_dir") + 1] == str(tmp_path / "214" / "class_images")
    masked = training_flags(Run(tmp_path, "masks", "masks with background 0", 214, 0, 20))
    assert masked["instance_data_dir"] == tmp_path / "photos-and-masks" and "class_prompt" not in masked
    outputs = [run._replace(arm=arm, seed=seed).output for arm in COMPARISONS["preservation"].arms for seed in (0, 1)]
    assert len(set(outputs)) == len(outputs)


def test_flags_that_do_not_exist_are_rejected_at_once(tmp_path, monkeypatch):
    comparison = training_options.Comparison({"none": {}, "new": {"with_magic": True}})
    monkeypatch.setitem(COMPARISONS, "ema", comparison)
    with pytest.raises(SystemExit, match="there is no flag --with_magic.*choose other --arms"):
        training_options.main(["ema", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_scores_of_rendered_images(tmp_path):
    """Renders stand in for generated images, because what they show is known."""
    kind, photo_place = "car", "kitchen"
    places = [toy_scores.place_of(phrase) for phrase in PROMPT_PLACES]
    shown = [*places[:4], photo_place, photo_place]  # two of six leaked
    scenes = [photograph(unseen_subject(214), 0, i, name) for i, name in enumerate(shown)]
    images, maps = render(scenes, (160, 96))
    lines = []
    for folder in ("adapted", "base"):
        (tmp_path / folder).mkdir()
        lines = [{"file_name": f"{i}.png", "prompt": f"a photo of sks {kind} {p}"} for i, p in enumerate(PROMPT_PLACES)]
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{i}.png")
        write_json_lines(tmp_path / folder / "metadata.jsonl", lines)
    prompts = [line["prompt"] for line in lines]

    shares = toy_scores.place_shares(tmp_path / "adapted", kind, photo_place)
    assert shares == pytest.approx({"in_place": 4 / 6, "leaked": 2 / 6})
    assert toy_scores.drift(tmp_path / "adapted", tmp_path / "base", prompts) == pytest.approx(0, abs=1e-6)
    Image.new("RGB", (160, 96), "grey").save(tmp_path / "adapted" / "0.png")
    assert toy_scores.drift(tmp_path / "adapted", tmp_path / "base", prompts[:1]) > 0.3
    assert toy_scores.drift(tmp_path / "adapted", tmp_path / "base", prompts[1:]) == pytest.approx(0, abs=1e-6)

    files, toys = [tmp_path / "base" / f"{i}.png" for i in range(5)], maps.numpy() >= len(STUFF)
    lefts = [64, 64, 64, 32, 32]  # of square crops; the first three go through the toys, which are in the middle
    for file, left in zip(files, lefts):
        with Image.open(file) as image:
            image.crop((left, 0, left + 96, 96)).save(file)
    truth = toy_scores.touches_border(np.stack([toy[:, left : left + 96] for toy, left in zip(toys, lefts)]))
    assert truth.tolist() == [True] * 3 + [False] * 2
    assert toy_scores.cut_off(files) == 0.6
