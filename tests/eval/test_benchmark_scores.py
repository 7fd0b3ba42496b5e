"""A benchmark's scores against the pairwise definition written out, and everything a folder of pictures can lack."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.benchmark import load_benchmark
from eval.__main__ import main
from eval.benchmark.results import bootstrap_interval, mean_and_interval, paired_differences, summarize
from eval.benchmark.run import child_environment
from eval.benchmark.tables import latex, markdown, seed_rows
from tests.helpers import ROOT, write_photos

PHOTOS = ROOT.parent / "shared" / "photos" / "dreambooth"
PROMPTS = ["a {identifier} {class} in the snow", "a red {identifier} {class}"]


def write_benchmark(folder: Path, subjects: dict[str, str], images: int = 2) -> Path:
    content = {"name": "small", "identifier": "sks", "images_per_prompt": images, "prompts": {"thing": PROMPTS}}
    content["subjects"] = {name: {"class": kind, "kind": "thing"} for name, kind in subjects.items()}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def write_generated(folder: Path, benchmark: Path, photographs: Path, identifier: str = "sks") -> Path:
    """Pictures of every prompt: the photographs, turned and blended with noise."""
    definition = load_benchmark(benchmark)
    for number, subject in enumerate(definition.subjects):
        place, lines = folder / subject.name, []
        place.mkdir(parents=True)
        sources = sorted(path for path in (photographs / subject.name).iterdir() if path.suffix in (".png", ".jpg"))
        for prompt_number, prompt in enumerate(definition.prompts_of(subject)):
            for k in range(definition.images_per_prompt):
                random = np.random.default_rng((number, prompt_number, k))
                with Image.open(sources[k % len(sources)]) as image:
                    picture = np.asarray(image.convert("RGB").resize((96, 96)).rotate(20 * k), dtype=float)
                noisy = picture + random.normal(0, 40, picture.shape)
                name = f"{prompt_number}-{k}.png"
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place / name)
                said = prompt.replace("sks", identifier)
                lines.append(json.dumps({"file_name": name, "prompt": said, "seed": k}))
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small(tmp_path):
    """(benchmark, photographs, generated) of two subjects with four and six photographs."""
    photographs = tmp_path / "photographs"
    write_photos(photographs / "one", 4)
    write_photos(photographs / "two", 6)
    benchmark = write_benchmark(tmp_path, {"one": "toy", "two": "mug"})
    return benchmark, photographs, write_generated(tmp_path / "generated", benchmark, photographs)


def typed(small, tiny_scorers, output: Path, *more: object) -> list[str]:
    benchmark, photographs, generated = small
    words = ["benchmark", benchmark, "--photographs", photographs, "--generated_dir", generated]
    words += ["--output_dir", output, "--lpips", "none", "--workers", 0]
    words += ["--dino", f"local-dir:{tiny_scorers / 'dino'}", "--clip", f"local-dir:{tiny_scorers / 'clip'}"]
    return [str(word) for word in [*words, *more]]


def pairwise(benchmark: Path, photographs: Path, generated: Path, tiny_scorers: Path) -> dict[str, float]:
    """OFT's evaluation: every pair on its own, each picture read and encoded for each of its pairs."""
    import open_clip
    import timm
    from torchvision import transforms

    dino = timm.create_model(f"local-dir:{tiny_scorers / 'dino'}", pretrained=True, num_classes=0).eval()
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_scorers / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_scorers / 'clip'}")
    clip.eval()

    def normalized(picture, mean, std):
        return transforms.Normalize(mean, std)(transforms.ToTensor()(picture))[None]

    def dino_of(path):
        picture = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        return dino.forward_features(normalized(picture, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[0, 0]

    def clip_of(path):
        picture = Image.open(path).convert("RGB")
        short = min(picture.size)
        size = [int(224 * side / short) for side in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
        picture = picture.crop((left, top, left + 224, top + 224))
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return clip.encode_image(normalized(picture, mean, std))[0]

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()

    found = {"dino": [], "clip_i": [], "clip_t": [], "real_dino": [], "real_clip_i": []}
    with torch.inference_mode():
        for subject in load_benchmark(benchmark).subjects:
            references = sorted(p for p in (photographs / subject.name).iterdir() if p.suffix in (".png", ".jpg"))
            records = [json.loads(line) for line in (generated / subject.name / "metadata.jsonl").open()]
            for record in records:
                path = generated / subject.name / record["file_name"]
                for reference in references:
                    found["dino"].append(cosine(dino_of(reference), dino_of(path)))
                    found["clip_i"].append(cosine(clip_of(reference), clip_of(path)))
                text = clip.encode_text(tokenizer([record["prompt"].replace("sks ", "")]))[0]
                found["clip_t"].append(cosine(clip_of(path), text))
            for a in references:
                for b in references:
                    if a != b:
                        found["real_dino"].append(cosine(dino_of(a), dino_of(b)))
                        found["real_clip_i"].append(cosine(clip_of(a), clip_of(b)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def check_against_pairs(small, tiny_scorers, output):
    main(typed(small, tiny_scorers, output, "--protocol", "delora"))
    summary = json.loads((output / "summary.json").read_text())["protocols"]["delora"]
    expected = pairwise(*small, tiny_scorers)
    for name in ("dino", "clip_i", "clip_t"):
        assert summary["scores"][name]["mean"] == pytest.approx(expected[name], abs=1e-6), name
    for name in ("dino", "clip_i"):
        assert summary["real"][name]["mean"] == pytest.approx(expected[f"real_{name}"], abs=1e-6), name
    return summary


def test_scores_are_the_pairs_one_at_a_time(small, tiny_scorers, tmp_path, capsys):
    summary = check_against_pairs(small, tiny_scorers, tmp_path / "run")
    assert summary["counts"] == {"subjects": 2, "seeds": 1, "pictures": 8, "references": 10, "pairs": 4 * 4 + 4 * 6}
    assert "protocol delora: 2 subjects" in capsys.readouterr().out
    pictures = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert len(pictures) == 8 and list(pictures["image"]) == [0, 1] * 4
    # The same pictures once more: all features are known, and nothing changes.
    before = (tmp_path / "run" / "summary.json").read_bytes()
    main(typed(small, tiny_scorers, tmp_path / "run", "--protocol", "delora"))
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs real photographs of subjects")
def test_scores_are_the_pairs_one_at_a_time_on_real_photographs(tiny_scorers, tmp_path):
    """Of four, five and six photographs, in their own sizes."""
    names = {"fancy_boot": "boot", "dog": "dog", "teapot": "teapot", "pink_sunglasses": "glasses"}
    benchmark = write_benchmark(tmp_path, names)
    small = (benchmark, PHOTOS, write_generated(tmp_path / "generated", benchmark, PHOTOS))
    check_against_pairs(small, tiny_scorers, tmp_path / "run")


def test_an_other_identifier_is_taken_out_too(small, tiny_scorers, tmp_path):
    benchmark, photographs, _ = small
    generated = write_generated(tmp_path / "qwe", benchmark, photographs, identifier="qwe")
    for name, place in (("a", small[2]), ("b", generated)):
        main(typed((benchmark, photographs, place), tiny_scorers, tmp_path / name))
    a, b = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in "ab")
    pd.testing.assert_frame_equal(a.drop(columns="file"), b.drop(columns="file"))
    assert "sks" not in "".join(a["prompt"])


def test_a_picture_that_cannot_be_read_is_named_and_its_subject_in_no_mean(small, tiny_scorers, tmp_path, capsys):
    _, _, generated = small
    for name in ("0-1.png", "1-0.png"):
        whole = (generated / "one" / name).read_bytes()
        (generated / "one" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="1 failed and are in no mean"):
        main(typed(small, tiny_scorers, tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (problem,) = summary["failed"].values()
    assert "2 of 8 pictures cannot be scored" in problem and "0-1.png" in problem
    assert summary["protocols"]["delora"]["counts"]["subjects"] == 1
    assert "Not in any mean" in (tmp_path / "run" / "index.html").read_text()
    assert "0-1.png" in capsys.readouterr().err
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert set(scores["subject"]) == {"two"}


def test_refuses(small, tiny_scorers, tmp_path):
    _, photographs, generated = small
    output = tmp_path / "run"

    def refused(message: str, *more: object) -> None:
        with pytest.raises(SystemExit, match=message):
            main(typed(small, tiny_scorers, output, *more))

    refused("no_such_place is not a folder", "--generated_dir", tmp_path / "no_such_place")
    refused("--subjects three: small has one, two", "--subjects", "three")
    refused("leave out --train, --generate and --seeds", "--seeds", 2)
    refused("--train =3 is not FLAG=VALUE", "--train", "=3")
    refused("--dino no_such_model could not be loaded", "--dino", "no_such_model")
    if not _has_alexnet():
        refused("--lpips alex: torchvision.s weights cannot be had", "--lpips", "alex")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(generated / "one", generated / "three")
    refused("holds three, no subject of small")
    shutil.rmtree(generated / "three")
    assert not output.exists()
    (generated / "one" / "metadata.jsonl").unlink()
    refused("1 failed")
    problem = next(iter(json.loads((output / "summary.json").read_text())["failed"].values()))
    assert "metadata.jsonl is missing" in problem
    lines = (generated / "two" / "metadata.jsonl").read_text().splitlines()
    (generated / "two" / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    refused("no subject could be scored; the first problem")
    for path in sorted((photographs / "one").iterdir())[1:]:
        path.unlink()
    refused("photographs/one holds one photograph; real images are scored in pairs")
    shutil.rmtree(photographs / "one")
    refused("holds no photographs of one")


def _has_alexnet() -> bool:
    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet*"))


def test_a_folder_keeps_to_its_settings(small, tiny_scorers, tmp_path):
    main(typed(small, tiny_scorers, tmp_path / "run"))
    benchmark, photographs, generated = small
    other = shutil.copytree(generated, tmp_path / "other")
    with pytest.raises(SystemExit, match="was made with generated_dir"):
        main(typed((benchmark, photographs, other), tiny_scorers, tmp_path / "run"))
    load = Image.open(next(iter(sorted((photographs / "one").iterdir()))))
    load.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(sorted((photographs / "one").iterdir())[0])
    with pytest.raises(SystemExit, match="was made with other photographs of one"):
        main(typed(small, tiny_scorers, tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds something else"):
        main(typed(small, tiny_scorers, tmp_path / "mine"))
    starts = json.loads((tmp_path / "run" / "settings.json").read_text())["starts"]
    assert len(starts) == 1 and starts[0]["versions"]["torch"]


def test_two_runs_side_by_side(small, tiny_scorers, tmp_path):
    benchmark, photographs, generated = small
    other = write_generated(tmp_path / "other", benchmark, photographs)
    for path in other.glob("*/*.png"):
        with Image.open(path) as image:
            turned = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        turned.save(path)
    for name, place in (("a", generated), ("b", other)):
        main(
            typed((benchmark, photographs, place), tiny_scorers, tmp_path / name, "--protocol", "delora", "dreambooth")
        )
    page = tmp_path / "both.html"
    main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(page)])
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert text.count("<details") == 2 and text.count("Paired differences") == 2
    # Two subjects, four pictures each, in each of two runs, as buttons; the first run's best and worst as well.
    assert text.count('<button class="t r1') == 8 and text.count('<i role=img class="t r0') == 4
    assert "generated minus other" in page.with_suffix(".md").read_text()
    assert page.with_suffix(".tex").read_text().count(r"\begin{tabular}") == 12
    with pytest.raises(SystemExit, match="exists already"):
        main(["report", str(tmp_path / "a"), "--output", str(page)])
    with pytest.raises(SystemExit, match=r"has no settings\.json"):
        main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")])


@given(st.floats(-1, 1), st.integers(2, 30))
def test_the_interval_of_equal_subjects_is_a_point(value, count):
    low, high = bootstrap_interval(np.ones(count) * 3, np.full(count, 3 * value))
    assert low == pytest.approx(value, abs=1e-12) and high == pytest.approx(value, abs=1e-12)


def test_the_interval_is_that_of_the_mean():
    """Against the standard error of the mean of many subjects."""
    values = np.random.default_rng(1).normal(0.5, 0.2, 400)
    low, high = bootstrap_interval(np.ones(400), values)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_subjects_count_by_their_pairs_and_seeds_stay_together():
    rows = [("a", 0, 4, 5, 0.2), ("a", 1, 4, 5, 0.4), ("b", 0, 4, 6, 0.9), ("b", 1, 4, 6, 0.7)]
    table = pd.DataFrame(rows, columns=["subject", "seed", "pictures", "references", "dino"])
    table["clip_t"] = table["dino"]
    assert mean_and_interval(table, "dino")["mean"] == pytest.approx((20 * 0.6 + 24 * 1.6) / 88)
    assert mean_and_interval(table, "clip_t")["mean"] == pytest.approx(2.2 / 4)
    assert mean_and_interval(table, "drift") is None
    # Two subjects: a resample is one of them twice, or both; the extremes are the subjects' own means.
    found = mean_and_interval(table, "clip_t")
    assert (found["low"], found["high"]) == pytest.approx((0.3, 0.8))
    other = table.assign(dino=table["dino"] - 0.1)
    assert paired_differences(table, other)["dino"] == pytest.approx(
        {"mean": 0.1, "low": 0.1, "high": 0.1, "higher": 2, "subjects": 2}
    )


def test_seeds_are_shown_apart():
    rows = [("a", 0, 4, 5, 0.2), ("a", 1, 4, 5, 0.4), ("b", 0, 4, 5, 0.8), ("b", 1, 4, 5, 0.6)]
    subjects = pd.DataFrame(rows, columns=["subject", "seed", "pictures", "references", "dino"])
    pictures = pd.DataFrame({"template": ["x"], "dino": [0.0], "clip_i": [0.0], "clip_t": [0.0]})
    header, shown = seed_rows(summarize(subjects.assign(real_dino=0.9, real_clip_i=0.9), pictures))
    assert header == ["", "DINO"]
    assert shown == [["seed 0", "0.500"], ["seed 1", "0.500"], ["standard deviation", "0.000"]]


def test_a_subject_runs_alone_on_the_gpu_of_its_process(monkeypatch):
    for name, value in (("RANK", "1"), ("TORCHELASTIC_RUN_ID", "x"), ("ACCELERATE_MIXED_PRECISION", "bf16")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    environment = child_environment(jobs=1, num_processes=2, local_index=1, on_gpu=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert child_environment(1, 1, 0, True)["CUDA_VISIBLE_DEVICES"] == "4,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert child_environment(2, 2, 1, True)["CUDA_VISIBLE_DEVICES"] == "1"


def test_tables_escape_what_their_format_reads():
    assert markdown(["a", "b"], [["x|y", "1"]]).splitlines()[2] == r"| x\|y | 1 |"
    assert r"50\% of \{class\} \& more\_" in latex(["", "b"], [["50% of {class} & more_", "1"]], "caption")
