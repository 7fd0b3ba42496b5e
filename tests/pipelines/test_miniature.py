"""The included miniature models: complete, small, loaded like the full-size models, and able to handle any text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.miniature import FAMILY, MINI_CLIP, MINI_DINO, MINI_SEGMENTER
from data.toybox.captions import full_caption
from data.toybox.places import STUFF
from data.toybox.render import render
from data.toybox.scenes import SEMANTIC_CLASSES, photograph, unseen_subject
from data.toybox.shapes import CLASSES

pytestmark = pytest.mark.integration  # seconds a test

MODELS = [folder for folder in sorted(FAMILY.iterdir()) if folder.name.startswith("mini-")]


@pytest.fixture(scope="module")
def pipeline():
    from delora_diffusers.families.loading import load_pipeline

    return load_pipeline(None)


@pytest.fixture(scope="module")
def held_out():
    """(images, the same as tensors, maps, captions) of 56 unseen subjects."""
    scenes = [photograph(unseen_subject(20_000 + i), 99, i) for i in range(56)]
    tensors, maps = render(scenes)
    images = [Image.fromarray(tensor.permute(1, 2, 0).numpy()) for tensor in tensors]
    return images, tensors, maps, [full_caption(scene) for scene in scenes]


def generate(pipeline, *prompts: str, steps: int = 8, guidance: float = 4.0) -> list[Image.Image]:
    from delora_diffusers.pipelines.sampling import sample_images

    seeds = list(range(len(prompts)))
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    return sample_images(pipeline, seeds, None, prompt=list(prompts), **settings)


def test_the_family_is_small_and_in_half_precision():
    from safetensors import safe_open

    sizes = {file: file.stat().st_size for folder in MODELS for file in folder.rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= 48e6 and max(sizes.values()) <= 15e6
    assert not {file.suffix for file in sizes} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    for file in (file for file in sizes if file.suffix == ".safetensors"):
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, (file, kinds)


LOADING = """
from benchmarks.startup import load_family, refuse_connections
refuse_connections()
load_family()
from diffusers import StableDiffusionPipeline
from data.miniature import MINI_SD
StableDiffusionPipeline.from_pretrained(MINI_SD, safety_checker=None)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError as error:
    assert "no network" in str(error), error
"""


def test_the_family_loads_in_a_process_whose_connections_are_refused():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", LOADING], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_text_encoder_is_the_text_tower_of_mini_clip(pipeline):
    import open_clip

    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{MINI_CLIP}")
    texts = ["a photo of a red mug on a beach", "sks", "", "a blue and green checked robot at night, from above"]
    tokens = open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")(texts)
    ids = pipeline.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, tokens)
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids)[0]
        pooled = hidden[torch.arange(len(texts)), ids.argmax(dim=1)]
        torch.testing.assert_close(
            pooled @ clip.text_projection.float(), clip.float().eval().encode_text(tokens), atol=1e-4, rtol=1e-4
        )


def test_the_tokenizer_does_not_split_rare_words(pipeline):
    for word in ("sks", "qwe", "mug", "turquoise", "cobblestone"):
        assert len(pipeline.tokenizer(word).input_ids) == 3, word


def test_any_text_gives_an_image(pipeline):
    unusual = ["", "🐶🎈", "xylophonic quux of Ünïcödé 漢字", "a red ball\n\tin the snow!!! <|endoftext|>"]
    images = generate(pipeline, *unusual, "a blue duck in a meadow and " * 50, steps=2)
    for image in images:
        assert image.size == (128, 128) and np.asarray(image).std() > 5
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_long_prompt_is_truncated_with_a_warning(tmp_path):
    flags = ["generate", "--num_images", "1", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "o")]
    result = subprocess.run(
        [sys.executable, "-m", "delora_diffusers", *flags, "--prompt", "a blue duck " * 100],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "truncated" in result.stderr and "77" in result.stderr


def test_reconstructions_keep_the_pattern(pipeline, held_out):
    _, tensors, maps, _ = held_out
    x = tensors[:24].float() / 255
    with torch.no_grad():
        y = pipeline.vae.decode(pipeline.vae.encode(x * 2 - 1).latent_dist.mean).sample
    error = (y.clamp(-1, 1) / 2 + 0.5 - x).square()
    inside = (maps[:24] >= len(STUFF))[:, None].expand_as(error)
    assert -10 * torch.log10(error.mean()) > 32
    assert -10 * torch.log10(error[inside].mean()) > 27


def test_the_scorers_recognize_captions_and_subjects(held_out):
    from eval.metrics.encoders import ClipEncoder, DinoEncoder

    images, _, _, captions = held_out
    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, "cpu")
    features = clip.encode(torch.stack([clip.transform(image) for image in images]))
    nearest = (features @ clip.encode_texts(captions).T).argmax(dim=1)
    assert np.mean([captions[j] == captions[i] for i, j in enumerate(nearest)]) >= 0.9

    # Three toys per class with two photos each: the nearest photo of the class must be of the same toy.
    subjects = [unseen_subject(30_000 + i) for i in range(3 * len(CLASSES))]
    views = [photograph(subject, 98, 2 * i + k) for k in range(2) for i, subject in enumerate(subjects)]
    dino = DinoEncoder(f"local-dir:{MINI_DINO}", "straight", "cpu")
    photos = [Image.fromarray(tensor.permute(1, 2, 0).numpy()) for tensor in render(views)[0]]
    a, b = dino.encode(torch.stack([dino.transform(photo) for photo in photos])).chunk(2)
    same_class = torch.tensor([[p.kind == q.kind for q in subjects] for p in subjects])
    nearest = (a @ b.T).masked_fill(~same_class, -1).argmax(dim=1)
    assert (nearest == torch.arange(len(subjects))).float().mean() >= 0.9


def test_the_segmenter_predicts_the_maps(held_out):
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    images, _, maps, _ = held_out
    model = AutoModelForSemanticSegmentation.from_pretrained(MINI_SEGMENTER).float().eval()
    assert [model.config.id2label[i] for i in range(len(SEMANTIC_CLASSES))] == list(SEMANTIC_CLASSES)
    processor = AutoImageProcessor.from_pretrained(MINI_SEGMENTER)
    with torch.no_grad():
        output = model(**processor(images=images, return_tensors="pt"))
    predicted = torch.stack(processor.post_process_semantic_segmentation(output, [(128, 128)] * len(images)))
    assert (predicted == maps).float().mean() > 0.85


def test_prompts_are_followed(pipeline):
    """mini-clip matches each generated image to its prompt among all combinations of toy, colours and location."""
    from eval.metrics.encoders import ClipEncoder

    prompts = [
        f"a photo of a {colours} {kind} {location}"
        for kind in ("mug", "rocket")
        for colours in ("blue and orange checked", "plain pink")
        for location in ("in the snow", "on a wooden floor")
    ]
    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, "cpu")
    images = generate(pipeline, *prompts, steps=10)
    features = clip.encode(torch.stack([clip.transform(image) for image in images]))
    nearest = (features @ clip.encode_texts(prompts).T).argmax(dim=1).tolist()
    assert np.mean([i == j for i, j in enumerate(nearest)]) >= 0.75


def test_training_runs_without_a_model_or_photos(tmp_path, monkeypatch):

    import train_dreambooth_delora

    monkeypatch.chdir(tmp_path)
    train_dreambooth_delora.main(["--max_train_steps", "2", "--report_to", "none"])
    out = tmp_path / "runs" / "delora"
    assert (out / "pytorch_delora_weights.safetensors").is_file()
    assert len(list(Path(f"{out}-photographs").glob("*.png"))) == 5
    record = json.loads((out / "config.json").read_text())["arguments"]
    assert record["instance_prompt"] == "a photo of sks mug" and record["resolution"] == 128
