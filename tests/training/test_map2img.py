"""Maps to images from the command line: train, resume, generate and score; scores against other implementations."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_controlnet_map2img as script
from delora_diffusers.__main__ import main as library
from delora_diffusers.errors import InputError
from delora_diffusers.names import WEIGHTS_NAME
from eval.__main__ import main as evaluate
from eval.metrics.frechet import Inception, frechet_distance
from eval.metrics.segmentation import agreement, confusion_matrix
from tests.helpers import PALETTE, map_flags, run_in_child, run_in_two_processes, write_map_folders


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder with five images, their index maps and captions, 40 x 30 pixels."""
    return write_map_folders(tmp_path_factory.mktemp("pairs") / "data", ["a", "b", "c", "d", "e"])


@pytest.fixture(scope="module")
def trained(tiny_sd, pairs, tmp_path_factory):
    """Output folder of a complete run with checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "complete"
    assert run_in_child(script.main, map_flags(tiny_sd, pairs, out, "--checkpointing_steps", 3)) == 0
    return out


def weights(out) -> bytes:
    return (out / "pytorch_delora_weights.safetensors").read_bytes()


@pytest.mark.integration
def test_a_run_writes_adapter_grid_card_and_cache(trained):
    from safetensors import safe_open

    with safe_open(trained / "pytorch_delora_weights.safetensors", "pt") as file:
        names = set(file.keys())
        assert torch.count_nonzero(file.get_tensor("control_encoder.conv_out.weight")) > 0
    assert any(name.endswith("ff.net.0.proj.delora_A") for name in names)
    assert any(name.endswith("attn2.to_out.0.delora_A") for name in names)
    with Image.open(trained / "validation" / "step-000006.png") as grid:
        assert grid.width > 3 * 256
    card = (trained / "README.md").read_text()
    assert "--map_dir maps" in card and "load_control" in card and "5 images and their maps" in card
    shards = list((trained / "cache").glob("*/shard-*.safetensors"))
    assert len(shards) == 1


@pytest.mark.integration
def test_resumes_to_the_same_bytes(trained, tiny_sd, pairs, tmp_path):
    import shutil

    out = tmp_path / "resumed"
    shutil.copytree(trained, out)
    (out / "pytorch_delora_weights.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-6")
    flags = map_flags(tiny_sd, pairs, out, "--checkpointing_steps", 3, "--resume_from_checkpoint", "latest")
    assert run_in_child(script.main, flags) == 0
    assert weights(out) == weights(trained)


@pytest.mark.integration
def test_the_cache_is_completed_after_a_kill_and_kept_when_settings_change(trained, tiny_sd, pairs, tmp_path):
    cache = tmp_path / "cache"
    assert run_in_child(script.main, map_flags(tiny_sd, pairs, tmp_path / "one", "--cache_dir", cache)) == 0
    (shard,) = cache.glob("*/shard-00000.safetensors")
    first, modified = shard.read_bytes(), shard.stat().st_mtime_ns
    assert run_in_child(script.main, map_flags(tiny_sd, pairs, tmp_path / "two", "--cache_dir", cache)) == 0
    assert shard.stat().st_mtime_ns == modified  # reused, not computed again
    shard.rename(shard.with_name(".shard-00000.safetensors.77.part"))  # as a killed run leaves it
    assert run_in_child(script.main, map_flags(tiny_sd, pairs, tmp_path / "three", "--cache_dir", cache)) == 0
    assert shard.read_bytes() == first
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(tmp_path / "three") == weights(trained)
    more = ("--cache_dir", cache, "--num_crops", 2)
    assert run_in_child(script.main, map_flags(tiny_sd, pairs, tmp_path / "four", *more)) == 0
    assert len(list(cache.iterdir())) == 2 and shard.read_bytes() == first


@pytest.mark.integration
def test_a_frozen_controlnet_encoder_does_not_change(unet, tiny_sd, pairs, tmp_path):
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(unet)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    controlnet.save_pretrained(tmp_path / "controlnet")
    more = ("--controlnet_model_name_or_path", tmp_path / "controlnet", "--control_learning_rate", 0)
    out = tmp_path / "out"
    assert run_in_child(script.main, map_flags(tiny_sd, pairs, out, *more, "--max_train_steps", 2)) == 0
    saved = load_file(out / "pytorch_delora_weights.safetensors")
    for name, tensor in controlnet.controlnet_cond_embedding.state_dict().items():
        assert torch.equal(saved[f"control_encoder.{name}"], tensor)


@pytest.fixture(scope="module")
def generated(trained, pairs, tmp_path_factory):
    """Folder with images generated from the maps."""
    out = tmp_path_factory.mktemp("generated") / "g"
    library(generate_command(trained, pairs, out))
    return out


def generate_command(trained, pairs, out, *more) -> list[str]:
    command = ["generate", "--adapter", trained, "--map_dir", pairs, "--output_dir", out, "--num_inference_steps", 3]
    return [str(word) for word in [*command, *more]]


@pytest.mark.integration
def test_generate_writes_an_image_per_map_and_continues(generated, trained, pairs, tmp_path, capsys):
    records = [json.loads(line) for line in (generated / "metadata.jsonl").read_text().splitlines()]
    assert [(r["file_name"], r["prompt"]) for r in records] == [(f"{n}.png", f"scene {n}") for n in "abcde"]
    assert len({r["seed"] for r in records}) == 5
    for record in records:
        with Image.open(generated / record["file_name"]) as image, Image.open(generated / record["map"]) as semantic:
            assert image.size == semantic.size == (64, 64)
    before = {n: (generated / f"{n}.png").read_bytes() for n in "abcde"}
    (generated / "c.png").unlink()
    library(generate_command(trained, pairs, generated))
    assert "5 images" in (output := capsys.readouterr().out) and "(1 new)" in output
    assert all((generated / f"{n}.png").read_bytes() == before[n] for n in "abde")
    second, first = (
        np.asarray(Image.open(io.BytesIO(b))).astype(int) for b in ((generated / "c.png").read_bytes(), before["c"])
    )
    assert np.abs(second - first).max() <= 2  # the second time in a batch of size 1
    # A different map gives a different image, even from the same noise.
    other = tmp_path / "other"
    other.mkdir()
    Image.open(pairs / "maps" / "a.png").save(other / "b.png")
    library(generate_command(trained, other, tmp_path / "o", "--default_caption", "scene b"))
    assert (tmp_path / "o" / "b.png").read_bytes() != before["b"]
    (other / "metadata.jsonl").write_text('{"file_name": "b.png", "text": ""}\n')  # an empty caption is valid
    library(generate_command(trained, other, tmp_path / "p"))
    assert '"prompt": ""' in (tmp_path / "p" / "metadata.jsonl").read_text()


@pytest.mark.integration
def test_generate_rejects_bad_flags_and_maps(trained, pairs, tmp_path):
    def refused(message, *flags):
        with pytest.raises(SystemExit, match=message):
            library(["generate", "--output_dir", str(tmp_path / "o"), *map(str, flags)])
        assert not (tmp_path / "o").exists()

    refused("was trained to follow maps; give a folder of maps", "--adapter", trained, "--prompt", "x")
    refused("nowhere is not a folder", "--adapter", trained, "--map_dir", tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    refused("it contains no map", "--adapter", trained, "--map_dir", tmp_path / "bare")
    Image.new("L", (8, 8)).save(tmp_path / "bare" / "x.png")
    refused("the map x.png has no caption; add", "--adapter", trained, "--map_dir", tmp_path / "bare")
    Image.fromarray(np.full((8, 8), 254, np.uint8)).save(tmp_path / "bare" / "x.png")
    (tmp_path / "bare" / "y.png").write_text("not an image")
    flags = ("--adapter", trained, "--map_dir", tmp_path / "bare", "--default_caption", "x")
    refused("y.png is not a readable image", *flags)
    with pytest.raises(SystemExit, match="a merged pipeline cannot take"):
        library(["merge", "--adapter", str(trained), "--output_dir", str(tmp_path / "merged")])


@pytest.fixture(scope="module")
def tiny_segmenter(tmp_path_factory):
    """Folder with a randomly initialized segmentation model of 6 classes."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(0)
    settings = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 8}
    config = SegformerConfig(depths=[1, 1, 1, 1], num_labels=6, **settings)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.integration
def test_scoring(generated, pairs, tiny_segmenter, tiny_scorers, tmp_path, capsys):
    from data.maps import find_pairs, pair_views
    from eval.metrics.segmentation import Segmenter

    out = tmp_path / "scores.json"
    command = ["map2img", "--generated_dir", generated, "--map_dir", pairs, "--segmenter", tiny_segmenter]
    command += ["--output", out, "--frechet_features", "dino", "--dino", f"local-dir:{tiny_scorers / 'dino'}"]
    command += ["--batch_size", 2, "--ignore_index", 5]
    evaluate([str(word) for word in command])
    assert "mIoU" in capsys.readouterr().out
    result = json.loads(out.read_text())
    segmenter = Segmenter(str(tiny_segmenter), "cpu")
    correct = total = 0
    for pair in find_pairs(pairs):
        truth = pair_views(pair.load_image(), pair.load_map(), (64, 64), None, False)[0][1]
        predicted = segmenter([Image.open(generated / pair.name).convert("RGB")])[0]
        correct, total = correct + ((predicted == truth) & (truth != 5)).sum(), total + (truth != 5).sum()
    assert result["scores"]["pixel_accuracy"] == pytest.approx(correct / total, abs=1e-12)
    assert result["counts"] == {"pictures": 5, "pixels": int(total)}
    assert result["frechet"]["name"].startswith("Frechet distance on local-dir:") and result["scores"]["frechet"] > 0
    assert len(result["classes"]) == 6 and result["real"]["miou"] >= 0
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.height > sheet.width

    def refused(message, *more):
        with pytest.raises(SystemExit, match=message):
            evaluate([str(word) for word in [*command[:11], *more]])

    refused("already exists")
    command[8] = tmp_path / "other.json"
    refused("no_such_model could not be loaded", "--segmenter", tmp_path / "no_such_model")
    (tmp_path / "names.json").write_text('{"0": 9}')
    refused("has class 9, but .* has 6 classes", "--label_map", tmp_path / "names.json", "--frechet_features", "none")
    (tmp_path / "names.json").write_text("[1]")
    refused("names.json is not a JSON object", "--label_map", tmp_path / "names.json")
    more = ("--frechet_features", "inception", "--inception_weights", tmp_path / "nowhere.pth")
    refused("Inception weights .*nowhere.pth could not be loaded", *more)


@pytest.mark.integration
def test_two_processes_give_the_same_weights_and_scores(generated, pairs, tiny_sd, tiny_segmenter, tmp_path):
    rate = ("--learning_rate", 1e-3)
    run_in_two_processes(script.main, map_flags(tiny_sd, pairs, tmp_path / "two", *rate))
    single = map_flags(tiny_sd, pairs, tmp_path / "one", *rate, "--gradient_accumulation_steps", 2)
    assert run_in_child(script.main, single) == 0
    from_two, from_one = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("two", "one"))
    assert from_two.keys() == from_one.keys()
    for name, tensor in from_one.items():
        torch.testing.assert_close(from_two[name], tensor, atol=1e-5, rtol=1e-4)

    scoring = ["map2img", "--generated_dir", generated, "--map_dir", pairs, "--segmenter", tiny_segmenter]
    scoring += ["--frechet_features", "none", "--output"]
    run_in_two_processes(evaluate, [str(word) for word in [*scoring, tmp_path / "two.json"]])
    evaluate([str(word) for word in [*scoring, tmp_path / "one.json"]])
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert two["scores"] == one["scores"] and two["classes"] == one["classes"] and two["real"] == one["real"]


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_torchmetrics_and_direct_counts(seed):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    random = np.random.default_rng(seed)
    truth, predicted = random.integers(0, 9, (4, 31, 17)), random.integers(0, 8, (4, 31, 17))
    truth[random.uniform(size=truth.shape) < 0.2] = 255
    truth[truth == 3] = 4  # class 3 occurs only in the predictions
    confusion = sum(confusion_matrix(torch.tensor(t), torch.tensor(p), 12) for t, p in zip(truth, predicted))
    scores = agreement(confusion)
    t, p = torch.tensor(truth).flatten(), torch.tensor(predicted).flatten()
    expected = multiclass_jaccard_index(p, t, 12, average="macro", ignore_index=255)
    assert scores.miou == pytest.approx(float(expected), abs=1e-6)
    expected = multiclass_accuracy(p, t, 12, average="micro", ignore_index=255)
    assert scores.pixel_accuracy == pytest.approx(float(expected), abs=1e-6)
    recalls = []
    for label in range(12):
        mask = (truth == label) & (truth != 255)
        if mask.any():
            recalls.append(np.float64((predicted[mask] == label).sum()) / mask.sum())
        union = (mask | ((predicted == label) & (truth != 255))).sum()
        if union:
            assert float(scores.iou[label]) == pytest.approx((mask & (predicted == label)).sum() / union, abs=1e-12)
        else:
            assert torch.isnan(scores.iou[label])
    assert scores.mean_accuracy == pytest.approx(np.mean(recalls), abs=1e-12)


def test_the_frechet_distance_equals_the_formula():
    random = np.random.default_rng(0)
    real, other = random.normal(size=(60, 7)), random.normal(0.4, 1.6, size=(50, 7))
    c1, c2 = np.cov(real, rowvar=False), np.cov(other, rowvar=False)
    # tr (C1 C2)^(1/2) is the trace of the square root of the symmetric C1^(1/2) C2 C1^(1/2).
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root)).sum()
    expected = ((real.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c1 + c2) - 2 * cross
    assert frechet_distance(torch.tensor(real), torch.tensor(other)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.tensor(real), torch.tensor(real)) == pytest.approx(0, abs=1e-6)


@pytest.mark.integration
def test_fid_runs_with_inception_weights_from_a_file(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    shell = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    torch.save(_random_inception(shell, torch.Generator().manual_seed(0)), tmp_path / "inception.pth")
    encoder = Inception(tmp_path / "inception.pth", "cpu")
    noise = np.random.default_rng(0)
    image_sets = [
        [Image.fromarray(noise.integers(0, top, (40, 40, 3), dtype=np.uint8)) for _ in range(3)] for top in (255, 90)
    ]
    features = [encoder.encode(images) for images in image_sets]
    assert features[0].shape == (3, 2048)
    assert frechet_distance(*features) > 0


def _random_inception(shell, random) -> dict[str, torch.Tensor]:
    """A random state dict with the right shapes, collected while the extractor is built without its weights."""
    from unittest import mock

    state_dict = {}

    def take(self, state, *_, **__):
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point():
                scale = (2 / max(1, tensor[0].numel())) ** 0.5 if tensor.dim() > 1 else 1.0
                value = (
                    torch.randn(tensor.shape, generator=random) * scale if tensor.dim() > 1 else torch.ones_like(tensor)
                )
                state_dict[name] = value if not name.endswith(("bias", "running_mean")) else torch.zeros_like(tensor)
            else:
                state_dict[name] = tensor

    module = "torch_fidelity.feature_extractor_inceptionv3"
    with mock.patch("torch.nn.Module.load_state_dict", take), mock.patch(f"{module}.torch.load", lambda *_, **__: {}):
        shell.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    return state_dict


BAD = {
    "no data": (["--train_data_dir", ""], "is not a folder|no data was given|contains no pairs"),
    "two sources": (["--dataset_name", "x"], "are both given; choose one"),
    "control learning rate": (["--control_learning_rate", "0.01"], "is not between 0 and 0.0001"),
    "frozen new encoder": (["--control_learning_rate", "0"], "freezes a new encoder"),
    "proportion of empty prompts": (["--proportion_empty_prompts", "2"], "is not between 0 and 1"),
    "palette": (["--palette", "rainbow"], "--palette rainbow is not a file"),
    "target": (["--targets", "to_x"], "target to_x matches no module"),
}


@pytest.mark.parametrize("case", BAD)
def test_training_rejects_bad_flags(case, tiny_sd, pairs, tmp_path):
    more, message = BAD[case]
    with pytest.raises(InputError, match=message):
        script.main(map_flags(tiny_sd, pairs, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_maps_in_colour_need_no_palette(tiny_sd, pairs, tmp_path):
    import shutil

    folder = shutil.copytree(pairs, tmp_path / "colour")
    for path in (folder / "maps").iterdir():
        Image.fromarray(PALETTE[np.asarray(Image.open(path))]).save(path)
    assert run_in_child(script.main, map_flags(tiny_sd, folder, tmp_path / "out", "--max_train_steps", 2)) == 0
