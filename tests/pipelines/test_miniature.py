"""The shipped models: whole, small, loaded as their big relatives are, and fit for any text."""

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

MODELS = [folder for folder in sorted(FAMILY.iterdir()) if folder.name.startswith("mini-")]


@pytest.fixture(scope="module")
def pipeline():
    from delora_diffusers.pipelines.base_model import load_pipeline

    return load_pipeline(None)


@pytest.fixture(scope="module")
def held_out():
    """(pictures, maps, captions) of 56 unseen subjects."""
    scenes = [photograph(unseen_subject(20_000 + i), 99, i) for i in range(56)]
    pictures, maps = render(scenes)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return images, pictures, maps, [full_caption(scene) for scene in scenes]


def draw(pipeline, *prompts: str, steps: int = 8, guidance: float = 4.0) -> list[Image.Image]:
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
import socket
def refuse(*_): raise OSError("no network")
socket.socket.connect = refuse
import diffusers, open_clip, timm, torch, time
from diffusers import StableDiffusionPipeline
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
from delora_diffusers.pipelines.base_model import load_pipeline
from data.miniature import MINI_CLIP, MINI_DINO, MINI_SD, MINI_SEGMENTER
import diffusers.models, transformers.models.segformer.modeling_segformer
import transformers.models.clip.modeling_clip, transformers.models.segformer.image_processing_segformer
began = time.monotonic()
load_pipeline(None)
open_clip.create_model_and_transforms(f"local-dir:{MINI_CLIP}")
open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")
timm.create_model(f"local-dir:{MINI_DINO}", pretrained=True)
AutoModelForSemanticSegmentation.from_pretrained(MINI_SEGMENTER)
AutoImageProcessor.from_pretrained(MINI_SEGMENTER)
print("seconds", time.monotonic() - began)
StableDiffusionPipeline.from_pretrained(MINI_SD, safety_checker=None)
"""


def test_the_family_loads_without_a_network_in_three_seconds():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", LOADING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("seconds ")[1]) < 3


def test_the_text_encoder_is_the_text_tower_of_mini_clip(pipeline):
    import open_clip

    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{MINI_CLIP}")
    texts = ["a photo of a red mug on a beach", "sks", "", "a blue and green checked robot at night, from above"]
    tokens = open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")(texts)
    mine = pipeline.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(mine.input_ids, tokens)
    with torch.no_grad():
        hidden = pipeline.text_encoder(mine.input_ids)[0]
        pooled = hidden[torch.arange(len(texts)), mine.input_ids.argmax(dim=1)]
        torch.testing.assert_close(
            pooled @ clip.text_projection.float(), clip.float().eval().encode_text(tokens), atol=1e-4, rtol=1e-4
        )


def test_the_tokenizer_keeps_rare_words_whole(pipeline):
    for word in ("sks", "qwe", "mug", "turquoise", "cobblestone"):
        assert len(pipeline.tokenizer(word).input_ids) == 3, word


def test_any_text_makes_an_image(pipeline):
    strange = ["", "🐶🎈", "xylophonic quux of Ünïcödé 漢字", "a red ball\n\tin the snow!!! <|endoftext|>"]
    pictures = draw(pipeline, *strange, "a blue duck in a meadow and " * 50, steps=2)
    for picture in pictures:
        assert picture.size == (128, 128) and np.asarray(picture).std() > 5
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_a_long_prompt_is_cut_with_a_warning(tmp_path):
    flags = ["generate", "--num_images", "1", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-m", "delora_diffusers", *flags, "--prompt", "a blue duck " * 100],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "truncated" in done.stderr and "77" in done.stderr


def test_reconstructions_keep_the_pattern(pipeline, held_out):
    _, pictures, maps, _ = held_out
    x = pictures[:24].float() / 255
    with torch.no_grad():
        y = pipeline.vae.decode(pipeline.vae.encode(x * 2 - 1).latent_dist.mean).sample
    error = (y.clamp(-1, 1) / 2 + 0.5 - x).square()
    inside = (maps[:24] >= len(STUFF))[:, None].expand_as(error)
    assert -10 * torch.log10(error.mean()) > 32
    assert -10 * torch.log10(error[inside].mean()) > 27


def test_the_scorers_know_the_world(held_out):
    from eval.metrics.encoders import ClipEncoder, DinoEncoder

    images, _, _, captions = held_out
    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, "cpu")
    features = clip.encode(torch.stack([clip.transform(image) for image in images]))
    nearest = (features @ clip.encode_texts(captions).T).argmax(dim=1)
    assert np.mean([captions[j] == captions[i] for i, j in enumerate(nearest)]) >= 0.9

    # Three toys of each class, two photographs each: the other photograph is the nearest of the class.
    subjects = [unseen_subject(30_000 + i) for i in range(3 * len(CLASSES))]
    views = [photograph(subject, 98, 2 * i + k) for k in range(2) for i, subject in enumerate(subjects)]
    dino = DinoEncoder(f"local-dir:{MINI_DINO}", "straight", "cpu")
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in render(views)[0]]
    a, b = dino.encode(torch.stack([dino.transform(picture) for picture in pictures])).chunk(2)
    own_class = torch.tensor([[p.kind == q.kind for q in subjects] for p in subjects])
    nearest = (a @ b.T).masked_fill(~own_class, -1).argmax(dim=1)
    assert (nearest == torch.arange(len(subjects))).float().mean() >= 0.9


def test_the_segmenter_names_what_is_there(held_out):
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    images, _, maps, _ = held_out
    model = AutoModelForSemanticSegmentation.from_pretrained(MINI_SEGMENTER).float().eval()
    assert [model.config.id2label[i] for i in range(len(SEMANTIC_CLASSES))] == list(SEMANTIC_CLASSES)
    processor = AutoImageProcessor.from_pretrained(MINI_SEGMENTER)
    with torch.no_grad():
        output = model(**processor(images=images, return_tensors="pt"))
    found = torch.stack(processor.post_process_semantic_segmentation(output, [(128, 128)] * len(images)))
    assert (found == maps).float().mean() > 0.85


def test_prompts_are_followed(pipeline):
    """mini-clip finds each drawn picture's own prompt among all combinations of toy, colours and place."""
    from eval.metrics.encoders import ClipEncoder

    prompts = [
        f"a photo of a {colours} {kind} {place}"
        for kind in ("mug", "rocket")
        for colours in ("blue and orange checked", "plain pink")
        for place in ("in the snow", "on a wooden floor")
    ]
    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, "cpu")
    pictures = draw(pipeline, *prompts, steps=10)
    features = clip.encode(torch.stack([clip.transform(picture) for picture in pictures]))
    nearest = (features @ clip.encode_texts(prompts).T).argmax(dim=1).tolist()
    assert np.mean([i == j for i, j in enumerate(nearest)]) >= 0.75


def test_training_runs_with_no_argument_but_where_and_how_long(tmp_path, monkeypatch):
    import train_dreambooth_delora

    monkeypatch.chdir(tmp_path)
    train_dreambooth_delora.main(["--max_train_steps", "2", "--report_to", "none"])
    out = tmp_path / "runs" / "delora"
    assert (out / "pytorch_delora_weights.safetensors").is_file()
    assert len(list(Path(f"{out}-photographs").glob("*.png"))) == 5
    record = json.loads((out / "config.json").read_text())["arguments"]
    assert record["instance_prompt"] == "a photo of sks mug" and record["resolution"] == 128
