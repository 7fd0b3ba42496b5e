"""Aspect-ratio buckets: the order in which samples are seen, and runs on photos and maps of several shapes."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import train_controlnet_map2img as maps_script
import train_dreambooth_delora as script
from data.concepts import Concept
from data.photographs import find_photographs
from data.tiny_sd import write
from delora_diffusers.crops import scaled_size, views_of
from delora_diffusers.families.latents import LatentScale
from delora_diffusers.families.loading import open_model
from delora_diffusers.names import CONFIG_NAME, WEIGHTS_NAME
from delora_diffusers.training import order
from delora_diffusers.training.batches import Bucket, MapBatches, Sample, SubjectBatches, SubjectData
from delora_diffusers.training.encoding import LatentCache, PromptTable
from delora_diffusers.training.objective import Losses
from delora_diffusers.training.photos import encode_concepts
from tests.helpers import PALETTE, map_flags, training_flags

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)
SHAPES = [(96, 64), (64, 96), (80, 80), (120, 72), (144, 40)]
"""Of photos."""
OF_32 = [(40, 24), (24, 40), (32, 32), (40, 24), (64, 16)]
"""Their buckets at 32 pixels in steps of 8, by hand: 32 * 32 / 24 = 42.7, of which 40 is a multiple of 8."""


@given(SIZES, st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_every_sample_is_seen_equally_often_in_each_round(sizes, batch_size, seed, round_number):
    microbatches = range(round_number * sum(sizes), (round_number + 1) * sum(sizes))
    seen = Counter()
    for microbatch in microbatches:
        bucket, position = order.bucket_of(seed, microbatch, sizes)
        rows = order.sample_indices(seed, position, batch_size, sizes[bucket])
        seen.update((bucket, row) for row in rows)
    assert seen == {(bucket, row): batch_size for bucket, size in enumerate(sizes) for row in range(size)}


@given(SIZES, st.integers(0, 99), st.permutations(range(40)))
def test_the_bucket_is_a_function_of_seed_and_index(sizes, seed, microbatches):
    """The micro-batches of a bucket are counted without a gap, in whatever order they are asked for."""
    asked = {microbatch: order.bucket_of(seed, microbatch, sizes) for microbatch in microbatches}
    counts = [0] * len(sizes)
    for microbatch in sorted(asked):
        bucket, position = asked[microbatch]
        assert position == counts[bucket]
        counts[bucket] += 1
    examples = order.first_of_buckets(seed, sizes)
    assert len(examples) == (len(sizes) if len(sizes) > 1 else 0)
    assert all(asked.get(m, order.bucket_of(seed, m, sizes))[1] == 0 for m in examples)


@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 999))
def test_a_single_bucket_has_the_order_that_it_always_had(size, seed, microbatch):
    assert order.bucket_of(seed, microbatch, [size]) == (0, microbatch)
    assert order.first_of_buckets(seed, [size]) == []


def test_rounds_differ_and_buckets_are_mixed():
    rounds = [tuple(order.bucket_of(0, r * 8 + m, [4, 4])[0] for m in range(8)) for r in range(6)]
    assert len(set(rounds)) > 3 and all(list(r) != sorted(r) for r in rounds[:2])


def noising(latents: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"noisy": latents, "weights": torch.ones(len(latents))}


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_batches_are_of_one_bucket(sizes, batch_size, prior, seed):
    """Latents say their bucket and photo, with prior preservation also those of the class images."""

    def bucket(number: int, size: int) -> Bucket:
        shape = (1, 2 + number, 1)
        latents = [torch.full(shape, 100.0 * number + image) for image in range(size)]
        latents += [torch.full(shape, -100.0 * number - image - 1) for image in range(3)]
        parts = [torch.stack(latents[:size]), torch.stack(latents[size:])]
        caches = [LatentCache(m, torch.zeros_like(m), list(range(len(m) + 1)), LatentScale()) for m in parts]
        samples = [Sample(image, ("a",), "b", class_images=((0, 1), (1, 2))[image % 2]) for image in range(size)]
        return Bucket(samples, caches[0], caches[1] if prior else None)

    table = PromptTable(["a", "b"], {"texts": torch.arange(2)})
    data = [SubjectData(seed, [bucket(number, size) for number, size in enumerate(sizes)])]
    batches = SubjectBatches(noising, data, table, batch_size, 1.0, CPU)
    seen = Counter()
    for microbatch in range(sum(sizes)):
        batch = batches(microbatch)
        rows = batch["noisy"]
        assert rows.shape == (batch_size * (1 + prior), 1, rows.shape[2], 1)
        number = rows.shape[2] - 2
        seen.update(rows[:batch_size, 0, 0, 0].tolist())
        images = (rows[:, 0, 0, 0].abs() - 100 * number).tolist()
        for image, of_class in zip(
            images, images[batch_size:]
        ):  # the first concept has one class image, the second two
            assert of_class - 1 in ((1, 2) if image % 2 else (0,))
        assert batch["texts"].tolist() == [0] * batch_size + [1] * batch_size * prior
    assert set(seen.values()) == {batch_size} and len(seen) == sum(sizes)
    examples = sorted(batches(microbatch)["noisy"].shape[2] - 2 for microbatch in batches.examples)
    assert examples == (list(range(len(sizes))) if len(sizes) > 1 else [])


def write_shapes(folder: Path, shapes: Sequence[tuple[int, int]] = SHAPES) -> Path:
    """Photos whose red and green are their number and shape."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    for number, (width, height) in enumerate(shapes):
        y, x = np.mgrid[:height, :width]
        image = np.stack([x * 200 / width, y * 200 / height, np.full(x.shape, 50.0 * (number % 5))], -1)
        image += random.uniform(0, 20, image.shape)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "photos")


def parsed(*flags: object) -> Any:
    return script.parse_arguments([str(flag) for flag in ("--bucket_step", 8, *flags)])


def test_each_photo_is_at_each_resolution_and_as_often_as_its_concept_asks(tiny_sd, photos):
    model = open_model(str(tiny_sd))
    model.load("vae", torch.float32)
    found = find_photographs(photos)
    concepts = [Concept(found[:2], photos, "a", repeats=2, weight=0.5), Concept(found[2:], photos, "b")]
    args = parsed("--resolution", 48, 32, 32, "--center_crop")
    assert args.resolutions == [32, 48] and args.resolution == 48
    buckets = encode_concepts(model, concepts, [(f"{n}",) for n in range(5)], None, 0, args, CPU)
    seen = Counter()
    for bucket in buckets:
        height, width = (8 * side for side in bucket.latents.mean.shape[2:])
        assert len(bucket.latents) == len({sample.image for sample in bucket.samples})
        for sample in bucket.samples:
            seen[sample.prompts, 32 if width * height <= 32 * 32 else 48] += 1
            assert sample.weight == (0.5 if sample.prompts in {("0",), ("1",)} else 1.0)
    assert seen == {((f"{n}",), side): 2 if n < 2 else 1 for n in range(5) for side in (32, 48)}
    at_32 = encode_concepts(model, concepts, [("",)] * 5, None, 0, parsed("--resolution", 32), CPU)
    shapes = [tuple(8 * side for side in bucket.latents.mean.shape[:1:-1]) for bucket in at_32]
    assert shapes == list(dict.fromkeys(OF_32))
    square = encode_concepts(model, concepts, [("",)] * 5, None, 0, parsed("--resolution", 32, "--square"), CPU)
    assert [bucket.latents.mean.shape[2:] for bucket in square] == [(4, 4)]
    coarse = encode_concepts(
        model, concepts, [("",)] * 5, None, 0, parsed("--resolution", 32, "--bucket_step", 64), CPU
    )
    assert len(coarse) == 1


def test_class_images_go_to_the_bucket_of_their_shape(tiny_sd, photos, tmp_path):
    """Or all of them to a bucket that has none; and a sample has those of its concept only."""
    model = open_model(str(tiny_sd))
    model.load("vae", torch.float32)
    wide = find_photographs(write_shapes(tmp_path / "wide", [(40, 24), (44, 26), (40, 23)]))
    square = find_photographs(write_shapes(tmp_path / "square", [(32, 32)]))
    found = find_photographs(photos)
    concepts = [Concept([found[0], found[2]], photos, "a"), Concept([found[3]], photos, "b")]
    args = parsed("--resolution", 32, "--center_crop")
    prompts = [("a",), ("a",), ("b",)]
    encoded = encode_concepts(model, concepts, prompts, [[*wide[:2], *square], wide[1:]], 0, args, CPU)
    by_shape = {tuple(bucket.latents.mean.shape[2:]): bucket for bucket in encoded}
    assert list(by_shape) == [(3, 5), (4, 4)]
    landscape = by_shape[3, 5]
    assert landscape.class_latents is not None and landscape.class_latents.mean.shape == (4, 4, 3, 5)
    assert [sample.class_images for sample in landscape.samples] == [(0, 2), (2, 2)]
    assert by_shape[4, 4].class_latents is not None and len(by_shape[4, 4].class_latents) == 1
    alone = encode_concepts(model, concepts[:1], prompts[:2], [wide], 0, args, CPU)
    assert [len(bucket.class_latents or ()) for bucket in alone] == [3, 3]


@given(st.integers(24, 60), st.integers(0, 4), st.floats(0, 1))
def test_sizes_say_where_a_view_is(width, extra, offset):
    """The crop's corner is that in the scaled image, or in its mirror image."""
    y, x = np.mgrid[: 24 + extra, :width]
    image = np.stack([x * 4, y * 4, x * 0], -1).astype(np.uint8)
    for view in views_of(Image.fromarray(image), (24, 24 + extra), [offset], flip=True):
        height, full_width, top, left, view_height, view_width = view.sizes
        assert (height, full_width, view_height, view_width) == (24 + extra, width, 24 + extra, 24)
        mirrored = view.image[0, 0, 0] > view.image[0, -1, 0]
        shown = (image[:, ::-1] if mirrored else image)[top : top + view_height, left : left + view_width]
        np.testing.assert_array_equal(view.image, shown)


def recorded_batches(flags: list[str], monkeypatch: pytest.MonkeyPatch, main: Any = script.main) -> list[Any]:
    """The inputs of the losses of each micro-batch of a run."""
    records: list[Any] = []
    call = Losses.__call__

    def recording(self: Losses, **batch: torch.Tensor) -> torch.Tensor:
        records.append(dict(batch))
        return call(self, **batch)

    with monkeypatch.context() as patch:
        patch.setattr(Losses, "__call__", recording)
        main(flags)
    return records


@pytest.mark.integration
def test_xl_is_told_the_true_sizes(photos, tmp_path, monkeypatch):
    """Those of the photos of the bucket, of crops that lie in the scaled photo, and of the latents."""
    model = write(tmp_path / "xl", kind="sdxl")
    more = ("--bucket_step", 8, "--train_batch_size", 2, "--random_flip", "--max_train_steps", 5)
    prior = ("--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 4)
    flags = training_flags(model, photos, tmp_path / "out", *more, *prior, "--validation_inference_steps", 1)
    bucket_of_shape = dict(zip(SHAPES, OF_32))
    seen = Counter()
    for batch in recorded_batches(flags, monkeypatch):
        sizes = batch["time_ids"]
        assert sizes.shape == (4, 6)
        height, width = (8 * side for side in batch["noisy"].shape[2:])
        assert (sizes[:, 4:] == torch.tensor([height, width])).all()
        for full_height, full_width, top, left, _, _ in sizes[:2].tolist():
            assert bucket_of_shape[full_width, full_height] == (width, height)
            scaled = scaled_size((full_width, full_height), (width, height))
            assert 0 <= left <= scaled[0] - width and 0 <= top <= scaled[1] - height
            seen[full_width, full_height] += 1
        assert all((w, h) in OF_32 for h, w in sizes[2:, :2].tolist())  # class images, generated at buckets' sizes
    assert seen == dict.fromkeys(SHAPES, 2)
    images = sorted((tmp_path / "out" / "class_images").glob("*.png"))
    assert [Image.open(image).size for image in images] == [(40, 24), (40, 24), (24, 40), (32, 32)]


@pytest.mark.integration
def test_validation_and_generated_images_of_other_shapes(tiny_sd, photos, tmp_path):
    from delora_diffusers.__main__ import main

    validation = ("--validation_prompt", "a toy", "--validation_width", 48, "--validation_height", 24)
    few = ("--num_validation_images", 1, "--validation_inference_steps", 1, "--max_train_steps", 2)
    out = tmp_path / "out"
    script.main(training_flags(tiny_sd, photos, out, "--bucket_step", 8, *validation, *few))
    assert Image.open(out / "samples" / "00.png").size == (48, 24)
    words = ["generate", "--adapter", out, "--prompt", "a toy", "--num_inference_steps", 1, "--resolution", 32]
    for sides, size in ((["--width", 24, "--height", 40], (24, 40)), (["--width", 64], (64, 32)), ([], (32, 32))):
        folder = tmp_path / "x".join(map(str, size))
        main([str(word) for word in [*words, "--num_images", 1, *sides, "--output_dir", folder]])
        records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [Image.open(folder / record["file_name"]).size for record in records] == [size]


def trained(flags: list[str], out: Path) -> bytes:
    script.main(flags)
    return (out / WEIGHTS_NAME).read_bytes()


@pytest.mark.integration
def test_square_photos_train_alike_with_and_without_buckets(tiny_sd, tmp_path):
    folder = write_shapes(tmp_path / "square", [(64, 64), (40, 40), (33, 33)])
    more = ("--random_flip", "--train_batch_size", 2, "--bucket_step", 8, "--max_train_steps", 3)
    flags = [training_flags(tiny_sd, folder, tmp_path / name, *more) for name in "ab"]
    assert trained(flags[0], tmp_path / "a") == trained([*flags[1], "--square"], tmp_path / "b")


@pytest.mark.integration
def test_a_run_from_before_buckets_goes_on_with_squares(tiny_sd, photos, tmp_path):
    """And one with buckets goes on with buckets."""
    more = ("--checkpointing_steps", 2, "--train_batch_size", 2, "--bucket_step", 8)
    expected = {}
    for name, square in (("square", ["--square"]), ("buckets", [])):
        out = tmp_path / name
        flags = training_flags(tiny_sd, photos, out, *more)
        expected[name] = trained([*flags, *square, "--max_train_steps", "4"], out)
        other = shutil.copytree(out, tmp_path / f"{name} again")
        shutil.rmtree(other / "checkpoint-4")
        (other / WEIGHTS_NAME).unlink()
        config = json.loads((other / CONFIG_NAME).read_text())
        if square:
            for key in ("square", "bucket_step", "resolutions"):
                del config["arguments"][key]
        (other / CONFIG_NAME).write_text(json.dumps(config))
        resumed = training_flags(tiny_sd, photos, other, *more, "--resume_from_checkpoint", "latest")
        assert trained([*resumed, "--max_train_steps", "4"], other) == expected[name]
    assert expected["square"] != expected["buckets"]


def write_pairs(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Images painted in the colours of their maps, of exactly the sizes of their buckets."""
    for part in ("images", "maps"):
        (folder / part).mkdir(parents=True)
    for number, size in enumerate(sizes):
        blocks = np.random.default_rng(number).integers(0, 6, (3, 4), dtype=np.uint8)
        indices = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))
        Image.fromarray(PALETTE[indices]).save(folder / "images" / f"{number}.png")
        Image.fromarray(indices).save(folder / "maps" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"scene {number}")
    return folder


@pytest.mark.integration
def test_maps_of_several_shapes(tiny_sd, tmp_path, monkeypatch):
    """Each shard has one size, and in it every latent is that of the image painted in the colours of its map, also in
    mirror images and in the batches of training."""
    pairs = write_pairs(tmp_path / "pairs", OF_32)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        batches: list[Any] = []
        call = MapBatches.__call__
        patch.setattr(MapBatches, "__call__", lambda self, m: batches.append(call(self, m)) or batches[-1])
        flags = map_flags(tiny_sd, pairs, out, "--bucket_step", 8, "--max_train_steps", 5, "--num_validation_images", 4)
        maps_script.main(flags)
    model = open_model(str(tiny_sd))
    vae = model.load("vae", torch.float32)
    shards = sorted((out / "cache").glob("*/shard-*.safetensors"))
    assert len(shards) == 4
    count = 0
    for shard in shards:
        tensors = load_file(shard)
        maps = tensors["maps"]
        assert tuple(8 * side for side in tensors["mean"].shape[2:]) == maps.shape[1:]
        painted = torch.from_numpy(PALETTE[maps.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            expected = vae.encode(painted).latent_dist.mean
        torch.testing.assert_close(tensors["mean"], expected, rtol=1e-4, atol=1e-4)
        count += len(maps)
    assert count == 2 * len(OF_32)
    shapes = Counter(tuple(8 * side for side in batch["noisy"].shape[:1:-1]) for batch in batches)
    assert shapes == Counter(OF_32)
    assert all(batch["maps"].shape[2:] == tuple(8 * side for side in batch["noisy"].shape[2:]) for batch in batches)
    with Image.open(out / "validation" / "step-000005.png") as grid:
        assert grid.height > 4 * 32
