"""The control signal: an encoded semantic map that is added to the UNet's features after its first convolution.

The encoder is ControlNet's (Zhang et al., ICCV 2023): a few convolutions that downsample an image to the latents' size.
Its last layer is initialized to zero, so training starts at the base model. Unlike ControlNet, no part of the UNet is
copied: the adapted UNet itself learns to follow the map (DeLoRA section 3.1, after OFT).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from delora_diffusers.adapter.modules import unwrap
from delora_diffusers.errors import LOADING_ERRORS, InputError
from delora_diffusers.maps import paint

BLOCK_OUT_CHANNELS = (16, 32, 96, 256)
"""The widths in Stable Diffusion's ControlNets, which halve the map three times; other factors need fewer or more."""

START_GAIN = 1.6
"""Multiplies He initialization, which preserves the activations' size after ReLU: every layer amplifies them by a
third, so the zero-initialized last layer soon has an effect at a learning rate of 1e-4."""


class Control:
    """The control signal of one UNet; created by ``attach_control``.

    Attributes:
        encoder: maps (batch, 3, height, width), 0 to 1, to (batch, channels, height / factor, width / factor).
        palette: (classes, 3) uint8, the colours for index maps; None if the maps are in colour.
        features: what the next forward adds, computed from its maps; None to add nothing.
        strength: scales the features.
    """

    def __init__(self, encoder: nn.Module, palette: np.ndarray | None):
        self.encoder = encoder
        self.palette = palette
        self.features: Tensor | None = None
        self.strength = 1.0

    def see(self, maps: Tensor | None) -> None:
        """Encode maps (batch, 3, height, width), 0 to 1, for the following forwards; None removes the map."""
        self.features = None if maps is None else self.encoder(maps)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.features is None or self.strength == 0:
            return output
        features = self.features if self.strength == 1 else self.features * self.strength
        repeats = len(output) // len(features)  # classifier-free guidance runs every latent twice
        return output + features.repeat(repeats, 1, 1, 1).to(output.dtype)


_ATTACHMENT = "_delora_control"


@dataclasses.dataclass(frozen=True)
class Attachment:
    """The control signal of a UNet and the hook that adds it."""

    control: Control
    handle: RemovableHandle


def new_encoder(unet: nn.Module, factor: int, generator: torch.Generator | None = None) -> nn.Module:
    """A new encoder for a UNet whose latents are ``factor`` times smaller than images; its output is zero.

    Raises:
        InputError: the factor is not a power of two from 2 to 16.
    """
    halvings = int(math.log2(factor))
    if 2**halvings != factor or not 1 <= halvings <= 4:
        raise InputError(f"the autoencoder downsamples by {factor}; use a model with a power of two from 2 to 16.")
    channels = (*BLOCK_OUT_CHANNELS, BLOCK_OUT_CHANNELS[-1])[: halvings + 1]
    with torch.random.fork_rng(devices=[]):
        if generator is not None:
            torch.manual_seed(generator.initial_seed())
        encoder: Any = ControlNetConditioningEmbedding(_width(unet), block_out_channels=channels)
        # Torch's default initialization shrinks activations 16x over five layers; at a rate of 1e-4 little is learned.
        for convolution in (encoder.conv_in, *encoder.blocks):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            convolution.weight.data *= START_GAIN
            nn.init.zeros_(convolution.bias)
        return encoder


def _width(unet: nn.Module) -> int:
    """Channels of the UNet's features after its first convolution."""
    return len(unwrap(unet).get_parameter("conv_in.bias"))


def pretrained_encoder(name_or_path: str, unet: nn.Module, factor: int) -> nn.Module:
    """The encoder of a pretrained ControlNet.

    Raises:
        InputError: it cannot be loaded, or was trained for a different UNet.
    """
    from diffusers import ControlNetModel

    try:
        encoder = ControlNetModel.from_pretrained(name_or_path).controlnet_cond_embedding.float()
    except LOADING_ERRORS as error:
        raise InputError(
            f"--controlnet_model_name_or_path {name_or_path} could not be loaded ({' '.join(str(error).split())}); "
            "give a ControlNet folder or hub id."
        ) from error
    if any(parameter.is_meta for parameter in encoder.parameters()):
        raise InputError(f"--controlnet_model_name_or_path {name_or_path} is not a ControlNet; give one.")
    expected = (3, _width(unet), factor)
    actual = (encoder.conv_in.in_channels, encoder.conv_out.out_channels, 2 ** (len(encoder.blocks) // 2))
    if actual != expected:
        raise InputError(
            f"--controlnet_model_name_or_path {name_or_path} maps {actual[0]} channels to {actual[1]} at 1/{actual[2]} "
            f"of the size, but this model needs {expected[0]} to {expected[1]} at 1/{expected[2]}; choose another."
        )
    return encoder


def saved_encoder(tensors: dict[str, Tensor]) -> nn.Module:
    """The encoder with this state dict.

    Raises:
        InputError: it is not an encoder's.
    """
    widened = [f"blocks.{i}.weight" for i in range(1, len(tensors), 2) if f"blocks.{i}.weight" in tensors]
    try:
        *channels, outputs = (len(tensors[name]) for name in ("conv_in.weight", *widened, "conv_out.weight"))
        with torch.device("meta"):  # without memory, since the sizes are those that a file claims
            encoder = ControlNetConditioningEmbedding(outputs, block_out_channels=tuple(channels))
        encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the control encoder is incomplete or has other shapes ({reason}); save it again.") from error
    return encoder.eval().requires_grad_(False)


def attach_control(unet: nn.Module, encoder: nn.Module, palette: np.ndarray | None = None) -> Control:
    """Make a UNet follow maps, with or without an adapter. Its code and weights stay unchanged.

    Args:
        unet: a ``UNet2DConditionModel``.
        encoder: from ``new_encoder`` or ``pretrained_encoder``.
        palette: see ``Control``.

    Raises:
        InputError: a control signal is already attached.
    """
    unet = unwrap(unet)
    if attached_control(unet) is not None:
        raise InputError("the model already has a control signal attached; call detach_control(model) first.")
    control = Control(encoder, palette)
    handle = unet.get_submodule("conv_in").register_forward_hook(control._add)
    unet.__dict__[_ATTACHMENT] = Attachment(control, handle)
    return control


def attached_control(unet: nn.Module) -> Control | None:
    """The control signal attached to a UNet, or None."""
    attached: Attachment | None = unwrap(unet).__dict__.get(_ATTACHMENT)
    return None if attached is None else attached.control


def detach_control(unet: nn.Module) -> None:
    """Remove the control signal.

    Raises:
        InputError: no control signal is attached.
    """
    if attached_control(unet) is None:
        raise InputError("no control signal is attached to this model; call attach_control or load_control first.")
    unwrap(unet).__dict__.pop(_ATTACHMENT).handle.remove()


def as_signal(maps: Sequence[np.ndarray], palette: np.ndarray | None) -> Tensor:
    """The encoder's input, (maps, 3, height, width), 0 to 1.

    The maps are uint8: class indices (height, width) or colours (height, width, 3). Index 255 is black unless the
    palette has 256 entries.

    Raises:
        InputError: an index map is given without a palette, or has an index outside the palette.
    """
    return torch.from_numpy(np.stack([paint(values, palette) for values in maps])).permute(0, 3, 1, 2).float() / 255
