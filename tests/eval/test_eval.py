"""Scores against loops written out, encoders against the libraries that they wrap, and the commands."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data.miniature import MINI_CLIP
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from eval.__main__ import main
from eval.metrics.generated import check_base_images, read_generated, read_generated_from_maps
from eval.metrics.protocols import PROTOCOLS
from eval.metrics.scores import pair_scores, real_score, text_scores, without_identifier
from eval.page import read_curves


def unit(rows: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_mini_clips_prompts_are_tokenized_as_by_transformers():
    """open_clip calls transformers here, and each of its releases only fits some of theirs."""
    import open_clip
    from transformers import CLIPTokenizer

    prompts = ["a photo of a red mug", "a photo of a sks hat on the beach"]
    tokens = open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")(prompts)
    reference = CLIPTokenizer.from_pretrained(MINI_CLIP)
    expected = reference(prompts, padding="max_length", max_length=tokens.shape[1], return_tensors="pt")["input_ids"]
    assert torch.equal(tokens, expected)


def test_scores_equal_their_loops():
    generated, reference = unit(6, 0), unit(4, 1)
    pairs = [float(np.dot(g.double(), r.double())) for g in generated for r in reference]
    assert pair_scores(generated, reference).mean().item() == pytest.approx(np.mean(pairs), abs=1e-12)
    real = [float(np.dot(a.double(), b.double())) for a, b in itertools.combinations(reference, 2)]
    assert real_score(reference) == pytest.approx(np.mean(real), abs=1e-12)
    assert real_score(reference[:1]) is None
    texts = unit(6, 2)
    expected = [float(np.dot(g.double(), t.double())) for g, t in zip(generated, texts)]
    np.testing.assert_allclose(text_scores(generated, texts), expected, atol=1e-12)


def test_the_identifier_is_removed_as_a_word():
    assert without_identifier("a sks dog in the jungle") == "a dog in the jungle"
    assert without_identifier("qwe dog, tasks") == "dog, tasks"
    assert without_identifier("a zwx dog", ["zwx"]) == "a dog"


def test_the_protocols_use_the_published_models():
    delora, dreambooth = PROTOCOLS["delora"], PROTOCOLS["dreambooth"]
    assert (delora.clip, dreambooth.clip) == ("ViT-L-14", "ViT-B-32")
    assert delora.dino == dreambooth.dino == "vit_small_patch16_224.dino"
    assert delora.clip_pretrained == dreambooth.clip_pretrained == "openai"


@pytest.mark.integration
def test_openai_clip_gets_the_activation_it_was_trained_with(monkeypatch):
    """Without downloading the weights: the model that would load them is built."""
    import open_clip

    from eval.metrics.encoders import ClipEncoder

    original = open_clip.create_model_and_transforms

    def without_weights(name, pretrained, **settings):
        assert (name, pretrained) == ("ViT-B-32", "openai")
        return original(name, None, **settings)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", without_weights)
    encoder = ClipEncoder("ViT-B-32", "openai", "cpu")
    activations = {type(m).__name__ for m in encoder.model.modules() if "GELU" in type(m).__name__}
    assert activations == {"QuickGELU"}


def test_straight_preprocessing_equals_the_dino_processor():
    """Of facebook/dino-vits16: 224 x 224 for any aspect ratio, bilinear, ImageNet's normalization."""
    from transformers import ViTImageProcessor

    from eval.metrics.encoders import dino_transform

    processor = ViTImageProcessor(
        size={"height": 224, "width": 224},
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 451, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    # Either may round the resized image to integers.
    torch.testing.assert_close(dino_transform("straight")(image), expected, atol=0.02, rtol=0)


@pytest.fixture
def generated(tmp_path, photographs):
    folder = tmp_path / "generated"
    folder.mkdir()
    lines = []
    for number, path in enumerate(sorted(photographs.glob("*.png"))[:2]):
        load_rgb(path).rotate(10).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": f"a sks toy number {number}", "seed": 0}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flags(generated, photographs, tiny_scorers, output, *more: object) -> list[str]:
    words = ["dreambooth", "--generated_dir", generated, "--reference_dir", photographs, "--output", output]
    words += ["--dino", f"local-dir:{tiny_scorers / 'dino'}", "--clip", f"local-dir:{tiny_scorers / 'clip'}"]
    return [str(word) for word in [*words, *more]]


@pytest.mark.parametrize("protocol", ["delora", "dreambooth"])
def test_the_command_equals_the_encoders_called_directly(
    generated, photographs, tiny_scorers, tmp_path, protocol, capsys
):
    output = tmp_path / "scores.json"
    main(flags(generated, photographs, tiny_scorers, output, "--protocol", protocol, "--batch_size", 3))
    result = json.loads(output.read_text())
    assert "CLIP-I" in capsys.readouterr().out

    import open_clip
    import timm

    from eval.metrics.encoders import dino_transform

    real = sorted(photographs.glob("*.png"))
    images = sorted(generated.glob("*.png"))
    dino = timm.create_model(f"local-dir:{tiny_scorers / 'dino'}", pretrained=True, num_classes=0).eval()
    transform = dino_transform(PROTOCOLS[protocol].dino_transform)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_scorers / 'clip'}")
    clip.eval()
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer(f"local-dir:{tiny_scorers / 'clip'}")([f"a toy number {n}" for n in (0, 1)])
        text = nn.functional.normalize(clip.encode_text(tokens), dim=-1)

        def features(encode, transform, paths):
            return nn.functional.normalize(torch.cat([encode(transform(load_rgb(p))[None]) for p in paths]), dim=-1)

        d = [features(lambda x: dino.forward_features(x)[:, 0], transform, paths) for paths in (images, real)]
        c = [features(clip.encode_image, preprocess, paths) for paths in (images, real)]
    expected = {
        "dino": (d[0] @ d[1].T).mean().item(),
        "clip_i": (c[0] @ c[1].T).mean().item(),
        "clip_t": (c[0] * text).sum(dim=1).mean().item(),
    }
    assert result["scores"] == pytest.approx(expected, abs=1e-5)
    assert result["counts"] == {"generated": 2, "reference": 5, "prompts": 2}
    assert len(result["pictures"]) == 2 and result["pictures"][1]["prompt"] == "a sks toy number 1"


def test_bad_input(generated, photographs, tiny_scorers, tmp_path):
    output = tmp_path / "scores.json"

    def check_error(message, *more, **changes):
        arguments = {"generated": generated, "photographs": photographs} | changes
        with pytest.raises(SystemExit, match=message):
            main(flags(arguments["generated"], arguments["photographs"], tiny_scorers, output, *more))
        assert not output.exists()

    check_error("metadata.jsonl is missing", generated=tmp_path / "nowhere")
    check_error("nowhere is not a folder", photographs=tmp_path / "nowhere")
    check_error("has no config.json", "--dino", f"local-dir:{tmp_path}")
    check_error("has no open_clip_config.json", "--clip", f"local-dir:{tmp_path}")
    check_error("--dino no_such_model could not be loaded", "--dino", "no_such_model")
    check_error("--clip no_such_model could not be loaded", "--clip", "no_such_model")
    check_error(r"--device nothing cannot be used \(.*\); leave it out, or give cpu", "--device", "nothing")
    check_error("--batch_size is 0; give at least 1", "--batch_size", "0")
    (generated / "1.png").unlink()
    check_error("1.png is missing, but metadata.jsonl lists it")
    (generated / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    check_error("line 1 is not a record like .*it has no prompt")
    (generated / "metadata.jsonl").write_text("")
    check_error("is empty")
    output.write_text("unchanged")
    with pytest.raises(SystemExit, match="already exists"):
        main(flags(generated, photographs, tiny_scorers, output))
    assert output.read_text() == "unchanged"
    with pytest.raises(InputError, match="is not the output folder of a training run"):
        read_curves(photographs)


def test_images_at_several_strengths_are_averaged_with_a_warning(tmp_path, caplog):
    lines = [{"file_name": f"{k}.png", "prompt": "a toy", "strength": k / 2} for k in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        Image.new("RGB", (8, 8)).save(tmp_path / line["file_name"])
    assert len(read_generated(tmp_path)) == 3
    assert "has images at the strengths 0, 0.5, 1, which are averaged; generate them apart" in caplog.text


def test_images_of_an_adapter_are_not_those_of_the_base_model(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    line = {"file_name": "0.png", "prompt": "a toy", "adapter": "a1", "strength": 0.0}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    check_base_images(tmp_path, "--base_dir")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line | {"strength": 1.0}))
    with pytest.raises(InputError, match="--base_dir: .*0.png was generated with an adapter; give images of the base"):
        check_base_images(tmp_path, "--base_dir")


def test_maps_of_the_same_name_that_are_other_files_are_said(tmp_path, caplog):
    images, maps = tmp_path / "images", tmp_path / "maps"
    for folder in (images, maps / "maps", maps / "images"):
        folder.mkdir(parents=True)
    for file in (images / "0.png", maps / "maps/0.png", maps / "images/0.png"):
        Image.new("L", (8, 8)).save(file)
    digest = hashlib.sha256((maps / "maps/0.png").read_bytes()).hexdigest()[:16]
    line = {"file_name": "0.png", "prompt": "a toy", "map": "maps/0.png", "map_sha256": digest}
    (images / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"strength": s}) for s in (1.0, 1.0)))
    assert len(read_generated_from_maps(images, maps)) == 2 and not caplog.text
    Image.new("L", (8, 8), 1).save(maps / "maps/0.png")
    (images / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"strength": s}) for s in (0.5, 1.0)))
    assert len(read_generated_from_maps(images, maps)) == 2
    assert "is not the file that its image was generated from, only of the same name (2 of 2 images)" in caplog.text
    assert "has images at the strengths 0.5, 1, which are averaged" in caplog.text


@pytest.mark.integration
def test_a_page_shows_before_and_after(generated, photographs, tmp_path, capsys):
    import shutil

    from torch.utils.tensorboard import SummaryWriter

    before = shutil.copytree(generated, tmp_path / "before")
    with SummaryWriter(str(tmp_path / "run" / "logs")) as log:
        for step in range(3):
            log.add_scalar("loss", 1 / (step + 1), step)
    arguments = ["page", "--generated_dir", generated, "--base_dir", before, "--reference_dir", photographs]
    arguments += [
        "--training_dir",
        tmp_path / "run",
        "--protocol",
        "toybox",
        "--output",
        tmp_path / "out" / "index.html",
    ]
    main([str(word) for word in arguments])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == 5 + 2 * 2 + 1 and "http" not in page
    assert "Before and after: a sks toy number" in page
    with Image.open(tmp_path / "out" / "index.png") as image:
        assert image.width > 400
    assert "CLIP-T" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already exists"):
        main([str(word) for word in arguments])
    (before / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "something else"}\n')
    arguments[-1] = tmp_path / "other.html"
    with pytest.raises(SystemExit, match="has no image of 'a sks toy number 0'"):
        main([str(word) for word in arguments])
    assert not (tmp_path / "other.html").exists()
