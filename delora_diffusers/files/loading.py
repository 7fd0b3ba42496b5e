"""Load saved adapters and control signals into a model."""

import os

import numpy as np
import torch
from torch import Tensor, nn

from delora_diffusers.adapter.attach import attach
from delora_diffusers.adapter.control import Control, attach_control, saved_encoder
from delora_diffusers.adapter.detach import detach
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError
from delora_diffusers.files.reading import CONTROL_PREFIX, adapter_path, parse_config, read_adapter


def load_adapter(model: nn.Module, path: str | os.PathLike, component: str = "unet") -> Adapter:
    """Attach a saved adapter to a model.

    Args:
        model: the model that the component belongs to; left as it was when the file is refused.
        path: the file, or the output folder that holds it.
        component: ``"unet"`` or ``"text_encoder"``.

    Raises:
        InputError: the file is not an adapter, is truncated, holds NaN, has a newer format version, or was made for
            another architecture (naming the first key that does not fit, and both shapes).
    """
    file = adapter_path(path)
    header, tensors = read_adapter(file)
    if component not in header["config"]:
        raise InputError(f"{file} holds no {component}; it has {', '.join(header['config'])}.")
    prefix = component + "."
    saved = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{file} holds values that are not finite in {prefix}{name}; train again from a checkpoint."
            )
    config = parse_config(file, header["config"][component])
    saved = _named_as_here(saved, model)
    adapter = attach(model, config, torch.Generator())
    try:
        _copy_into(adapter, saved, f"{file} was made for another architecture than this {type(model).__name__}", prefix)
    except InputError:
        detach(model)
        raise
    return adapter


def load_control(unet: nn.Module, path: str | os.PathLike) -> Control | None:
    """Attach the control signal of a saved adapter to a UNet; None where the adapter has none.

    Raises:
        InputError: the file is not an adapter, or its encoder does not fit the UNet.
    """
    file = adapter_path(path)
    header, tensors = read_adapter(file)
    if "control_encoder" not in header:
        return None
    saved = {n.removeprefix(CONTROL_PREFIX): t for n, t in tensors.items() if n.startswith(CONTROL_PREFIX)}
    try:
        encoder = saved_encoder(saved)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} holds a control encoder that is not whole ({reason}); save it again.") from error
    there, here = encoder.get_parameter("conv_out.bias").shape, unet.get_parameter("conv_in.bias").shape
    if there != here:
        raise InputError(
            f"{file} was made for another UNet: its control encoder gives {there[0]}, not {here[0]} channels."
        )
    palette = header["control_encoder"]["palette"]
    return attach_control(unet, encoder, None if palette is None else np.array(palette, np.uint8))


def _named_as_here(saved: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """With the names of this model: CLIP's text encoder has a ``text_model`` in it or not, by transformers' version."""
    outer = "text_model."
    if any(name.startswith(outer) for name, _ in model.named_modules()):
        return {name if name.startswith(outer) else outer + name: tensor for name, tensor in saved.items()}
    return {name.removeprefix(outer): tensor for name, tensor in saved.items()}


@torch.no_grad()
def _copy_into(adapter: Adapter, saved: dict[str, Tensor], refusal: str, prefix: str) -> None:
    here = dict(adapter.named_tensors())
    for name in sorted(saved.keys() | here.keys()):
        there_shape = tuple(saved[name].shape) if name in saved else "missing"
        here_shape = tuple(here[name].shape) if name in here else "missing"
        if there_shape != here_shape:
            raise InputError(f"{refusal}: {prefix}{name} is {there_shape} in the file and {here_shape} in the model.")
    for name, tensor in saved.items():
        here[name].copy_(tensor)
