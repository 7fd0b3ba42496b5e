"""Scores against loops written out, and the encoders against the libraries they are said to be."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from delora_diffusers.image_files import load_rgb
from eval.__main__ import main
from eval.metrics.protocols import PROTOCOLS
from eval.metrics.scores import pair_scores, real_score, text_scores, without_identifier


def unit(rows: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_scores_are_the_loops_they_stand_for():
    generated, reference = unit(6, 0), unit(4, 1)
    pairs = [float(np.dot(g.double(), r.double())) for g in generated for r in reference]
    assert pair_scores(generated, reference).mean().item() == pytest.approx(np.mean(pairs), abs=1e-12)
    real = [float(np.dot(a.double(), b.double())) for a, b in itertools.combinations(reference, 2)]
    assert real_score(reference) == pytest.approx(np.mean(real), abs=1e-12)
    assert real_score(reference[:1]) is None
    texts = unit(6, 2)
    own = [float(np.dot(g.double(), t.double())) for g, t in zip(generated, texts)]
    np.testing.assert_allclose(text_scores(generated, texts), own, atol=1e-12)


def test_the_identifier_is_taken_out_as_a_word():
    assert without_identifier("a sks dog in the jungle") == "a dog in the jungle"
    assert without_identifier("qwe dog, tasks") == "dog, tasks"
    assert without_identifier("a zwx dog", ["zwx"]) == "a dog"


def test_the_protocols_name_the_published_models():
    delora, dreambooth = PROTOCOLS["delora"], PROTOCOLS["dreambooth"]
    assert (delora.clip, dreambooth.clip) == ("ViT-L-14", "ViT-B-32")
    assert delora.dino == dreambooth.dino == "vit_small_patch16_224.dino"
    assert delora.clip_pretrained == dreambooth.clip_pretrained == "openai"


def test_openai_clip_gets_the_activation_it_was_trained_with(monkeypatch):
    """The weights cannot be fetched here; the model that would receive them can be built."""
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


def test_straight_preprocessing_is_the_dino_models_own():
    """facebook/dino-vits16's preprocessor: 224 x 224 whatever the aspect, bilinear, ImageNet's normalization."""
    from transformers import ViTImageProcessor

    from eval.metrics.encoders import dino_transform

    processor = ViTImageProcessor(
        size={"height": 224, "width": 224},
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 451, 3), dtype=np.uint8))
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    # Either may round the resized picture to whole levels.
    torch.testing.assert_close(dino_transform("straight")(picture), expected, atol=0.02, rtol=0)


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
def test_the_command_equals_the_encoders_called_by_hand(
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
    drawn = sorted(generated.glob("*.png"))
    dino = timm.create_model(f"local-dir:{tiny_scorers / 'dino'}", pretrained=True, num_classes=0).eval()
    transform = dino_transform(PROTOCOLS[protocol].dino_transform)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_scorers / 'clip'}")
    clip.eval()
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer(f"local-dir:{tiny_scorers / 'clip'}")([f"a toy number {n}" for n in (0, 1)])
        text = nn.functional.normalize(clip.encode_text(tokens), dim=-1)

        def features(encode, transform, paths):
            return nn.functional.normalize(torch.cat([encode(transform(load_rgb(p))[None]) for p in paths]), dim=-1)

        d = [features(lambda x: dino.forward_features(x)[:, 0], transform, paths) for paths in (drawn, real)]
        c = [features(clip.encode_image, preprocess, paths) for paths in (drawn, real)]
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

    def refused(message, *more, **changes):
        arguments = {"generated": generated, "photographs": photographs} | changes
        with pytest.raises(SystemExit, match=message):
            main(flags(arguments["generated"], arguments["photographs"], tiny_scorers, output, *more))
        assert not output.exists()

    refused("metadata.jsonl is missing", generated=tmp_path / "nowhere")
    refused("nowhere is not a folder", photographs=tmp_path / "nowhere")
    refused("has no config.json", "--dino", f"local-dir:{tmp_path}")
    refused("has no open_clip_config.json", "--clip", f"local-dir:{tmp_path}")
    refused("--dino no_such_model could not be loaded", "--dino", "no_such_model")
    refused("--clip no_such_model could not be loaded", "--clip", "no_such_model")
    (generated / "1.png").unlink()
    refused("1.png is missing, though metadata.jsonl names it")
    (generated / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    refused("line 1 has no file_name and prompt")
    (generated / "metadata.jsonl").write_text("")
    refused("is empty")
    output.write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        main(flags(generated, photographs, tiny_scorers, output))
    assert output.read_text() == "mine"


def test_a_page_shows_before_and_after(generated, photographs, tmp_path, capsys):
    import shutil

    from torch.utils.tensorboard import SummaryWriter

    before = shutil.copytree(generated, tmp_path / "before")
    with SummaryWriter(str(tmp_path / "run" / "logs")) as log:
        for step in range(3):
            log.add_scalar("loss", 1 / (step + 1), step)
    typed = ["page", "--generated_dir", generated, "--base_dir", before, "--reference_dir", photographs]
    typed += ["--training_dir", tmp_path / "run", "--protocol", "toybox", "--output", tmp_path / "out" / "index.html"]
    main([str(word) for word in typed])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == 5 + 2 * 2 + 1 and "http" not in page
    assert "Before and after: a sks toy number" in page
    with Image.open(tmp_path / "out" / "index.png") as picture:
        assert picture.width > 400
    assert "CLIP-T" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        main([str(word) for word in typed])
    (before / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "something else"}\n')
    typed[-1] = tmp_path / "other.html"
    with pytest.raises(SystemExit, match="has no picture of 'a sks toy number 0'"):
        main([str(word) for word in typed])
    assert not (tmp_path / "other.html").exists()
