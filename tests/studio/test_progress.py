"""Curves, samples and their scores from the files of a run."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from delora_diffusers import InputError
from delora_diffusers.image_grid import images_of_grid, labelled_grid
from delora_diffusers.training.validation import grid_file
from studio import charts, progress
from studio.progress import curves, samples, score_samples
from studio.run_records import studio_folder
from tests.helpers import run_in_child, train, training_flags, write_photos

PROMPTS = ["a <b>toy</b> " + "on a long shelf " * 12, "a sks toy"]


def image(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def run(tmp_path):
    """A run whose validations after steps 2 and 4 generated two images per prompt."""
    run = tmp_path / "runs" / "dog"
    (run / "validation").mkdir(parents=True)
    arguments = {"validation_prompt": PROMPTS, "num_validation_images": 2, "seed": 7, "resolution": 64}
    arguments |= {"validation_width": 48, "validation_height": None, "pretrained_model_name_or_path": "owner/model"}
    (run / "config.json").write_text(json.dumps({"arguments": arguments}))
    for step in (2, 4):
        write_grid(run, step)
    return run


def write_grid(run, step, prompts=PROMPTS):
    rows = [
        (prompt, [image(10 * step + 2 * row + n, (48, 64)) for n in range(2)]) for row, prompt in enumerate(prompts)
    ]
    labelled_grid(rows, title=f"step {step}").save(grid_file(run, step))


def test_the_images_of_each_validation_with_prompt_and_seed(run):
    for _ in range(2):  # then from the cache
        first, last = samples(run)
        assert (first.step, last.step) == (2, 4) and last.grid == grid_file(run, 4)
        assert [(prompt, seed) for _, prompt, seed in last.images] == [(p, s) for p in PROMPTS for s in (7, 8)]
        for number, (file, _, _) in enumerate(last.images):
            assert Image.open(file).tobytes() == image(40 + number, (48, 64)).tobytes()
            assert file.is_relative_to(studio_folder(run))
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "validation"]


def test_grids_that_are_not_of_this_run_have_no_images(run, tmp_path):
    write_grid(run, 4, ["another prompt"])
    (run / "validation" / "step-000006.png").write_bytes(b"not an image")
    (run / "validation" / "step-000008.png").symlink_to(grid_file(run, 2))
    (run / "validation" / "step-x.png").write_bytes(b"")
    assert [(sample.step, len(sample.images)) for sample in samples(run)] == [(2, 4), (4, 0), (6, 0)]
    wrong = {"validation_prompt": 3, "seed": "x", "resolution": None, "validation_width": "a", "validation_height": 1}
    wrong |= {"num_validation_images": 1}
    for damaged in ("", "[]", "{", '{"arguments": {"seed": 3}}', json.dumps({"arguments": wrong})):
        (run / "config.json").write_text(damaged)
        assert [len(sample.images) for sample in samples(run)] == [4, 0, 0]
    assert samples(tmp_path / "nowhere") == [] and curves(tmp_path / "nowhere") == []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(max_size=90), min_size=1, max_size=3),
    st.integers(1, 3),
    st.tuples(st.integers(8, 300), st.integers(8, 300)),
)
def test_images_come_out_of_a_grid_as_they_went_in(labels, columns, size):
    rows = [(label, [image(3 * row + n, size) for n in range(columns)]) for row, label in enumerate(labels)]
    results = images_of_grid(labelled_grid(rows, title="step 3"), labels, columns, size, title="step 3")
    assert results is not None and len(results) == len(labels)
    for (_, images), result in zip(rows, results):
        for before, after in zip(images, result):
            before.thumbnail((256, 256), Image.Resampling.LANCZOS)
            assert after.size == before.size and after.tobytes() == before.tobytes()


def test_curves_grow_and_a_continued_run_replaces_its_points(tmp_path):
    logs = tmp_path / "run" / "logs" / "dreambooth-delora"

    def log(tag: str, *points: tuple[int, float]) -> None:
        with SummaryWriter(str(logs)) as writer:
            for step, value in points:
                writer.add_scalar(tag, value, step)
            writer.add_scalar("other", 1.0, 1)

    log("loss", (10, 1.0), (20, 0.5), (30, 0.25))
    (curve,) = curves(tmp_path / "run")
    assert (curve.tag, curve.title, curve.steps, curve.values) == ("loss", "loss", [10, 20, 30], [1.0, 0.5, 0.25])
    log("loss", (20, 2.0), (40, 0.125))  # from the checkpoint at step 10
    log("validation/loss", (20, 3.0))
    loss, held_out = curves(tmp_path / "run")
    assert loss.steps == [10, 20, 30, 40] and loss.values == [1.0, 2.0, 0.25, 0.125]
    assert held_out.title == "loss on held-out photos" and held_out.values == [3.0]


def test_a_chart_begins_at_step_0_and_does_not_enlarge_noise():
    def heights(html: str) -> list[float]:
        points = html.partition('points="')[2].partition('"')[0].split()
        return [float(point.split(",")[1]) for point in points]

    high = charts.HEIGHT - charts.TOP - charts.BOTTOM
    noise = charts.line_chart("lambda", {"lambda": ([10, 20], [2.9644, 2.9662])}, x_end=40)
    assert abs(heights(noise)[0] - heights(noise)[1]) < 0.02 * high and ">0<" in noise and ">40<" in noise
    close = charts.line_chart("DINO", {"DINO": ([10, 20], [0.5, 0.55])}, least=0.1, reference=("photos <b>", 0.52))
    assert abs(heights(close)[0] - heights(close)[1]) == pytest.approx(0.5 * high, abs=0.2)
    assert "dashed: photos &lt;b&gt; 0.52" in close and close.count('class="axis dashed"') == 1
    assert "NaN" not in charts.line_chart("loss", {"loss": ([0], [0.0])})
    apart = heights(charts.line_chart("loss", {"loss": ([0, 10], [1.0, 3.0])}))
    assert apart[0] - apart[1] > 0.9 * high


def test_without_names_of_models_nothing_is_scored_and_it_is_said(run, tmp_path):
    sentence = score_samples(run, write_photos(tmp_path / "photos", 2), None, None)
    assert sentence is not None and "name a DINO model" in sentence and "name a CLIP model" in sentence
    assert [(sample.dino, sample.clip_t) for sample in samples(run)] == [(None, None)] * 2


@pytest.mark.integration
def test_scores_are_those_of_eval_and_are_computed_once(run, tmp_path, tiny_scorers, monkeypatch):
    from eval.metrics.encoders import load_encoders
    from eval.metrics.protocols import PROTOCOLS
    from eval.metrics.subjects import score_subject

    photos = write_photos(tmp_path / "photos", 3)
    dino, clip = f"local-dir:{tiny_scorers / 'dino'}", f"local-dir:{tiny_scorers / 'clip'}"
    assert "name a CLIP model" in (score_samples(run, photos, dino, None) or "")
    assert all(sample.dino is not None and sample.clip_t is None for sample in samples(run))
    assert score_samples(run, photos, dino, clip) is None
    protocol = PROTOCOLS["toybox"]
    encoders = load_encoders(protocol, dino, clip, "cpu", "fp32")
    for sample in samples(run):
        generated = [(file, prompt) for file, prompt, _ in sample.images]
        references = sorted(photos.glob("*.png"))
        expected = score_subject(generated, references, protocol, encoders, ["sks"], 8)["scores"]
        assert sample.dino == pytest.approx(expected["dino"]) and sample.clip_t == pytest.approx(expected["clip_t"])
    of_dino, of_clip = curves(run)
    assert (of_dino.tag, of_dino.steps) == ("dino", [2, 4]) and (of_clip.tag, of_clip.steps) == ("clip_t", [2, 4])
    real = score_subject([(file, "") for file in references], references, protocol, encoders, [], 8)["scores"]["dino"]
    # Of all pairs, also of each photo with itself, whose cosine is 1.
    assert of_dino.reference == (progress.OF_PHOTOS, pytest.approx((3 * real - 1) / 2))
    assert of_clip.reference == (progress.FIRST_SAMPLES, of_clip.values[0])

    calls = []
    scores_of = progress._scores_of
    monkeypatch.setattr(progress, "_scores_of", lambda *a: calls.append(1) or scores_of(*a))
    score_samples(run, photos, dino, clip)
    assert not calls
    write_grid(run, 6)
    score_samples(run, photos, dino, clip)
    assert len(calls) == 1 and samples(run)[-1].dino is not None
    with pytest.raises(InputError, match="has no config"):
        score_samples(run, photos, f"local-dir:{tmp_path}", clip)


@pytest.mark.integration
def test_the_files_of_a_real_run(tiny_sd, tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    more = ["--validation_prompt", *PROMPTS, "--num_validation_images", 2, "--validation_inference_steps", 1]
    more += ["--validation_steps", 2, "--validation_split", 0.4, "--max_train_steps", 4, "--logging_steps", 1]
    more += ["--report_to", "tensorboard", "--validation_height", 64]
    run_in_child(train, training_flags(tiny_sd, photos, tmp_path / "runs" / "dog", *more))
    by_tag = {curve.tag: curve for curve in curves(tmp_path / "runs" / "dog")}
    assert by_tag["loss"].steps == by_tag["distance/mean"].steps == by_tag["lambda/mean"].steps == [1, 2, 3, 4]
    assert by_tag["validation/loss"].steps == [2, 4]
    first, last = samples(tmp_path / "runs" / "dog")
    assert (first.step, last.step, len(first.images)) == (2, 4, 4)
    card = Image.open(tmp_path / "runs" / "dog" / "samples" / "01.png").convert("RGB")
    assert Image.open(last.images[2][0]).size == (32, 64) == card.size
    assert Image.open(last.images[2][0]).tobytes() == card.tobytes()
