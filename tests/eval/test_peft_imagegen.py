"""PEFT's image benchmark: its split, its scores against loops over single images, and errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.peft_imagegen import main as prepare
from data.photographs import find_photographs
from eval.__main__ import main

CAPTIONS = [f"sks cat number {number}" for number in range(8)]


def random_image(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small DINOv2 with random weights and the processor of facebook/dinov2-base, as on the hub."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A clone of PEFT, as far as it is read, whose dataset is a local folder."""
    import datasets

    folder = tmp_path_factory.mktemp("peft")
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [random_image(seed) for seed in range(8)]}, features=features)
    (folder / "cats").mkdir()
    rows.to_parquet(folder / "cats" / "train.parquet")
    parameters = {"dataset_id": str(folder / "cats"), "dataset_split": "train", "image_column": "image"}
    parameters |= {"valid_size": 2, "test_size": 3, "instance_prompts": CAPTIONS, "drift_image_prompts": ["a tree"]}
    file = folder / "method_comparison" / "image-gen" / "default_training_params.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(parameters))
    return folder


@pytest.mark.integration
def test_the_split_is_that_of_peft(dataset, tmp_path):
    prepare([str(dataset), str(tmp_path / "cat")])
    np.random.seed(0)
    indices = np.arange(8)
    np.random.shuffle(indices)
    for part, rows in (("train", indices[:3]), ("valid", indices[3:5]), ("test", indices[5:])):
        photos = find_photographs(tmp_path / "cat" / part)
        assert [photo.caption for photo in photos] == [CAPTIONS[row] for row in sorted(rows)]
        for photo, row in zip(photos, sorted(rows)):
            assert np.array_equal(photo.load(), random_image(int(row)))
    assert (tmp_path / "cat" / "test_prompts.txt").read_text().splitlines() == [CAPTIONS[row] for row in indices[5:]]
    assert (tmp_path / "cat" / "drift_prompts.txt").read_text() == "a tree\n"
    with pytest.raises(SystemExit, match="already exists"):
        prepare([str(dataset), str(tmp_path / "cat")])


def write_images(folder, prompts: list[str], seed: int):
    folder.mkdir()
    lines = []
    for number, prompt in enumerate(prompts):
        random_image(seed + number, (64 + number, 80)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": prompt, "seed": number}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Held-out photos, two images of each caption, images of other prompts with the adapter and without."""
    test = tmp_path / "test"
    test.mkdir()
    for number in range(3):
        random_image(50 + number, (100, 75)).save(test / f"{number}.png")
        (test / f"{number}.txt").write_text(CAPTIONS[number])
    generated = write_images(tmp_path / "generated", [CAPTIONS[n] for n in (2, 0, 1, 1, 2, 0)], 100)
    drift, base = (
        write_images(tmp_path / name, ["a tree", "a tree", "a dog"], s) for name, s in (("d", 200), ("b", 300))
    )
    return test, generated, drift, base


def flags(folders, dinov2, output) -> list[str]:
    test, generated, drift, base = folders
    words = ["dreambooth", "--protocol", "peft-imagegen", "--reference_dir", test, "--generated_dir", generated]
    words += ["--drift_dir", drift, "--base_dir", base, "--dino", dinov2, "--output", output]
    return [str(word) for word in words]


@pytest.mark.integration
def test_scores_equal_loops_over_single_images(folders, dinov2, tmp_path, capsys):
    from transformers import AutoImageProcessor, AutoModel

    main(flags(folders, dinov2, tmp_path / "scores.json"))
    result = json.loads((tmp_path / "scores.json").read_text())
    processor, model = AutoImageProcessor.from_pretrained(dinov2), AutoModel.from_pretrained(dinov2).eval()

    @torch.inference_mode()
    def features(path):
        inputs = processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")
        return torch.nn.functional.normalize(model(**inputs).last_hidden_state[0, 0].double(), dim=0)

    test, generated, drift, base = folders
    photo_of = {CAPTIONS[number]: test / f"{number}.png" for number in range(3)}
    records = [json.loads(line) for line in (generated / "metadata.jsonl").read_text().splitlines()]
    cosines = [float(features(generated / r["file_name"]) @ features(photo_of[r["prompt"]])) for r in records]
    drifts = [float(features(drift / f"{n}.png") @ features(base / f"{n}.png")) for n in range(3)]
    assert result["scores"]["dino"] == pytest.approx(sum(cosines) / 6, abs=1e-6)
    assert result["scores"]["drift"] == pytest.approx((1 - sum(drifts) / 3) / 2, abs=1e-6)
    assert result["counts"] == {"generated": 6, "reference": 3, "drift": 3}
    assert "drift" in capsys.readouterr().out


def remove_a_caption(test, base):
    (test / "1.txt").unlink()


def repeat_a_caption(test, base):
    (test / "1.txt").write_text(CAPTIONS[0])


def change_a_caption(test, base):
    (test / "1.txt").write_text("a dog")


def add_a_photo(test, base):
    random_image(9).save(test / "3.png")
    (test / "3.txt").write_text("a hat")


def remove_images_of_the_base_model(test, base):
    (base / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a tree"}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_a_caption, "1.png has no caption"),
        (repeat_a_caption, "have one caption"),
        (change_a_caption, "which is no photo's caption"),
        (add_a_photo, "there is no image of 'a hat'"),
        (remove_images_of_the_base_model, "--base_dir has 1 images of 'a tree' and --drift_dir 2"),
    ],
)
def test_wrong_folders(folders, tmp_path, harm, message):
    harm(folders[0], folders[3])
    with pytest.raises(SystemExit, match=message):
        main(flags(folders, "nowhere", tmp_path / "scores.json"))
    assert not (tmp_path / "scores.json").exists()


def test_flags_of_the_protocol(folders, tmp_path):
    words = flags(folders, "nowhere", tmp_path / "scores.json")
    without = [word for word in words if word not in ("--base_dir", str(folders[3]))]
    with pytest.raises(SystemExit, match="--drift_dir and --base_dir are needed together"):
        main(without)
    words[2] = "delora"
    with pytest.raises(SystemExit, match="belong to --protocol peft-imagegen"):
        main(words)
