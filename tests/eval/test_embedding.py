"""Features of many images: each is encoded once and cached by content. LPIPS against torchmetrics, pair by pair."""

import numpy as np
import pytest
import torch
from PIL import Image

from delora_diffusers.errors import InputError
from eval.metrics.embedding import embed
from eval.metrics.encoders import ClipEncoder, DinoEncoder
from eval.metrics.lpips import Perceptual, perceptual_scores
from tests.helpers import write_photos


@pytest.fixture
def encoders(tiny_scorers):
    dino = DinoEncoder(f"local-dir:{tiny_scorers / 'dino'}", "straight", "cpu")
    return {"dino": dino, "clip": ClipEncoder(f"local-dir:{tiny_scorers / 'clip'}", None, "cpu")}


@pytest.fixture
def images(tmp_path):
    """Eleven files; the last has the content of the first."""
    folder = write_photos(tmp_path / "images", 10)
    paths = sorted(folder.iterdir())
    paths.append(folder / "copy.png")
    paths[-1].write_bytes(paths[0].read_bytes())
    return paths


def count_encoded(encoders, monkeypatch):
    """How many images each encoder has encoded so far."""
    counts = dict.fromkeys(encoders, 0)

    def wrap(key, encode):
        def counting(batch):
            counts[key] += len(batch)
            return encode(batch)

        return counting

    for key, encoder in encoders.items():
        monkeypatch.setattr(encoder, "encode", wrap(key, encoder.encode))
    return counts


@pytest.mark.integration
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (2, 4), (0, 64)])
def test_features_equal_those_of_single_images(encoders, images, workers, batch_size):
    """Each is preprocessed by the complete transform, which returns floats, and encoded separately."""
    features = embed(images, encoders, workers=workers, batch_size=batch_size)
    for key, encoder in encoders.items():
        single = [encoder.encode(encoder.transform(Image.open(path).convert("RGB"))[None])[0] for path in images]
        torch.testing.assert_close(features[key], torch.stack(single), atol=2e-6, rtol=0)


def test_an_image_is_encoded_once_and_cached_by_content(encoders, images, tmp_path, monkeypatch):
    counts = count_encoded(encoders, monkeypatch)
    first = embed(images, encoders, cache_dir=tmp_path / "cache")
    assert counts == {"dino": 10, "clip": 10}
    torch.testing.assert_close(first["dino"][0], first["dino"][10], atol=0, rtol=0)
    moved = [path.rename(path.with_name(f"moved-{path.name}")) for path in images]
    again = embed(moved, encoders, cache_dir=tmp_path / "cache")
    assert counts == {"dino": 10, "clip": 10}
    assert all(torch.equal(first[key], again[key]) for key in encoders)
    rotated = Image.open(moved[3]).rotate(90)
    rotated.save(moved[3])
    embed(moved, encoders, cache_dir=tmp_path / "cache")
    assert counts == {"dino": 11, "clip": 11}


def test_weights_precision_and_preprocessing_change_the_identity(encoders, tiny_scorers):
    name = f"local-dir:{tiny_scorers / 'dino'}"
    others = [DinoEncoder(name, "crop", "cpu"), DinoEncoder(name, "straight", "cpu", "bf16")]
    others.append(DinoEncoder(name, "straight", "cpu"))
    with torch.no_grad():
        next(others[-1].model.parameters()).view(-1)[0] += 1e-3
    identities = {encoder.identity for encoder in [*encoders.values(), *others]}
    assert len(identities) == 5
    assert DinoEncoder(name, "straight", "cpu").identity == encoders["dino"].identity


def test_bf16_is_close_to_fp32(encoders, images, tiny_scorers):
    bf16 = {"dino": DinoEncoder(f"local-dir:{tiny_scorers / 'dino'}", "straight", "cpu", "bf16")}
    bf16["clip"] = ClipEncoder(f"local-dir:{tiny_scorers / 'clip'}", None, "cpu", precision="bf16")
    for key, features in embed(images, bf16).items():
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, embed(images, encoders)[key], atol=0.02, rtol=0)


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_and_the_first_is_named(encoders, images, workers):
    for path in images[2:4]:
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf"2 of 10 images cannot be scored: .*{images[2].name}"):
        embed(images, encoders, workers=workers, batch_size=2)


def test_a_damaged_cache_file_is_named(encoders, images, tmp_path):
    embed(images, encoders, cache_dir=tmp_path / "cache")
    file = sorted((tmp_path / "cache").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged .*; remove it"):
        embed(images, encoders, cache_dir=tmp_path / "cache")


@pytest.mark.integration
def test_lpips_equals_torchmetrics_pair_by_pair(tmp_path, monkeypatch):
    """With a random backbone in torchvision's folder of pretrained weights."""
    import torchvision
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = torchvision.models.alexnet().state_dict()
    torch.save(backbone, tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    random, paths = np.random.default_rng(0), []
    for number in range(5):
        small = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        small.resize((120, 90), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    perceptual = Perceptual("alex", "cpu", side=96)
    scores = perceptual_scores(perceptual, [paths[:2], paths[2:3]], paths[3:], others=paths[1:3])

    def distance(a, b):
        batches = [perceptual.transform(Image.open(path))[None] * 2 - 1 for path in (a, b)]
        return float(reference(*batches, net_type="alex"))

    for group, values in zip((paths[:2], paths[2:3]), scores.to_photos):
        expected = [np.mean([distance(path, other) for other in paths[3:]]) for path in group]
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert scores.diversity[0] == pytest.approx(distance(paths[0], paths[1]), abs=1e-6)
    assert scores.diversity[1] is None
    expected = [np.mean([distance(path, other) for other in paths[3:]]) for path in paths[1:3]]
    np.testing.assert_allclose(scores.of_others, expected, atol=1e-6)
