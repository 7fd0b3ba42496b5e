"""Protocols oft and delora against OFT's evaluation script, written here as loops over single pairs of images.

The script keeps the images of prompt N in a folder ``SUBJECT-N``, takes the folders with ``"SUBJECT-" in name`` and of
each the first four images, and skips images that are wholly black.
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.benchmark import load_benchmark
from eval.__main__ import main
from eval.benchmark.results import SubjectImages
from eval.benchmark.scoring import pair_as_oft
from eval.metrics.embedding import embed
from eval.metrics.encoders import load_encoders
from eval.metrics.protocols import PROTOCOLS
from tests.eval.test_benchmark_scores import flags, write_benchmark, write_generated

SUBJECTS = {"dog": "dog", "backpack_dog": "backpack", "dog6": "dog"}
"""The script takes ``backpack_dog-0`` for ``dog``, but not ``dog6-0``."""
COUNTS = {"dog": 3, "backpack_dog": 2, "dog6": 4}
SCORES = ("dino", "clip_i", "clip_t")


@pytest.fixture
def images(tmp_path):
    """(benchmark, photos, generated images); an image of dog is black."""
    random, photos = np.random.default_rng(0), tmp_path / "photographs"
    for name, count in COUNTS.items():
        (photos / name).mkdir(parents=True)
        coarse = random.uniform(0, 255, (5, 4, 3))
        for number in range(count):
            pixels = (coarse + random.normal(0, 40, coarse.shape)).clip(0, 255).astype(np.uint8)
            photo = Image.fromarray(pixels).resize((97 + 8 * number, 131), Image.Resampling.BICUBIC)
            photo.save(photos / name / f"{number:02}.jpg")
    benchmark = write_benchmark(tmp_path, SUBJECTS, images=4)
    generated = write_generated(tmp_path / "generated", benchmark, photos)
    blacken(generated / "dog" / "1-2.png")
    return benchmark, photos, generated


def blacken(path: Path) -> None:
    Image.new("RGB", (96, 96)).save(path)


def is_black(path: Path) -> bool:
    return not np.asarray(Image.open(path)).any()


def write_as_oft(folder: Path, benchmark: Path, generated: Path) -> dict[str, str]:
    """The images in the script's folders; returns the prompt without identifier of each folder."""
    prompts = {}
    for subject in load_benchmark(benchmark).subjects:
        for line in (generated / subject.name / "metadata.jsonl").open():
            record = json.loads(line)
            number, image = record["file_name"].split("-")
            name = f"{subject.name}-{number}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(generated / subject.name / record["file_name"], folder / name / image)
            prompts[name] = record["prompt"].replace("sks ", "")
    return prompts


def loops(images, tiny_scorers: Path, folder: Path, as_oft: bool) -> dict[str, dict[str, list[float]]]:
    """By subject and score, the value of every pair or image.

    Args:
        as_oft: False for the definition without the script's selection by name and without skipping black images.
    """
    benchmark, photos, generated = images
    prompts = write_as_oft(folder, benchmark, generated)
    dino, clip = (f"local-dir:{tiny_scorers / name}" for name in ("dino", "clip"))
    encoders = load_encoders(PROTOCOLS["delora"], dino, clip, "cpu", "fp32")

    @functools.cache
    def features(path: Path) -> dict[str, np.ndarray]:
        return {key: rows[0].double().numpy() for key, rows in embed([path], encoders.by_key()).items()}

    @functools.cache
    def text_features(prompt: str) -> np.ndarray:
        return encoders.clip.encode_texts([prompt])[0].double().numpy()

    scores: dict[str, dict[str, list[float]]] = {}
    for subject in SUBJECTS:
        values: dict[str, list[float]] = {name: [] for name in SCORES}
        own = [f"{subject}-{number}" for number in range(2)]
        selected = [name for name in prompts if f"{subject}-" in name] if as_oft else own
        for photo in (photos / subject).glob("*.jpg"):
            for name in selected:
                for image in list((folder / name).glob("*.png"))[:4]:
                    if as_oft and (is_black(photo) or is_black(image)):
                        continue
                    values["dino"].append(float(features(photo)["dino"] @ features(image)["dino"]))
                    values["clip_i"].append(float(features(photo)["clip"] @ features(image)["clip"]))
        for name in own:
            for image in list((folder / name).glob("*.png"))[:4]:
                if not (as_oft and is_black(image)):
                    values["clip_t"].append(float(features(image)["clip"] @ text_features(prompts[name])))
        scores[subject] = values
    return scores


def shown_dino(report: str, protocol: str) -> dict[str, str]:
    """The DINO of each subject in the report's section of a protocol."""
    (section,) = [part for part in report.split("**small, protocol ") if part.startswith(f"{protocol}:")]
    table = section.split("by subject**")[1].split("**")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    return {row[1]: row[2] for row in cells if len(row) > 2 and row[1] in SUBJECTS}


def test_both_protocols_equal_loops_over_pairs(images, tiny_scorers, tmp_path):
    output = tmp_path / "run"
    main(flags(images, tiny_scorers, output, "--protocol", "oft", "delora"))
    protocols = json.loads((output / "summary.json").read_text())["protocols"]
    table = pd.read_csv(output / "subjects.csv").set_index(["protocol", "subject"])
    pairs = {"oft": 3 * (7 + 8) + 2 * 8 + 4 * 8, "delora": 3 * 8 + 2 * 8 + 4 * 8}
    for protocol in ("oft", "delora"):
        expected = loops(images, tiny_scorers, tmp_path / f"as-{protocol}", as_oft=protocol == "oft")
        assert protocols[protocol]["counts"]["pairs"] == pairs[protocol]
        for name in SCORES:
            for subject in SUBJECTS:
                mean = np.mean(expected[subject][name])
                assert table[name][protocol, subject] == pytest.approx(mean, abs=1e-6), (protocol, subject, name)
            overall = np.mean([value for values in expected.values() for value in values[name]])
            assert protocols[protocol]["scores"][name]["mean"] == pytest.approx(overall, abs=1e-6), (protocol, name)
    report = (output / "index.md").read_text()
    oft, delora = shown_dino(report, "oft"), shown_dino(report, "delora")
    assert set(oft) == set(delora) == set(SUBJECTS)
    assert {subject for subject in SUBJECTS if oft[subject] != delora[subject]} == {"dog"}


def test_a_black_image_is_skipped_for_both_subjects(images):
    """The black image of backpack_dog is compared with the photos of neither backpack_dog nor dog."""
    _, photos, generated = images
    blacken(generated / "backpack_dog" / "0-1.png")
    collected = [
        SubjectImages(name, kind, 0, files, [file.name for file in files], sorted((photos / name).iterdir()))
        for name, kind in SUBJECTS.items()
        if (files := sorted((generated / name).glob("*.png")))
    ]
    dog, backpack_dog, dog6 = pair_as_oft(collected)
    assert [len(images.images) for images in (dog, backpack_dog, dog6)] == [7, 7, 8]
    assert not any(is_black(path) for images in (dog, backpack_dog, dog6) for path in images.images)
    assert dog.others == backpack_dog.images and not backpack_dog.others and not dog6.others
