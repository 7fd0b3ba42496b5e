"""The rendered world."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data.toybox.__main__ import main
from data.toybox.captions import caption, full_caption
from data.toybox.places import PLACES, STUFF
from data.toybox.render import render
from data.toybox.scenes import (
    SEMANTIC_CLASSES,
    is_unseen_pair,
    is_unseen_subject,
    photograph,
    training_subject,
    unseen_subject,
)
from data.toybox.shapes import CLASSES
from data.toybox.surfaces import PATTERNS

CORNER = {"size": 48}


def some_scenes(count: int):
    """One picture of each class, in all the places in turn."""
    return [photograph(unseen_subject(i), 5, i, list(PLACES)[i % len(PLACES)]) for i in range(count)]


@pytest.fixture(scope="module")
def drawn():
    return render(some_scenes(14), **CORNER)


def test_the_same_seed_gives_the_same_bytes(drawn):
    again = render(some_scenes(14), **CORNER)
    assert torch.equal(drawn[0], again[0]) and torch.equal(drawn[1], again[1])


def test_a_picture_does_not_depend_on_its_batch(drawn):
    for number in (0, 9):
        alone = render(some_scenes(14)[number : number + 1], **CORNER)
        assert torch.equal(alone[0][0], drawn[0][number]) and torch.equal(alone[1][0], drawn[1][number])


@pytest.mark.gpu
def test_the_gpu_draws_the_same_pictures():
    scenes = some_scenes(42)
    pictures, maps = render(scenes, device="cpu")
    others, other_maps = (tensor.cpu() for tensor in render(scenes, device="cuda"))
    differ = ((pictures.int() - others.int()).abs() > 1).any(dim=1).float().mean()
    assert differ <= 1e-3, f"{float(differ):.2%} of the pixels"
    assert (maps != other_maps).float().mean() <= 1e-3


def test_the_map_names_the_toy_and_the_place(drawn):
    pictures, maps = drawn
    assert pictures.dtype == maps.dtype == torch.uint8 and pictures.shape == (14, 3, 48, 48)
    for number, kind in enumerate(CLASSES):
        found = set(maps[number].unique().tolist())
        toys = {label for label in found if label >= len(STUFF)}
        assert toys == {SEMANTIC_CLASSES.index(kind)}
        share = (maps[number] >= len(STUFF)).float().mean()
        assert 0.06 < share < 0.7, f"{kind} covers {float(share):.0%}"
        assert len(found) > 1
    # The toy itself is pictured, not one flat patch.
    assert all(picture[:, map_ >= len(STUFF)].float().std() > 8 for picture, map_ in zip(pictures, maps))


def test_what_is_held_out_stays_out():
    seen = [training_subject(i) for i in range(300)]
    assert not any(is_unseen_subject(subject) for subject in seen)
    assert all(is_unseen_subject(unseen_subject(i)) for i in range(50))
    assert [unseen_subject(i).kind for i in range(14)] == list(CLASSES)
    views = [photograph(subject, 1, i).view for i, subject in enumerate(seen)]
    assert not any(is_unseen_pair(subject.kind, view.place) for subject, view in zip(seen, views))
    assert {subject.pattern for subject in seen} == set(PATTERNS)
    assert sum(is_unseen_pair(kind, place) for kind in CLASSES for place in PLACES) >= 3


def test_captions_say_what_is_there():
    for number in range(60):
        scene = photograph(training_subject(number), 2, number)
        text = full_caption(scene)
        assert scene.subject.kind in text and all(colour in text for colour in scene.subject.colours)
        assert any(phrase in text for phrase in PLACES[scene.view.place].phrases)
        texts = {caption(scene, np.random.default_rng(seed)) for seed in range(12)}
        assert len(texts) > 6 and all(scene.subject.kind in text for text in texts)


def test_subject_command(tmp_path, capsys):
    main(["subject", "3", str(tmp_path / "s"), "--count", "3", "--size", "32", "--captions"])
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["00.png", "01.png", "02.png", "metadata.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "s" / "metadata.jsonl").read_text().splitlines()]
    assert all(line["text"].startswith("a photo of sks ball ") for line in lines)
    assert "wrote" in capsys.readouterr().out


def test_maps_command(tmp_path):
    main(["maps", str(tmp_path / "m"), "--count", "4", "--size", "32", "--seed", "1"])
    names = json.loads((tmp_path / "m" / "classes.json").read_text())
    for text in (tmp_path / "m" / "metadata.jsonl").read_text().splitlines():
        line = json.loads(text)
        with (
            Image.open(tmp_path / "m" / line["map"]) as semantic,
            Image.open(tmp_path / "m" / line["file_name"]) as image,
        ):
            assert semantic.mode == "P" and semantic.size == image.size == (32, 32)
            labels = {names[str(label)] for label in np.unique(np.asarray(semantic))}
        assert line["class"] in labels and line["class"] in line["text"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["render", "{out}", "--count", "0"], "count"),
        (["render", "{out}", "--size", "7"], "size"),
        (["subject", "0", "{out}", "--place", "the moon"], "the moon"),
        (["render", "{out}", "--device", "nonsense"], "--device nonsense cannot be used"),
        (["subject", "0", "{there}"], "exists already"),
    ],
)
def test_bad_input(tmp_path, capsys, typed, message):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main([word.format(out=tmp_path / "out", there=there) for word in typed])
    said = f"{stop.value.code} {capsys.readouterr().err}"
    assert stop.value.code != 0 and re.search(message, said), said
    assert not (tmp_path / "out").exists() and (there / "mine").read_text() == "x"
