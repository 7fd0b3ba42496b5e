"""The rendered toy world: images, maps, captions, held-out combinations and the command line."""

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
from data.toybox.write import subject_scenes

SIZE = 48


def example_scenes(count: int):
    """One scene of each class, cycling through the places."""
    return [photograph(unseen_subject(i), 5, i, list(PLACES)[i % len(PLACES)]) for i in range(count)]


@pytest.fixture(scope="module")
def rendered():
    return render(example_scenes(14), SIZE)


def test_same_seed_gives_the_same_bytes(rendered):
    again = render(example_scenes(14), SIZE)
    assert torch.equal(rendered[0], again[0]) and torch.equal(rendered[1], again[1])


def test_image_does_not_depend_on_its_batch(rendered):
    for number in (0, 9):
        alone = render(example_scenes(14)[number : number + 1], SIZE)
        assert torch.equal(alone[0][0], rendered[0][number]) and torch.equal(alone[1][0], rendered[1][number])


@pytest.mark.parametrize("shape", [(80, SIZE), (SIZE, 80)])
def test_rectangle_shows_more_than_the_square_and_the_same_at_its_centre(rendered, shape):
    width, height = shape
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    images, maps = render(example_scenes(14), shape)
    assert images.shape == (14, 3, height, width) and maps.shape == (14, height, width)
    assert torch.equal(images[:, :, top : top + SIZE, left : left + SIZE], rendered[0])
    assert torch.equal(maps[:, top : top + SIZE, left : left + SIZE], rendered[1])
    # The toys are inside the square already, nearly always; what a rectangle adds is background.
    on_toy = maps >= len(STUFF)
    assert on_toy.sum() < 1.02 * (rendered[1] >= len(STUFF)).sum()
    border = images[:, :, :, :left] if left else images[:, :, :top]
    assert all(strip.float().std() > 1 for strip in border)


@pytest.mark.gpu
def test_gpu_renders_the_same_images():
    scenes = example_scenes(42)
    images, maps = render(scenes, device="cpu")
    gpu_images, gpu_maps = (tensor.cpu() for tensor in render(scenes, device="cuda"))
    differing = ((images.int() - gpu_images.int()).abs() > 1).any(dim=1).float().mean()
    assert differing <= 1e-3, f"{float(differing):.2%} of the pixels differ"
    assert (maps != gpu_maps).float().mean() <= 1e-3


def test_map_contains_the_toy_and_its_surroundings(rendered):
    images, maps = rendered
    assert images.dtype == maps.dtype == torch.uint8 and images.shape == (14, 3, SIZE, SIZE)
    for number, kind in enumerate(CLASSES):
        labels = set(maps[number].unique().tolist())
        toys = {label for label in labels if label >= len(STUFF)}
        assert toys == {SEMANTIC_CLASSES.index(kind)}
        share = (maps[number] >= len(STUFF)).float().mean()
        assert 0.06 < share < 0.7, f"{kind} covers {float(share):.0%}"
        assert len(labels) > 1
    # The toy is shaded and coloured, not a flat patch.
    assert all(image[:, semantic >= len(STUFF)].float().std() > 8 for image, semantic in zip(images, maps))


def test_training_subjects_exclude_held_out_combinations():
    seen = [training_subject(i) for i in range(300)]
    assert not any(is_unseen_subject(subject) for subject in seen)
    assert all(is_unseen_subject(unseen_subject(i)) for i in range(50))
    assert [unseen_subject(i).kind for i in range(14)] == list(CLASSES)
    views = [photograph(subject, 1, i).view for i, subject in enumerate(seen)]
    assert not any(is_unseen_pair(subject.kind, view.place) for subject, view in zip(seen, views))
    assert {subject.pattern for subject in seen} == set(PATTERNS)
    assert sum(is_unseen_pair(kind, place) for kind in CLASSES for place in PLACES) >= 3


def test_captions_describe_the_scene():
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


def test_subject_command_with_shapes_and_masks(tmp_path):
    shapes = [(40, 24), (24, 40), (32, 32)]
    flags = ["--count", "4", "--place", "beach", "--masks", "--shapes", *(f"{w}x{h}" for w, h in shapes)]
    main(["subject", "14", str(tmp_path / "s"), *flags])  # a mug, the first class after the background
    scenes = subject_scenes(14, 4, place="beach")
    assert len(list((tmp_path / "s").iterdir())) == 8
    for number, scene in enumerate(scenes):
        images, maps = render([scene], shapes[number % 3])
        with Image.open(tmp_path / "s" / f"{number:02}.png") as image:
            assert np.array_equal(np.asarray(image), images[0].permute(1, 2, 0))
        with Image.open(tmp_path / "s" / f"{number:02}.mask.png") as mask:
            assert mask.mode == "L" and mask.size == shapes[number % 3]
            toy = maps[0].numpy() == SEMANTIC_CLASSES.index(scene.subject.kind)
            assert np.array_equal(np.asarray(mask), np.where(toy, 255, 0))


def test_maps_command_with_shapes(tmp_path):
    main(["maps", str(tmp_path / "m"), "--count", "3", "--shapes", "32x24", "24x32"])
    for name, shape in (("00000", (32, 24)), ("00001", (24, 32)), ("00002", (32, 24))):
        sizes = []
        for folder in ("", "maps"):
            with Image.open(tmp_path / "m" / folder / f"{name}.png") as image:
                sizes.append(image.size)
        assert sizes == [shape, shape]


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
    ("arguments", "message"),
    [
        (["render", "{out}", "--count", "0"], "count"),
        (["render", "{out}", "--size", "7"], "size"),
        (["maps", "{out}", "--shapes", "32x32", "32x7"], "error: --shapes 32x7 is too small; give sides of at least 8"),
        (["maps", "{out}", "--shapes", "8x33"], "error: --shapes 8x33 is too long"),
        (["subject", "0", "{out}", "--shapes", "32"], "'32' is not a shape; write it as WIDTHxHEIGHT"),
        (["subject", "0", "{out}", "--shapes", "32x32", "--size", "32"], "not allowed with argument --shapes"),
        (["subject", "0", "{out}", "--place", "the moon"], "the moon"),
        (["render", "{out}", "--device", "nonsense"], "--device nonsense cannot be used"),
        (["subject", "0", "{existing}"], "already exists"),
        (["subject", "0", "{existing}/file/out", "--count", "1", "--size", "8"], "error: .*out could not be written"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main([argument.format(out=tmp_path / "out", existing=existing) for argument in arguments])
    output = f"{stop.value.code} {capsys.readouterr().err}"
    assert stop.value.code != 0 and re.search(message, output), output
    assert not (tmp_path / "out").exists() and (existing / "file").read_text() == "x"
