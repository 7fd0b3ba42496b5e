"""The control signal: attached, detached, saved, loaded, and at the start of training."""

import numpy as np
import pytest
import torch

from delora_diffusers import (
    AdapterConfig,
    InputError,
    attach,
    attach_control,
    detach,
    detach_control,
    load_adapter,
    load_control,
    save_adapter,
)
from delora_diffusers.adapter.control import as_signal, attached_control, new_encoder, pretrained_encoder
from delora_diffusers.maps import crop_map
from delora_diffusers.methods.config import MAP_TARGETS
from tests.helpers import randomize


def random_maps(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def randomized(encoder):
    """The encoder with a last layer that is not zero."""
    torch.nn.init.normal_(encoder.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(5))
    return encoder


def test_starts_at_the_base_model_bit_for_bit(unet, unet_inputs):
    with torch.no_grad():
        before = unet(*unet_inputs).sample
        attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), torch.Generator().manual_seed(0))
        attach_control(unet, new_encoder(unet, 8, torch.Generator().manual_seed(0))).see(random_maps())
        assert torch.equal(unet(*unet_inputs).sample, before)


def test_signal_is_added_after_the_first_convolution(unet, unet_inputs):
    control = attach_control(unet, randomized(new_encoder(unet, 8)))
    features = {}
    unet.conv_in.register_forward_hook(lambda module, inputs, output: features.update(output=output))
    with torch.no_grad():
        without = unet(*unet_inputs).sample
        plain = features["output"]
        control.see(random_maps())
        controlled = unet(*unet_inputs).sample
        torch.testing.assert_close(features["output"], plain + control.encoder(random_maps()))
        assert not torch.allclose(controlled, without)
        control.strength = 0
        assert torch.equal(unet(*unet_inputs).sample, without)
    detach_control(unet)
    assert attached_control(unet) is None
    with torch.no_grad():
        assert torch.equal(unet(*unet_inputs).sample, without)
    with pytest.raises(InputError, match="no control signal is attached"):
        detach_control(unet)


def test_guidance_repeats_every_map(unet, unet_inputs):
    control = attach_control(unet, randomized(new_encoder(unet, 8)))
    sample, timestep, text = unet_inputs
    with torch.no_grad():
        control.see(random_maps())
        single = unet(sample, timestep, text).sample
        double = unet(torch.cat([sample] * 2), torch.cat([timestep] * 2), torch.cat([text] * 2)).sample
    torch.testing.assert_close(double, torch.cat([single] * 2), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_encoder_and_the_adapter(unet, unet_inputs):
    adapter = attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), torch.Generator().manual_seed(0))
    control = attach_control(unet, new_encoder(unet, 8))
    control.see(random_maps())
    unet(*unet_inputs).sample.square().mean().backward()
    assert control.encoder.conv_out.weight.grad.abs().max() > 0
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in adapter.named_parameters() if "lambda" not in n
    )
    assert any(name.endswith("ff.net.0.proj") for name in adapter.names)


def test_file_contains_the_encoder_and_the_palette(unet, unet_inputs, tmp_path):
    palette = np.arange(30, dtype=np.uint8).reshape(10, 3)
    adapter = attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), torch.Generator().manual_seed(0))
    randomize(adapter)
    control = attach_control(unet, randomized(new_encoder(unet, 8)), palette)
    save_adapter(adapter, tmp_path, control=control, base_model="x")
    with torch.no_grad():
        control.see(random_maps())
        expected = unet(*unet_inputs).sample
        detach(unet)
        detach_control(unet)
        load_adapter(unet, tmp_path)
        loaded = load_control(unet, tmp_path)
        assert loaded is not None and np.array_equal(loaded.palette, palette)
        loaded.see(random_maps())
        assert torch.equal(unet(*unet_inputs).sample, expected)
    detach(unet)
    detach_control(unet)
    save_adapter(attach(unet, AdapterConfig(rank=4)), tmp_path / "plain")
    assert load_control(unet, tmp_path / "plain") is None


def test_encoder_of_a_pretrained_controlnet(unet, unet_inputs, tmp_path):
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(unet)
    randomized(controlnet.controlnet_cond_embedding)
    controlnet.save_pretrained(tmp_path / "controlnet")
    encoder = pretrained_encoder(str(tmp_path / "controlnet"), unet, 8)
    with torch.no_grad():
        assert torch.equal(encoder(random_maps()), controlnet.controlnet_cond_embedding(random_maps()))
    with pytest.raises(InputError, match="at 1/8 of the size, but this model needs 3 to .* at 1/4"):
        pretrained_encoder(str(tmp_path / "controlnet"), unet, 4)
    with pytest.raises(InputError, match="could not be loaded"):
        pretrained_encoder(str(tmp_path / "nowhere"), unet, 8)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_encoder_downsamples_maps_to_the_latents_size(unet, factor):
    assert new_encoder(unet, factor)(torch.rand(1, 3, 64, 64)).shape[-1] == 64 // factor


def test_index_maps_become_colours():
    palette = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    painted = as_signal([np.array([[0, 1], [255, 1]], np.uint8)], palette)[0]
    assert painted[:, 0, 0].tolist() == [1, 0, 0] and painted[:, 1, 1].tolist() == [0, 0, 1]
    assert painted[:, 1, 0].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="class 2, but the palette has 2"):
        as_signal([np.array([[2]], np.uint8)], palette)
    with pytest.raises(InputError, match="maps in colour"):
        as_signal([np.array([[0]], np.uint8)], None)


def test_maps_are_cropped_as_in_training():
    from PIL import Image

    from data.maps import pair_views

    indices = np.random.default_rng(0).integers(0, 9, (30, 45), dtype=np.uint8)
    image = Image.new("RGB", (45, 30))
    for side in (16, 30, 64):
        assert np.array_equal(crop_map(indices, (side, 20)), pair_views(image, indices, (side, 20), None, False)[0][1])


@pytest.mark.parametrize("missing", ["control_encoder.conv_out.weight", "control_encoder.blocks.0.bias"])
def test_rejects_an_incomplete_encoder(unet, tmp_path, missing):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    adapter = attach(unet, AdapterConfig(rank=4))
    file = save_adapter(adapter, tmp_path, control=attach_control(unet, new_encoder(unet, 8)), base_model="x")
    detach_control(unet)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: t for name, t in load_file(file).items() if name != missing}, file, metadata=metadata)
    with pytest.raises(InputError, match="the control encoder is incomplete"):
        load_control(unet, file)
    assert attached_control(unet) is None
