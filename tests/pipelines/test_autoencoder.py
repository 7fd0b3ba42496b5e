"""Images are encoded and decoded in tiles if they are large or memory runs out, and small ones in batches."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from delora_diffusers.families.loading import open_model
from delora_diffusers.families.sd import FAMILY as SD
from delora_diffusers.pipelines import autoencoder

Failure = Callable[[], RuntimeError]


def out_of_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_autoencoder().state_dict()


def new_autoencoder() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    shape = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    return AutoencoderKL(latent_channels=4, sample_size=64, mid_block_add_attention=False, **blocks, **shape)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def vae(weights):
    """A small autoencoder with random weights whose latents are smaller by the usual factor of 8."""
    model = new_autoencoder()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def smooth_image(side: int, period: int = 64) -> Tensor:
    """Waves (1, 3, side, side). Group norm gives the whole image and each tile of some periods the same statistics."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    phases = [2 * math.pi * (x / period + channel / 3) for channel in range(3)]
    return torch.stack([0.5 * phase.sin() * (2 * math.pi * y / period).cos() for phase in phases])[None]


class Calls:
    """The calls of ``vae.encode`` or ``decode``: the sizes of their batches, and whether they are in tiles.

    Args:
        errors: of the first calls; made then, because an error keeps the frames that it was raised in.
    """

    def __init__(self, vae: Any, name: str, errors: Sequence[Failure] = (), compute: bool = True):
        self.batches: list[int] = []
        self.tiled: list[bool] = []
        self.activations: list[weakref.ref[Tensor]] = []
        self._vae, self._original = vae, getattr(vae, name)
        self._errors, self._compute = list(errors), compute
        setattr(vae, name, self)

    def __call__(self, images: Tensor, **settings: Any) -> Any:
        self.batches.append(len(images))
        self.tiled.append(self._vae.use_tiling)
        assert all(activation() is None for activation in self.activations), "the activations are still in memory"
        if self._errors:
            activation = torch.zeros(8)
            self.activations.append(weakref.ref(activation))
            raise self._errors.pop(0)()
        return self._original(images, **settings) if self._compute else (torch.zeros(len(images), 3, 8, 8),)


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    return autoencoder.encode(SD, vae, pixels)[0]


def decoded(vae: Any, latents: Tensor) -> Tensor:
    return autoencoder.decode(SD, vae, latents)


def test_without_tiles_the_result_is_that_of_the_autoencoder(vae):
    pixels = smooth_image(128).repeat(2, 1, 1, 1) * torch.tensor([1.0, -0.5]).view(2, 1, 1, 1)
    assert torch.equal(encoded(vae, pixels), vae.encode(pixels).latent_dist.mean)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(SD.scale(vae).unscaled(latents), return_dict=False)[0]
    assert torch.equal(autoencoder.decode(SD, vae, latents), expected)
    assert not vae.use_tiling


def relative_difference(tensor: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference in standard deviations of what is expected."""
    assert tensor.shape == expected.shape
    return ((tensor - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.integration
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("large", [False, True], ids=["out of memory", "large"])
def test_tiles_give_almost_the_same(vae, monkeypatch, direction, large):
    """The tiles of a side of 768 pixels are 512 and 384 pixels wide."""
    pixels = smooth_image(768)
    run: Callable[[Any, Tensor], Tensor] = encoded if direction == "encode" else decoded
    given = pixels if direction == "encode" else encoded(vae, pixels) * vae.config.scaling_factor
    expected = run(vae, given)
    if large:
        monkeypatch.setattr(autoencoder, "TILED_FROM", 768)
        calls = Calls(vae, direction)
        tiled = run(vae, given)
        assert calls.tiled == [True]
    else:
        calls = Calls(vae, direction, [out_of_memory])
        tiled = run(vae, given)
        assert calls.tiled == [False, True]
    assert not vae.use_tiling
    # Random weights amplify the seams and the statistics of each tile: 0.03 and 0.13 of a standard deviation.
    assert 0 < relative_difference(tiled, expected) < (0.06 if direction == "encode" else 0.2)
    difference = (tiled - expected).abs()
    assert difference.median() < 0.15 * expected.std()
    monkeypatch.setattr(autoencoder, "TILED_FROM", 769)
    assert torch.equal(run(vae, given), expected)  # the next one is not in tiles


@pytest.mark.integration
def test_tiles_of_a_trained_autoencoder_have_no_seams(monkeypatch):
    """The miniature's latents are smaller by a factor of 4 and not 8."""
    vae = open_model(None).load("vae", torch.float32)
    monkeypatch.setattr(autoencoder, "TILE", 128)
    pixels = smooth_image(192, 96)
    expected = autoencoder.encode(SD, vae, pixels)[0]
    image = autoencoder.decode(SD, vae, SD.scale(vae).scaled(expected))
    monkeypatch.setattr(autoencoder, "TILED_FROM", 0)
    latents = autoencoder.encode(SD, vae, pixels)[0]
    tiled = autoencoder.decode(SD, vae, SD.scale(vae).scaled(expected))
    assert 0 < relative_difference(latents, expected) < 0.06
    assert 0 < relative_difference(tiled, image) < 0.03 and (tiled - image).abs().max() < 0.15


def run_small(vae: Any, direction: str) -> Tensor:
    if direction == "encode":
        return encoded(vae, smooth_image(64))
    return autoencoder.decode(SD, vae, torch.ones(1, 4, 8, 8))


DIRECTIONS = pytest.mark.parametrize("direction", ["encode", "decode"])


@DIRECTIONS
def test_an_image_is_tiled_from_a_side_on(vae, monkeypatch, direction):
    calls = Calls(vae, direction)
    for limit, tiled in ((65, False), (64, True), (63, True)):
        monkeypatch.setattr(autoencoder, "TILED_FROM", limit)
        run_small(vae, direction)
        assert calls.tiled.pop() == tiled and calls.tiled == []
        assert not vae.use_tiling


@DIRECTIONS
@pytest.mark.parametrize(
    "error",
    [
        out_of_memory,
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        lambda: RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_every_error_for_lack_of_memory_is_followed_by_tiles(vae, direction, error):
    expected = run_small(vae, direction)
    calls = Calls(vae, direction, [error])
    tiled = run_small(vae, direction)
    assert tiled.shape == expected.shape and not torch.equal(tiled, expected)  # tiles are half as wide as the image
    assert calls.tiled == [False, True] and not vae.use_tiling


@DIRECTIONS
def test_a_second_error_for_lack_of_memory_is_raised(vae, direction):
    calls = Calls(vae, direction, [out_of_memory, lambda: torch.OutOfMemoryError("again")])
    with pytest.raises(torch.OutOfMemoryError, match="again"):
        run_small(vae, direction)
    assert calls.tiled == [False, True] and not vae.use_tiling


@DIRECTIONS
def test_lack_of_memory_for_tiles_is_raised_at_once(vae, monkeypatch, direction):
    monkeypatch.setattr(autoencoder, "TILED_FROM", 0)
    calls = Calls(vae, direction, [out_of_memory])
    with pytest.raises(torch.OutOfMemoryError):
        run_small(vae, direction)
    assert calls.tiled == [True] and not vae.use_tiling


@DIRECTIONS
def test_other_errors_are_raised_at_once(vae, direction):
    calls = Calls(vae, direction, [lambda: RuntimeError("shapes differ")])
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_small(vae, direction)
    assert calls.tiled == [False]


@pytest.mark.parametrize(
    ("side", "expected"), [(64, [5]), (256, [4, 1]), (264, [3, 2]), (512, [1] * 5), (520, [1] * 5), (1024, [1] * 5)]
)
def test_small_images_are_decoded_together(vae, side, expected):
    """At most as many pixels at once as PIXELS_AT_ONCE."""
    assert autoencoder.PIXELS_AT_ONCE == 512 * 512
    calls = Calls(vae, "decode", compute=False)
    images = autoencoder.decode(SD, vae, torch.zeros(5, 4, side // 8, side // 8))
    assert calls.batches == expected and len(images) == 5


def test_images_that_are_decoded_in_batches_keep_their_order(vae, monkeypatch):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = autoencoder.decode(SD, vae, latents)
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 2 * 64 * 64)
    calls = Calls(vae, "decode")
    torch.testing.assert_close(autoencoder.decode(SD, vae, latents), expected, atol=1e-5, rtol=1e-5)
    assert calls.batches == [2, 2, 1]


def test_only_the_batch_that_does_not_fit_is_decoded_in_tiles(vae, monkeypatch):
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 64 * 64)
    calls = Calls(vae, "decode", [out_of_memory])
    assert len(autoencoder.decode(SD, vae, torch.zeros(3, 4, 8, 8))) == 3
    assert calls.tiled == [False, True, False, False]
