"""Benchmark definitions, shipped and from a file, and the check of a folder of photos."""

import shutil

import pytest
import yaml

from data.benchmark import SHIPPED, find_subjects, load_benchmark, main, render_subjects
from delora_diffusers.errors import InputError
from eval.metrics.scores import without_identifier
from tests.helpers import ROOT, write_photos

REAL = ROOT.parent / "shared" / "photos" / "dreambooth"


def test_dreambooth_matches_the_publication():
    benchmark = load_benchmark("dreambooth")
    assert len(benchmark.subjects) == 30 and benchmark.images_per_prompt == 4
    live = {s.name for s in benchmark.subjects if s.kind == "live"}
    assert live == {"cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"}
    prompts = {kind: set(templates) for kind, templates in benchmark.prompts.items()}
    assert {kind: len(p) for kind, p in prompts.items()} == {"object": 25, "live": 25}
    assert len(prompts["object"] & prompts["live"]) == 15
    sunglasses = next(s for s in benchmark.subjects if s.name == "pink_sunglasses")
    assert benchmark.prompts_of(sunglasses)[13] == "a sks glasses floating on top of water"
    assert benchmark.instance_prompt(sunglasses) == "a photo of sks glasses"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs DreamBooth's photos")
def test_dreambooth_matches_the_list_shipped_with_the_photos():
    text = (REAL / "prompts_and_classes.txt").read_text()
    listed = dict(line.split(",") for line in text.split("subject_name,class\n")[1].split("\n\n")[0].splitlines())
    benchmark = load_benchmark("dreambooth")
    assert {s.name: s.class_name for s in benchmark.subjects} == listed
    for kind, block in zip(("object", "live"), text.split("prompt_list = [")[1:]):
        published = [line.split("'")[1].replace("{0}", "{identifier}").replace("{1}", "{class}")
                   for line in block.splitlines() if line.startswith("'")]  # fmt: skip
        assert list(benchmark.prompts[kind]) == published
    contents = find_subjects(benchmark, REAL)
    assert len(contents.counts) == 12 and contents.counts["vase"] == 6
    assert len(contents.missing) == 18 and not contents.extra


@pytest.mark.integration
def test_toys_are_rendered_once(tmp_path):
    benchmark = load_benchmark("toybox")
    assert len(benchmark.subjects) == 10 and {len(p) for p in benchmark.prompts.values()} == {12}
    definition = yaml.safe_load((SHIPPED / "toybox.yaml").read_text())
    definition["subjects"] = {"hat": definition["subjects"]["hat"]}
    (tmp_path / "hat.yaml").write_text(yaml.safe_dump(definition))
    benchmark = load_benchmark(tmp_path / "hat.yaml")
    render_subjects(benchmark, tmp_path / "photographs")
    first = tmp_path / "photographs" / "hat" / "00.png"
    stamp = first.stat().st_mtime_ns
    render_subjects(benchmark, tmp_path / "photographs")
    assert first.stat().st_mtime_ns == stamp
    assert find_subjects(benchmark, tmp_path / "photographs").counts == {"hat": 5}
    definition["subjects"]["hat"]["toybox"] = 0
    (tmp_path / "hat.yaml").write_text(yaml.safe_dump(definition))
    with pytest.raises(InputError, match="toy 0 is a mug, not a hat; fix the benchmark"):
        render_subjects(load_benchmark(tmp_path / "hat.yaml"), tmp_path / "other")


@pytest.mark.parametrize("name", ["dreambooth", "toybox"])
def test_scoring_removes_the_identifier_from_every_prompt(name):
    benchmark = load_benchmark(name)
    for subject in benchmark.subjects:
        for prompt, template in zip(benchmark.prompts_of(subject), benchmark.prompts[subject.kind]):
            expected = template.replace("{identifier} ", "").replace("{class}", subject.class_name)
            assert without_identifier(prompt) == expected != prompt


def test_lists_the_subjects_of_a_folder(tmp_path, capsys):
    write_photos(tmp_path / "data" / "vase", 4)
    (tmp_path / "data" / "clock").mkdir()
    shutil.copytree(tmp_path / "data" / "vase", tmp_path / "data" / "my_dog")
    with pytest.raises(SystemExit) as stop:
        main(["dreambooth", "--photographs", str(tmp_path / "data")])
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert "1 of 30 subjects, 4 photos in" in output
    assert "extra: my_dog" in output and "candle, cat, cat2, clock" in output
    main(["toybox"])
    assert "10 subjects (10 toy with 12 prompts), 480 images per seed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {}}, "prompts must map each kind of subject to a list"),
        ({"prompts": {"toy": ["a photo of {class}"]}}, "must contain {identifier} and {class}"),
        ({"prompts": {"toy": ["a {identifier} {class} {class}"]}}, "once each"),
        ({"prompts": {"toy": ["a {identifier {class}"]}}, "must contain {identifier} and {class}"),
        ({"subjects": {"x": {"class": "cat", "kind": "live"}}}, "of kind 'live', which has no prompts"),
        ({"subjects": {"x": "cat"}}, "'x' needs a class"),
        ({"subjects": {"x": {"class": "hat", "kind": "toy", "toybox": -1}}}, "not a whole number of at least 0"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"prompt": []}, "unknown key prompt"),
    ],
)
def test_rejects_invalid_definitions(tmp_path, change, message):
    content = yaml.safe_load((SHIPPED / "toybox.yaml").read_text()) | change
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message) as raised:
        load_benchmark(tmp_path / "x.yaml")
    assert "x.yaml" in str(raised.value)


def test_missing_benchmark_and_folder(tmp_path):
    with pytest.raises(SystemExit, match="there is no benchmark nothing; choose one of dreambooth, toybox"):
        main(["nothing"])
    with pytest.raises(InputError, match="is not a folder"):
        find_subjects(load_benchmark("dreambooth"), tmp_path / "nowhere")
