"""The control signal: on and off a UNet, in a file, and at the start of training."""

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
from delora_diffusers.maps import crop_square
from delora_diffusers.methods.config import MAP_TARGETS
from tests.helpers import randomize


def maps(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def moved(encoder):
    """An encoder that shows something."""
    torch.nn.init.normal_(encoder.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(5))
    return encoder


def test_the_start_is_the_base_model_bit_for_bit(unet, unet_inputs):
    with torch.no_grad():
        before = unet(*unet_inputs).sample
        attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), torch.Generator().manual_seed(0))
        attach_control(unet, new_encoder(unet, 8, torch.Generator().manual_seed(0))).see(maps())
        assert torch.equal(unet(*unet_inputs).sample, before)


def test_the_signal_is_added_after_the_first_convolution(unet, unet_inputs):
    control = attach_control(unet, moved(new_encoder(unet, 8)))
    seen = {}
    unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    with torch.no_grad():
        without = unet(*unet_inputs).sample
        plain = seen["output"]
        control.see(maps())
        followed = unet(*unet_inputs).sample
        torch.testing.assert_close(seen["output"], plain + control.encoder(maps()))
        assert not torch.allclose(followed, without)
        control.strength = 0
        assert torch.equal(unet(*unet_inputs).sample, without)
    detach_control(unet)
    assert attached_control(unet) is None
    with torch.no_grad():
        assert torch.equal(unet(*unet_inputs).sample, without)
    with pytest.raises(InputError, match="no control signal is attached"):
        detach_control(unet)


def test_guidance_sees_every_map_twice(unet, unet_inputs):
    control = attach_control(unet, moved(new_encoder(unet, 8)))
    sample, timestep, text = unet_inputs
    with torch.no_grad():
        control.see(maps())
        once = unet(sample, timestep, text).sample
        twice = unet(torch.cat([sample] * 2), torch.cat([timestep] * 2), torch.cat([text] * 2)).sample
    torch.testing.assert_close(twice, torch.cat([once] * 2), atol=1e-5, rtol=1e-5)


def test_gradients_reach_encoder_and_adapters(unet, unet_inputs):
    adapter = attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), torch.Generator().manual_seed(0))
    control = attach_control(unet, new_encoder(unet, 8))
    control.see(maps())
    unet(*unet_inputs).sample.square().mean().backward()
    assert control.encoder.conv_out.weight.grad.abs().max() > 0
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in adapter.named_parameters() if "lambda" not in n
    )
    assert any(name.endswith("ff.net.2") for name in adapter.names)


def test_a_file_holds_the_encoder_and_the_palette(unet, unet_inputs, tmp_path):
    palette = np.arange(30, dtype=np.uint8).reshape(10, 3)
    adapter = attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), torch.Generator().manual_seed(0))
    randomize(adapter)
    control = attach_control(unet, moved(new_encoder(unet, 8)), palette)
    save_adapter(adapter, tmp_path, control=control, base_model="x")
    with torch.no_grad():
        control.see(maps())
        expected = unet(*unet_inputs).sample
        detach(unet)
        detach_control(unet)
        load_adapter(unet, tmp_path)
        loaded = load_control(unet, tmp_path)
        assert loaded is not None and np.array_equal(loaded.palette, palette)
        loaded.see(maps())
        assert torch.equal(unet(*unet_inputs).sample, expected)
    detach(unet)
    detach_control(unet)
    save_adapter(attach(unet, AdapterConfig(rank=4)), tmp_path / "plain")
    assert load_control(unet, tmp_path / "plain") is None


def test_the_encoder_of_a_pretrained_controlnet(unet, unet_inputs, tmp_path):
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(unet)
    moved(controlnet.controlnet_cond_embedding)
    controlnet.save_pretrained(tmp_path / "controlnet")
    encoder = pretrained_encoder(str(tmp_path / "controlnet"), unet, 8)
    with torch.no_grad():
        assert torch.equal(encoder(maps()), controlnet.controlnet_cond_embedding(maps()))
    with pytest.raises(InputError, match="at 1/8 of the size, but this model needs 3 to .* at 1/4"):
        pretrained_encoder(str(tmp_path / "controlnet"), unet, 4)
    with pytest.raises(InputError, match="could not be loaded"):
        pretrained_encoder(str(tmp_path / "nowhere"), unet, 8)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_maps_are_brought_to_the_latents_size(unet, factor):
    assert new_encoder(unet, factor)(torch.rand(1, 3, 64, 64)).shape[-1] == 64 // factor


def test_index_maps_are_painted():
    palette = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    painted = as_signal([np.array([[0, 1], [255, 1]], np.uint8)], palette)[0]
    assert painted[:, 0, 0].tolist() == [1, 0, 0] and painted[:, 1, 1].tolist() == [0, 0, 1]
    assert painted[:, 1, 0].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="class 2, but the palette has 2"):
        as_signal([np.array([[2]], np.uint8)], palette)
    with pytest.raises(InputError, match="maps in colour"):
        as_signal([np.array([[0]], np.uint8)], None)


def test_a_map_is_fitted_as_in_training():
    from PIL import Image

    from data.maps import pair_views

    one = np.random.default_rng(0).integers(0, 9, (30, 45), dtype=np.uint8)
    picture = Image.new("RGB", (45, 30))
    for side in (16, 30, 64):
        assert np.array_equal(crop_square(one, side), pair_views(picture, one, side, None, False)[0][1])


@pytest.mark.parametrize("lost", ["control_encoder.conv_out.weight", "control_encoder.blocks.0.bias"])
def test_a_file_whose_encoder_is_not_whole(unet, tmp_path, lost):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    adapter = attach(unet, AdapterConfig(rank=4))
    file = save_adapter(adapter, tmp_path, control=attach_control(unet, new_encoder(unet, 8)), base_model="x")
    detach_control(unet)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: t for name, t in load_file(file).items() if name != lost}, file, metadata=metadata)
    with pytest.raises(InputError, match="holds a control encoder that is not whole"):
        load_control(unet, file)
    assert attached_control(unet) is None
