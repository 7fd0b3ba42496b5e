"""Masks: the files that people have, what is listed as a photo, and the weights and gradients of the loss."""

import argparse
import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import train_dreambooth_delora as script
from data.benchmark import find_subjects, load_benchmark
from data.concepts import Concept
from data.photographs import Masks, Photo, find_photographs
from delora_diffusers.crops import View
from delora_diffusers.errors import InputError
from delora_diffusers.families.table import family_of
from delora_diffusers.image_files import ORIENTATION, list_images
from delora_diffusers.training.batches import Bucket, Sample, SubjectBatches, SubjectData
from delora_diffusers.training.encoding import PromptTable, latent_weights
from delora_diffusers.training.objective import denoising_losses
from delora_diffusers.training.photos import check_masks, encode_photos, photo_views

MASKS = Masks(True)
SUBJECT = np.zeros((24, 40), bool)
SUBJECT[6:20, 3:17] = True
GREY = Image.fromarray(np.where(SUBJECT, 255, 0).astype(np.uint8))


def photo_of(array: np.ndarray) -> Image.Image:
    """A photo that is bright where the mask is."""
    return Image.fromarray(np.where(array, 255, 0).astype(np.uint8)).convert("RGB")


def with_palette(colours: list[int], indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(colours)
    return image


def cut_out() -> Image.Image:
    """The subject alone, in dark colours, transparent around it."""
    image = Image.new("RGBA", (40, 24), (10, 20, 30, 255))
    image.putalpha(GREY)
    return image


KINDS = {
    "grey": GREY,
    "colours": GREY.convert("RGB"),
    "zero and one": Image.fromarray(SUBJECT.astype(np.uint8)),
    "one bit": GREY.convert("1"),
    "grey palette": with_palette([0, 0, 0, 255, 255, 255], SUBJECT),
    "a grey palette that starts with white": with_palette([255, 255, 255, 0, 0, 0], ~SUBJECT),
    "a palette as in VOC": with_palette([0, 0, 0, 128, 0, 0, 0, 128, 0], np.where(SUBJECT, 2, 0)),
    "a palette with a bright background": with_palette([250, 250, 0, 0, 0, 90], SUBJECT),
    "16 bits": Image.fromarray(np.where(SUBJECT, 65535, 0).astype(np.uint16)),
    "16 bits up to 255": Image.fromarray(np.where(SUBJECT, 255, 0).astype(np.uint16)),
    "opaque": GREY.convert("RGBA"),
    "cut out": cut_out(),
    "grey and alpha": Image.merge("LA", (Image.new("L", GREY.size, 9), GREY)),
    "twice as large": GREY.resize((80, 48), Image.Resampling.NEAREST),
}


@pytest.mark.parametrize("name", ["00.mask.png", "00-masklabel.png"])
def test_names_of_masks(tmp_path, name, caplog):
    photo_of(SUBJECT).save(tmp_path / "00.jpg")
    GREY.save(tmp_path / name)
    assert [photo.mask for photo in find_photographs(tmp_path)] == [None]
    assert "1 mask in" in caplog.text and "--use_masks" in caplog.text
    assert [photo.mask for photo in find_photographs(tmp_path, MASKS)] == [tmp_path / name]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("beside", [True, False])
def test_every_kind_of_mask_marks_the_subject(tmp_path, kind, beside):
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    photo_of(SUBJECT).save(photos / "00.jpg")
    KINDS[kind].save(photos / "00.mask.png" if beside else masks / "00.png")
    (photo,) = find_photographs(photos, Masks(True, None if beside else masks))
    mask = photo.load_mask()
    assert mask is not None and mask.mode == "L"
    np.testing.assert_array_equal(np.asarray(mask), np.where(SUBJECT, 255, 0))


def test_alpha_channels_are_masks(tmp_path):
    """An opaque alpha channel marks nothing, and a mask beside the photo comes first."""
    cut_out().save(tmp_path / "a.png")
    photo_of(SUBJECT).convert("RGBA").save(tmp_path / "b.png")
    cut_out().save(tmp_path / "c.png")
    Image.new("L", (40, 24), 255).save(tmp_path / "c.mask.png")
    a, b, c = find_photographs(tmp_path, MASKS)
    np.testing.assert_array_equal(np.asarray(a.load_mask()), np.where(SUBJECT, 255, 0))
    assert b.mask is None and np.asarray(c.load_mask()).min() == 255
    assert np.asarray(a.load())[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_mask_of_a_turned_photo_is_upright(tmp_path, orientation):
    """The camera stores the photo turned and notes how; a program that made the mask has seen it upright."""
    upright = photo_of(SUBJECT)
    stored = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    stored |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE}
    stored |= {7: Image.Transpose.TRANSVERSE}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = upright.transpose(stored[orientation]) if orientation > 1 else upright
    turned.save(tmp_path / "a.png", exif=exif)
    GREY.save(tmp_path / "a.mask.png")
    (photo,) = find_photographs(tmp_path, MASKS)
    assert np.array_equal(np.asarray(photo.load())[..., 0], np.asarray(photo.load_mask()))


def test_what_is_no_mask_is_refused(tmp_path):
    def refused(message: str, masks: Masks = MASKS) -> None:
        with pytest.raises(InputError, match=message) as error:
            find_photographs(tmp_path, masks)
        assert "\n" not in str(error.value)

    photo_of(SUBJECT).save(tmp_path / "a.jpg")
    refused(r"has no mask for the photos in .*; add for example a\.mask\.png")
    (tmp_path / "masks").mkdir()
    refused(r"masks has no mask for the photos in .*; add for example a\.png", Masks(True, tmp_path / "masks"))
    refused(r"--mask_data_dir .*missing is not a folder; give", Masks(True, tmp_path / "missing"))
    refused(r"--mask_data_dir .* is the folder of the photos; leave it out", Masks(True, tmp_path))
    mask = tmp_path / "a.mask.png"
    Image.new("L", (40, 24)).save(mask)
    refused(r"the mask .*a\.mask\.png is black everywhere")
    Image.new("L", (24, 40), 255).save(mask)
    refused(r"the mask .*a\.mask\.png is 24 x 40 pixels, but its photo is 40 x 24")
    mask.write_bytes(b"not an image")
    refused(r"a\.mask\.png is not a readable image")
    Image.new("F", (40, 24), 1.0).save(tmp_path / "a.mask.tif")
    mask.unlink()
    refused(r"a\.mask\.tif is a floating-point image")
    GREY.save(mask)
    refused(r"a\.mask\.png and a\.mask\.tif are both masks of a\.jpg")


def test_masks_are_never_photos(tmp_path):
    """Neither to train on, nor as references, class images or photos of a benchmark, also if their photo cannot be read
    or is not there. A photo whose name ends in _mask is one, if there is no other that it could belong to."""
    benchmark = load_benchmark("toybox")
    folder = tmp_path / benchmark.subjects[0].name
    folder.mkdir()
    photos = ["a.jpg", "b.png", "c.d.png", "f.jpg", "party_mask.png"]
    masks_of = ["a.mask.png", "b-masklabel.png", "c.d.mask.webp", "e_mask.png", "f.jpg.mask.png", "gone.mask.png"]
    (folder / "e.jxl").write_bytes(b"")
    for name in [*photos, *masks_of]:
        photo_of(SUBJECT).save(folder / name)
    for masks in (Masks(), MASKS):
        assert [photo.path.name for photo in find_photographs(folder, masks)] == photos
    assert [path.name for path in list_images(folder)] == photos
    concept = Concept(find_photographs(folder), folder, "a dog", class_data_dir=folder)
    assert [path.name for path in concept.class_images()] == photos
    assert find_subjects(benchmark, tmp_path).counts == {folder.name: 5}


def test_photos_without_a_mask_are_named(tmp_path, caplog):
    for name in "ab":
        photo_of(SUBJECT).save(tmp_path / f"{name}.jpg")
    GREY.save(tmp_path / "a.mask.png")
    with caplog.at_level(logging.WARNING):
        assert [photo.mask is None for photo in find_photographs(tmp_path, MASKS)] == [False, True]
    assert "no mask for b.jpg in" in caplog.text
    for name in "cdefgh":
        photo_of(SUBJECT).save(tmp_path / f"{name}.jpg")
    with caplog.at_level(logging.WARNING):
        find_photographs(tmp_path, MASKS)
    assert "no mask for b.jpg, c.jpg, d.jpg, e.jpg, f.jpg and 2 others in" in caplog.text


def block_means(values: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each block of pixels, in float64."""
    height, width = (side // factor for side in values.shape)
    return values.reshape(height, factor, width, factor).astype(np.float64).mean((1, 3))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 8]), st.floats(0, 1), st.integers(0, 99))
def test_weights_are_means_of_pixels_with_a_mean_of_one(height, width, factor, background, seed):
    random = np.random.default_rng(seed)
    mask = random.integers(0, 256, (height * factor, width * factor), np.uint8)
    mask[random.uniform(size=mask.shape) < 0.5] = 0
    mask[0, 0] = 255
    view = View(np.zeros((*mask.shape, 3), np.uint8), mask, (0,) * 6)
    expected = block_means(background + (1 - background) * (mask / 255.0), factor)
    weights = latent_weights(view, background, factor)
    assert weights.shape == (1, height, width) and weights.mean().item() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(weights[0].numpy(), expected / expected.mean(), rtol=1e-5, atol=1e-6)


class Blocks(torch.nn.Module):
    """An autoencoder whose latents are the mean colours of blocks of 8 pixels."""

    dtype = torch.float32
    config = argparse.Namespace(scaling_factor=1.0, latent_channels=3, block_out_channels=(1, 1, 1, 1))

    def encode(self, pixels: torch.Tensor) -> argparse.Namespace:
        latents = torch.nn.functional.avg_pool2d(pixels, 8)
        return argparse.Namespace(latent_dist=argparse.Namespace(mean=latents, std=torch.zeros_like(latents)))


BLOCKS: Any = argparse.Namespace(
    family=family_of("StableDiffusionPipeline"), pipeline=argparse.Namespace(vae=Blocks()), patch_pixels=8
)


def masked_photos(folder: Path, seed: int, count: int = 2) -> list[Photo]:
    """Photos of 64 x 24 pixels that are their own masks: white where the mask is, black elsewhere."""
    random = np.random.default_rng(seed)
    for number in range(count):
        blocks = random.integers(0, 2, (6, 16)).astype(bool)
        blocks[:, 7:9] = True  # so that every crop shows a part of it
        photo_of(np.kron(blocks, np.ones((4, 4), bool))).save(folder / f"{number}.png")
        photo_of(np.kron(blocks, np.ones((4, 4), bool))).save(folder / f"{number}.mask.png")
    return find_photographs(folder, MASKS)


@pytest.mark.parametrize("seed", range(3))
def test_weights_lie_where_the_photo_was_masked(tmp_path, seed):
    """In every crop and mirror image, also when views are sampled for a batch."""
    args = script.parse_arguments(["--random_flip", "--use_masks", "--mask_background_weight", "0.25"])
    photos = masked_photos(tmp_path, seed)
    cache = encode_photos(BLOCKS, photos, [0, 1], (24, 24), seed, args, torch.device("cpu"))
    assert cache.weights is not None and len(cache.mean) > 20
    brightness = 0.25 + 0.75 * (cache.mean[:, :1] + 1) / 2
    torch.testing.assert_close(cache.weights, brightness / brightness.mean((2, 3), keepdim=True))
    for draw in range(20):
        latents = cache.sample([0, 1, 1], torch.Generator(), draw)
        brightness = 0.25 + 0.75 * (latents[:, :1] + 1) / 2
        weights = cache.of_views([0, 1, 1], draw, torch.device("cpu"))["pixel_weights"]
        torch.testing.assert_close(weights, brightness / brightness.mean((2, 3), keepdim=True))


def test_a_batch_has_the_weights_of_its_views(tmp_path):
    """Also beside class images, which count everywhere."""
    args = script.parse_arguments(["--random_flip", "--use_masks", "--mask_background_weight", "0"])
    photos = masked_photos(tmp_path, 1)
    cache, of_class = (encode_photos(BLOCKS, photos, [0, 1], (24, 24), s, args, torch.device("cpu")) for s in (0, 1))
    samples = [Sample(number, ("",), class_images=(0, 2)) for number in range(2)]
    data = [SubjectData(0, [Bucket(samples, cache, dataclasses.replace(of_class, weights=None))])]

    def noising(latents: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"noisy": latents, "weights": torch.ones(len(latents))}

    batches = SubjectBatches(noising, data, PromptTable([""], {"text": torch.zeros(1)}), 2, 1.0, torch.device("cpu"))
    for microbatch in range(10):
        batch = batches(microbatch)
        brightness = (batch["noisy"][:2, :1] + 1) / 2
        expected = brightness / brightness.mean((2, 3), keepdim=True)
        torch.testing.assert_close(batch["pixel_weights"], torch.cat([expected, torch.ones(2, 1, 3, 3)]))


def test_photos_without_a_mask_count_everywhere(tmp_path):
    photos = masked_photos(tmp_path, 0)
    (tmp_path / "1.mask.png").unlink()
    photos = find_photographs(tmp_path, MASKS)
    assert [photo.mask is None for photo in photos] == [False, True]
    args = script.parse_arguments(["--center_crop"])
    cache = encode_photos(BLOCKS, photos, [0, 1], (64, 24), 0, args, torch.device("cpu"))
    assert (
        cache.weights is not None
        and cache.weights[0].std() > 0.1
        and torch.equal(cache.weights[1], torch.ones(1, 3, 8))
    )
    bare = encode_photos(BLOCKS, photos[1:], [0], (64, 24), 0, args, torch.device("cpu"))
    assert bare.weights is None and "pixel_weights" not in bare.of_views([0], 0, torch.device("cpu"))


def test_views_without_the_subject_are_left_out(tmp_path):
    """A crop of only background would have a loss of 0 / 0, and one of a sliver would have all weight on it."""
    array = np.zeros((24, 72), bool)
    array[:, :8] = True
    photo_of(array).save(tmp_path / "a.png")
    photo_of(array).save(tmp_path / "a.mask.png")
    photos = find_photographs(tmp_path, MASKS)
    offsets = [0.0, 0.1, 0.2, 0.9, 1.0]
    args = script.parse_arguments(["--random_flip", "--use_masks"])
    views = photo_views(photos[0], (24, 24), offsets, args)
    assert len(views) == 4 and all(view.companion.any() for view in views)
    assert len(photo_views(photos[0], (24, 24), [0.0, 0.14], args)) == 2  # 7 of 48 pixels further, 1 of 8 is left
    for weight, fails in (("0", True), ("0.1", False)):
        words = ["--use_masks", "--square", "--center_crop", "--resolution", "24", "--mask_background_weight", weight]
        with pytest.raises(InputError, match=r"no crop of .*a\.png contains") if fails else nullcontext():
            check_masks(photos, 0, script.parse_arguments(words), 8)


class Identity:
    """A family whose prediction is the denoiser itself."""

    def predict(self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return denoiser.weight


class Free(torch.nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype))
        self.dtype = dtype


@pytest.mark.parametrize("loss_type", ["l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("background", [0.0, 0.1])
def test_gradients_of_the_background(tmp_path, loss_type, background):
    """Exactly zero if the background has no weight; otherwise scaled by its weight, relative to the subject's."""
    photos = masked_photos(tmp_path, 4)
    args = script.parse_arguments(["--center_crop", "--use_masks", "--mask_background_weight", str(background)])
    cache = encode_photos(BLOCKS, photos, [0, 1], (64, 24), 0, args, torch.device("cpu"))
    weights = cache.of_views([0, 1], 0, torch.device("cpu"))["pixel_weights"]
    covered = (cache.mean[:, :1] + 1) / 2  # the share of each block that is subject
    free = Free((2, 3, 3, 8), torch.float32)
    target = torch.randn(free.weight.shape, generator=torch.Generator().manual_seed(6))
    batch = {"noisy": target, "timesteps": torch.zeros(2), "target": target, "weights": torch.tensor([1.0, 0.5])}
    if loss_type != "l2":
        batch["huber_c"] = torch.tensor([0.3, 0.6])
    family: Any = Identity()

    def gradient(**more: torch.Tensor) -> torch.Tensor:
        loss = denoising_losses(family, free, **batch, **more, loss_type=loss_type).sum()
        return torch.autograd.grad(loss, free.weight)[0]

    plain, masked = gradient(), gradient(pixel_weights=weights)
    none = (covered < 1e-6).expand_as(masked)
    assert none.any() and not none.all()
    if background == 0:
        assert torch.equal(masked[none], torch.zeros_like(masked[none])) and (masked[~none] != 0).all()
    relative = background + (1 - background) * covered
    torch.testing.assert_close(masked, plain * relative / relative.mean((2, 3), keepdim=True), rtol=1e-4, atol=1e-8)
