"""Several concepts for one adapter: the file, and what training does with repeats, weights and class images."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train_dreambooth_delora as script
from data.concepts import read_concepts
from delora_diffusers.errors import InputError
from tests.helpers import training_flags, write_photos


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Photos of a dog and of a cat."""
    folder = tmp_path_factory.mktemp("concepts")
    write_photos(folder / "dog", 3)
    write_photos(folder / "cat", 2)
    return folder


def write_list(folder: Path, records: Any, name: str = "concepts.yaml") -> Path:
    file = folder / name
    text = json.dumps(records) if name.endswith("json") else yaml.safe_dump(records)
    file.write_text(records if isinstance(records, str) else text)
    return file


@pytest.mark.parametrize("name", ["concepts.yaml", "concepts.json"])
def test_keys_and_defaults(folders, tmp_path, monkeypatch, name):
    """Folders are relative to the working directory, like those of flags."""
    monkeypatch.chdir(folders)
    records = [
        {"instance_data_dir": "dog", "instance_prompt": "a {instance}", "instance_name": "sks dog", "repeats": 3},
        {"instance_data_dir": "cat", "class_data_dir": "cats", "weight": 0.5, "class_prompt": "a cat"},
    ]
    flags = ["--concepts_list", str(write_list(tmp_path, records, name)), "--output_dir", str(tmp_path / "out")]
    flags += ["--instance_prompt", "a photo of {instance}", "--instance_name", "qwe", "--class_prompt", "an animal"]
    flags += ["--with_output_preservation"]
    args = script.parse_arguments(flags)
    (subject,) = script.find_subjects(args)
    dog, cat = subject.concepts
    assert (len(dog.photographs), dog.repeats, dog.weight, dog.class_prompt) == (3, 3, 1.0, "an animal")
    assert (len(cat.photographs), cat.repeats, cat.weight, cat.class_prompt) == (2, 1, 0.5, "a cat")
    assert subject.prompts == ["a sks dog"] * 3 + ["a photo of qwe"] * 2
    assert cat.class_data_dir == Path("cats") and dog.class_data_dir is None
    assert subject.class_folder(0) == tmp_path / "out" / "class_images" / "00" and subject.class_folder(1) == Path(
        "cats"
    )


BAD: dict[str, tuple[Any, str]] = {
    "empty": ("", "is not a list of concepts; write lines like - {instance_data_dir"),
    "a mapping": ({"instance_data_dir": "dog"}, "is not a list of concepts"),
    "no YAML": ("- {", "concepts.yaml"),
    "no mapping": (["dog"], "concept 1 of .* is not a mapping"),
    "no folder": ([{"instance_prompt": "a dog"}], "concept 1 of .* has no instance_data_dir"),
    "an unknown key": (
        [{"instance_data_dir": "dog", "prompt": "x"}],
        "concept 1 of .* has an unknown key 'prompt'",
    ),
    "a list as a text": (
        [{"instance_data_dir": "dog", "instance_prompt": [5]}],
        r"has instance_prompt \[.5.\]; give a text",
    ),
    "a list as a folder": ([{"instance_data_dir": ["dog"]}], r"has instance_data_dir \['dog'\]; give a text"),
    "a missing folder": ([{"instance_data_dir": "horse"}], "horse is not a folder"),
}
BAD |= {
    f"repeats {value}": ([{"instance_data_dir": "dog", "repeats": value}], "has repeats .*; give a whole number from 1")
    for value in (0, -1, 1.5, "two", True, 1001, [1])
}
BAD |= {
    f"weight {value}": ([{"instance_data_dir": "dog", "weight": value}], "has weight .*; give a number from 0 to")
    for value in (-0.1, "heavy", float("nan"), float("inf"), [1], 2e6)
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_files_are_one_sentence(folders, tmp_path, monkeypatch, case):
    monkeypatch.chdir(folders)
    records, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        read_concepts(write_list(tmp_path, records), {}, False)
    assert "\n" not in str(error.value)


def test_flags_that_exclude_each_other(folders, tmp_path):
    file = write_list(tmp_path, [{"instance_data_dir": str(folders / "dog"), "instance_prompt": "a dog"}])
    base = ["--output_dir", str(tmp_path / "out"), "--concepts_list", str(file)]
    with pytest.raises(InputError, match="--instance_data_dir and --concepts_list are both given; choose one"):
        script.check_arguments(script.parse_arguments([*base, "--instance_data_dir", str(folders / "dog")]))
    with pytest.raises(InputError, match="--concepts_list .* is not a file"):
        script.find_subjects(script.parse_arguments([*base[:2], "--concepts_list", str(tmp_path / "missing.yaml")]))
    with pytest.raises(InputError, match="--with_output_preservation needs --class_prompt"):
        script.find_subjects(script.parse_arguments([*base, "--with_output_preservation"]))


@pytest.mark.integration
def test_repeats_and_weights_in_training(tiny_sd, folders, tmp_path, monkeypatch):
    """In each round, photos of a concept with 3 repeats are seen three times as often; weights scale their losses, and
    each photo has class images of its own concept."""
    from delora_diffusers.training.batches import SubjectBatches
    from delora_diffusers.training.encoding import PromptTable

    recorded: list[list[tuple[str, float]]] = []
    prompts: list[list[str]] = []
    call, lookup = SubjectBatches.__call__, PromptTable.lookup

    def recording(self: SubjectBatches, microbatch: int) -> Any:
        batch = call(self, microbatch)
        recorded.append([*zip(prompts[-1], batch["weights"].tolist())])
        return batch

    def recording_lookup(self: PromptTable, texts: list[str]) -> Any:
        prompts.append(texts)
        return lookup(self, texts)

    monkeypatch.setattr(PromptTable, "lookup", recording_lookup)
    monkeypatch.setattr(SubjectBatches, "__call__", recording)
    records = [
        {"instance_data_dir": str(folders / "dog"), "instance_prompt": "dog", "class_prompt": "dogs", "repeats": 3},
        {"instance_data_dir": str(folders / "cat"), "instance_prompt": "cat", "class_prompt": "cats", "weight": 0.25},
    ]
    flags = training_flags(tiny_sd, folders, tmp_path / "out", "--max_train_steps", 11, "--train_batch_size", 2)
    start = flags.index("--instance_data_dir")
    flags[start : start + 4] = ["--concepts_list", str(write_list(tmp_path, records)), "--square"]
    flags += ["--with_prior_preservation", "--num_class_images", "2", "--prior_loss_weight", "0.5"]
    script.main([*flags, "--validation_inference_steps", "1"])
    assert Counter(row for rows in recorded for row in rows[:2]) == {("dog", 2.0): 18, ("cat", 0.5): 4}
    for rows in recorded:
        assert rows[2:] == [(f"{prompt}s", 1.0) for prompt, _ in rows[:2]]
    images = tmp_path / "out" / "class_images"
    assert sorted(str(p.relative_to(images)) for p in images.glob("*/*.png")) == [
        f"{concept}/class-0-0000{number}.png" for concept in ("00", "01") for number in (0, 1)
    ]


@pytest.mark.integration
def test_half_the_weight_is_half_the_gradient(tiny_sd, folders, tmp_path, monkeypatch):
    """Of the first step, with a batch of one photo."""
    from delora_diffusers.training import gradients

    def first_gradients(name: str, **settings: Any) -> list[torch.Tensor]:
        recorded: list[list[torch.Tensor]] = []
        monkeypatch.setattr(
            gradients, "average_gradients", lambda _, parameters: recorded.append([p.grad.clone() for p in parameters])
        )
        record = {"instance_data_dir": str(folders / "cat"), "instance_prompt": "a cat", **settings}
        flags = training_flags(tiny_sd, folders, tmp_path / name, "--max_train_steps", 1)
        start = flags.index("--instance_data_dir")
        flags[start : start + 4] = ["--concepts_list", str(write_list(tmp_path, [record]))]
        script.main(flags)
        return recorded[0]

    whole, half, none = (first_gradients(str(weight), weight=weight) for weight in (1.0, 0.5, 0))
    assert any(gradient.abs().max() > 0 for gradient in whole)
    for one, other, zero in zip(whole, half, none):
        assert torch.equal(one * 0.5, other) and torch.equal(zero, torch.zeros_like(zero))


def test_concepts_with_the_same_class_prompt_share_their_class_images(folders, tmp_path):
    records = [
        {"instance_data_dir": str(folders / name), "instance_prompt": name, "class_prompt": prompt}
        for name, prompt in (("dog", "an animal"), ("cat", "an animal"), ("dog", "a dog"))
    ]
    flags = ["--output_dir", str(tmp_path / "out"), "--concepts_list"]
    (subject,) = script.find_subjects(script.parse_arguments([*flags, str(write_list(tmp_path, records))]))
    images = tmp_path / "out" / "class_images"
    assert [subject.class_folder(number) for number in range(3)] == [images / "00", images / "00", images / "02"]
    (subject,) = script.find_subjects(script.parse_arguments([*flags, str(write_list(tmp_path, records[:2]))]))
    assert [subject.class_folder(number) for number in range(2)] == [images] * 2
