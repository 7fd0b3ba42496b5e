"""A benchmark's scores against the pairwise definition written out, and errors for incomplete folders of images."""

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
from delora_diffusers.errors import InputError
from eval.__main__ import main
from eval.benchmark.results import bootstrap_interval, mean_and_interval, paired_differences, summarize
from eval.benchmark.run import child_environment
from eval.benchmark.tables import latex, markdown, seed_rows
from eval.benchmark.tasks import flag_values
from tests.helpers import ROOT, write_photos

PHOTOS = ROOT.parent / "shared" / "photos" / "dreambooth"
PROMPTS = ["a {identifier} {class} in the snow", "a red {identifier} {class}"]


def write_benchmark(folder: Path, subjects: dict[str, str], images: int = 2) -> Path:
    content = {"name": "small", "identifier": "sks", "images_per_prompt": images, "prompts": {"thing": PROMPTS}}
    content["subjects"] = {name: {"class": kind, "kind": "thing"} for name, kind in subjects.items()}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def write_generated(folder: Path, benchmark: Path, photos: Path, identifier: str = "sks") -> Path:
    """Images of every prompt: the photos, rotated and with added noise."""
    definition = load_benchmark(benchmark)
    for number, subject in enumerate(definition.subjects):
        output, lines = folder / subject.name, []
        output.mkdir(parents=True)
        sources = sorted(path for path in (photos / subject.name).iterdir() if path.suffix in (".png", ".jpg"))
        for prompt_number, prompt in enumerate(definition.prompts_of(subject)):
            for k in range(definition.images_per_prompt):
                random = np.random.default_rng((number, prompt_number, k))
                with Image.open(sources[k % len(sources)]) as photo:
                    image = np.asarray(photo.convert("RGB").resize((96, 96)).rotate(20 * k), dtype=float)
                noisy = image + random.normal(0, 40, image.shape)
                name = f"{prompt_number}-{k}.png"
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(output / name)
                record = {"file_name": name, "prompt": prompt.replace("sks", identifier), "seed": k}
                lines.append(json.dumps(record))
        (output / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small(tmp_path):
    """(benchmark, photos, generated images) of two subjects with four and six photos."""
    photos = tmp_path / "photographs"
    write_photos(photos / "one", 4)
    write_photos(photos / "two", 6)
    benchmark = write_benchmark(tmp_path, {"one": "toy", "two": "mug"})
    return benchmark, photos, write_generated(tmp_path / "generated", benchmark, photos)


def flags(small, tiny_scorers, output: Path, *more: object) -> list[str]:
    benchmark, photos, generated = small
    words = ["benchmark", benchmark, "--photographs", photos, "--generated_dir", generated]
    words += ["--output_dir", output, "--lpips", "none", "--workers", 0]
    words += ["--dino", f"local-dir:{tiny_scorers / 'dino'}", "--clip", f"local-dir:{tiny_scorers / 'clip'}"]
    return [str(word) for word in [*words, *more]]


def pairwise(benchmark: Path, photos: Path, generated: Path, tiny_scorers: Path) -> dict[str, float]:
    """OFT's evaluation: one pair at a time, each image read and encoded again for each of its pairs."""
    import open_clip
    import timm
    from torchvision import transforms

    dino = timm.create_model(f"local-dir:{tiny_scorers / 'dino'}", pretrained=True, num_classes=0).eval()
    for module in dino.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12  # as transformers has it in facebook/dino-vits16, which OFT's script loads
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_scorers / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_scorers / 'clip'}")
    clip.eval()

    def normalized(image, mean, std):
        return transforms.Normalize(mean, std)(transforms.ToTensor()(image))[None]

    def dino_features(path):
        image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        return dino.forward_features(normalized(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[0, 0]

    def clip_features(path):
        image = Image.open(path).convert("RGB")
        short = min(image.size)
        size = [int(224 * side / short) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
        image = image.crop((left, top, left + 224, top + 224))
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return clip.encode_image(normalized(image, mean, std))[0]

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()

    scores = {"dino": [], "clip_i": [], "clip_t": [], "real_dino": [], "real_clip_i": []}
    with torch.inference_mode():
        for subject in load_benchmark(benchmark).subjects:
            references = sorted(p for p in (photos / subject.name).iterdir() if p.suffix in (".png", ".jpg"))
            records = [json.loads(line) for line in (generated / subject.name / "metadata.jsonl").open()]
            for record in records:
                path = generated / subject.name / record["file_name"]
                for reference in references:
                    scores["dino"].append(cosine(dino_features(reference), dino_features(path)))
                    scores["clip_i"].append(cosine(clip_features(reference), clip_features(path)))
                text = clip.encode_text(tokenizer([record["prompt"].replace("sks ", "")]))[0]
                scores["clip_t"].append(cosine(clip_features(path), text))
            for a in references:
                for b in references:
                    if a != b:
                        scores["real_dino"].append(cosine(dino_features(a), dino_features(b)))
                        scores["real_clip_i"].append(cosine(clip_features(a), clip_features(b)))
    return {name: float(np.mean(values)) for name, values in scores.items()}


def check_against_pairs(small, tiny_scorers, output):
    main(flags(small, tiny_scorers, output, "--protocol", "delora"))
    summary = json.loads((output / "summary.json").read_text())["protocols"]["delora"]
    expected = pairwise(*small, tiny_scorers)
    for name in ("dino", "clip_i", "clip_t"):
        assert summary["scores"][name]["mean"] == pytest.approx(expected[name], abs=1e-6), name
    for name in ("dino", "clip_i"):
        assert summary["real"][name]["mean"] == pytest.approx(expected[f"real_{name}"], abs=1e-6), name
    return summary


@pytest.mark.integration
def test_scores_equal_the_pairwise_definition(small, tiny_scorers, tmp_path, capsys):
    summary = check_against_pairs(small, tiny_scorers, tmp_path / "run")
    assert summary["counts"] == {"subjects": 2, "seeds": 1, "pictures": 8, "references": 10, "pairs": 4 * 4 + 4 * 6}
    assert "protocol delora: 2 subjects" in capsys.readouterr().out
    images = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert len(images) == 8 and list(images["image"]) == [0, 1] * 4
    # The same images again: all features are cached, and nothing changes.
    before = (tmp_path / "run" / "summary.json").read_bytes()
    main(flags(small, tiny_scorers, tmp_path / "run", "--protocol", "delora"))
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs real photos of subjects")
def test_scores_equal_the_pairwise_definition_on_real_photos(tiny_scorers, tmp_path):
    """Four, five and six photos per subject, in their original sizes."""
    names = {"fancy_boot": "boot", "dog": "dog", "teapot": "teapot", "pink_sunglasses": "glasses"}
    benchmark = write_benchmark(tmp_path, names)
    small = (benchmark, PHOTOS, write_generated(tmp_path / "generated", benchmark, PHOTOS))
    check_against_pairs(small, tiny_scorers, tmp_path / "run")


@pytest.mark.integration
def test_another_identifier_is_removed_too(small, tiny_scorers, tmp_path):
    benchmark, photos, _ = small
    generated = write_generated(tmp_path / "qwe", benchmark, photos, identifier="qwe")
    for name, images in (("a", small[2]), ("b", generated)):
        main(flags((benchmark, photos, images), tiny_scorers, tmp_path / name))
    a, b = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in "ab")
    pd.testing.assert_frame_equal(a.drop(columns="file"), b.drop(columns="file"))
    assert "sks" not in "".join(a["prompt"])


@pytest.mark.integration
def test_an_unreadable_image_excludes_its_subject(small, tiny_scorers, tmp_path, capsys):
    _, _, generated = small
    for name in ("0-1.png", "1-0.png"):
        content = (generated / "one" / name).read_bytes()
        (generated / "one" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match="1 failed and are excluded from all means"):
        main(flags(small, tiny_scorers, tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (problem,) = summary["failed"].values()
    assert "2 of 8 images cannot be scored" in problem and "0-1.png" in problem
    assert summary["protocols"]["delora"]["counts"]["subjects"] == 1
    assert "Excluded from all means" in (tmp_path / "run" / "index.html").read_text()
    assert "0-1.png" in capsys.readouterr().err
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert set(scores["subject"]) == {"two"}


@pytest.mark.integration
def test_errors(small, tiny_scorers, tmp_path):
    _, photos, generated = small
    output = tmp_path / "run"

    def check_error(message: str, *more: object) -> None:
        with pytest.raises(SystemExit, match=message):
            main(flags(small, tiny_scorers, output, *more))

    check_error("no_such_folder is not a folder", "--generated_dir", tmp_path / "no_such_folder")
    check_error("--subjects three is not in small, which has one, two", "--subjects", "three")
    check_error("leave out --train, --generate and --seeds", "--seeds", 2)
    with pytest.raises(InputError, match="--train =3 is not FLAG=VALUE"):
        flag_values(["=3"], "--train")
    check_error("--dino no_such_model could not be loaded", "--dino", "no_such_model")
    if not _has_alexnet():
        check_error("--lpips alex: torchvision.s weights cannot be downloaded", "--lpips", "alex")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(generated / "one", generated / "three")
    check_error("has a folder three, which is not a subject of small")
    shutil.rmtree(generated / "three")
    assert not output.exists()
    (generated / "one" / "metadata.jsonl").unlink()
    check_error("1 failed")
    problem = next(iter(json.loads((output / "summary.json").read_text())["failed"].values()))
    assert "metadata.jsonl is missing" in problem
    lines = (generated / "two" / "metadata.jsonl").read_text().splitlines()
    (generated / "two" / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    check_error("no subject could be scored; the first problem")
    for path in sorted((photos / "one").iterdir())[1:]:
        path.unlink()
    check_error("photographs/one has only one photo; real images are scored in pairs")
    shutil.rmtree(photos / "one")
    check_error("has no photos of one")


def _has_alexnet() -> bool:
    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet*"))


@pytest.mark.integration
def test_a_folder_with_other_settings_is_rejected(small, tiny_scorers, tmp_path):
    main(flags(small, tiny_scorers, tmp_path / "run"))
    benchmark, photos, generated = small
    other = shutil.copytree(generated, tmp_path / "other")
    with pytest.raises(SystemExit, match="was created with generated_dir"):
        main(flags((benchmark, photos, other), tiny_scorers, tmp_path / "run"))
    photo = sorted((photos / "one").iterdir())[0]
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    with pytest.raises(SystemExit, match="was created with other photos of one"):
        main(flags(small, tiny_scorers, tmp_path / "run"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("notes")
    with pytest.raises(SystemExit, match="notes contains files that are not of a benchmark run; give a new folder"):
        main(flags(small, tiny_scorers, tmp_path / "notes"))
    starts = json.loads((tmp_path / "run" / "settings.json").read_text())["starts"]
    assert len(starts) == 1 and starts[0]["versions"]["torch"]


@pytest.mark.integration
def test_two_runs_side_by_side(small, tiny_scorers, tmp_path):
    benchmark, photos, generated = small
    other = write_generated(tmp_path / "other", benchmark, photos)
    for path in other.glob("*/*.png"):
        with Image.open(path) as image:
            flipped = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        flipped.save(path)
    protocols = ("--protocol", "delora", "dreambooth")
    for name, images in (("a", generated), ("b", other)):
        main(flags((benchmark, photos, images), tiny_scorers, tmp_path / name, *protocols))
    page = tmp_path / "both.html"
    main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(page)])
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert text.count("<details") == 2 and text.count("Paired differences") == 2
    # Two runs of two subjects with four images each, as buttons; the best and worst of the first run as well.
    assert text.count('<button class="t r1') == 8 and text.count('<i role=img class="t r0') == 4
    assert "generated minus other" in page.with_suffix(".md").read_text()
    assert page.with_suffix(".tex").read_text().count(r"\begin{tabular}") == 12
    with pytest.raises(SystemExit, match="already exists"):
        main(["report", str(tmp_path / "a"), "--output", str(page)])
    with pytest.raises(SystemExit, match=r"has no settings\.json"):
        main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")])


@pytest.mark.integration
@given(st.floats(-1, 1), st.integers(2, 30))
def test_the_interval_over_equal_subjects_has_no_width(value, count):
    low, high = bootstrap_interval(np.ones(count) * 3, np.full(count, 3 * value))
    assert low == pytest.approx(value, abs=1e-12) and high == pytest.approx(value, abs=1e-12)


def test_the_interval_agrees_with_the_standard_error():
    """Of the mean over many subjects."""
    values = np.random.default_rng(1).normal(0.5, 0.2, 400)
    low, high = bootstrap_interval(np.ones(400), values)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_subjects_are_weighted_by_pairs_and_seeds_stay_together():
    rows = [("a", 0, 4, 5, 0.2), ("a", 1, 4, 5, 0.4), ("b", 0, 4, 6, 0.9), ("b", 1, 4, 6, 0.7)]
    table = pd.DataFrame(rows, columns=["subject", "seed", "pictures", "references", "dino"])
    table["clip_t"] = table["dino"]
    assert mean_and_interval(table, "dino")["mean"] == pytest.approx((20 * 0.6 + 24 * 1.6) / 88)
    assert mean_and_interval(table, "clip_t")["mean"] == pytest.approx(2.2 / 4)
    assert mean_and_interval(table, "drift") is None
    # Two subjects: a resample is either of them twice, or both; the extremes are the means of the subjects.
    score = mean_and_interval(table, "clip_t")
    assert (score["low"], score["high"]) == pytest.approx((0.3, 0.8))
    other = table.assign(dino=table["dino"] - 0.1)
    assert paired_differences(table, other)["dino"] == pytest.approx(
        {"mean": 0.1, "low": 0.1, "high": 0.1, "higher": 2, "subjects": 2}
    )


def test_scores_by_seed():
    rows = [("a", 0, 4, 5, 0.2), ("a", 1, 4, 5, 0.4), ("b", 0, 4, 5, 0.8), ("b", 1, 4, 5, 0.6)]
    subjects = pd.DataFrame(rows, columns=["subject", "seed", "pictures", "references", "dino"])
    images = pd.DataFrame({"template": ["x"], "dino": [0.0], "clip_i": [0.0], "clip_t": [0.0]})
    header, rows = seed_rows(summarize(subjects.assign(real_dino=0.9, real_clip_i=0.9), images))
    assert header == ["", "DINO"]
    assert rows == [["seed 0", "0.500"], ["seed 1", "0.500"], ["standard deviation", "0.000"]]


def test_a_command_sees_only_the_gpu_of_its_process(monkeypatch):
    for name, value in (("RANK", "1"), ("TORCHELASTIC_RUN_ID", "x"), ("ACCELERATE_MIXED_PRECISION", "bf16")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    environment = child_environment(jobs=1, num_processes=2, local_index=1, on_gpu=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert child_environment(1, 1, 0, True)["CUDA_VISIBLE_DEVICES"] == "4,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert child_environment(2, 2, 1, True)["CUDA_VISIBLE_DEVICES"] == "1"


def test_tables_escape_special_characters():
    assert markdown(["a", "b"], [["x|y", "1"]]).splitlines()[2] == r"| x\|y | 1 |"
    assert r"50\% of \{class\} \& more\_" in latex(["", "b"], [["50% of {class} & more_", "1"]], "caption")
