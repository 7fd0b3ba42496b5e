"""Load saved adapters and control signals into a model."""

import dataclasses
import os

import numpy as np
import torch
from torch import Tensor, nn

from delora_diffusers.adapter.attach import attach
from delora_diffusers.adapter.control import Control, attach_control, saved_encoder
from delora_diffusers.adapter.detach import detach
from delora_diffusers.adapter.modules import named_modules, unwrap
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError
from delora_diffusers.files.reading import CONTROL_PREFIX, adapter_path, parse_config, read_adapter


def load_adapter(model: nn.Module, path: str | os.PathLike, component: str = "unet") -> Adapter:
    """Attach a saved adapter to a model.

    Args:
        model: the model to adapt; left unchanged if the file is rejected.
        path: the file, the output folder that contains it, or a hub id.
        component: the part of the file to load: ``"unet"``, ``"transformer"``, ``"text_encoder"`` or
            ``"text_encoder_2"``.

    Raises:
        InputError: the file is not an adapter, is truncated, contains NaN, has a newer format version, or was trained
            for another architecture (the message gives the first key that does not fit and both shapes).
    """
    file = adapter_path(path)
    header, tensors = read_adapter(file)
    if component not in header["config"]:
        raise InputError(f"{file} has no {component}; choose from {', '.join(header['config'])}.")
    prefix = component + "."
    saved = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    config = parse_config(file, header["config"][component])
    if config.path == "fast" and any(is_quantized(module) for module in unwrap(model).modules()):
        config = dataclasses.replace(config, path="auto")  # how it was trained does not matter to the file's tensors
    saved = match_names(saved, model)
    adapter = attach(model, config, torch.Generator())
    try:
        mismatch = f"{file} was trained for a different architecture than this {type(model).__name__}"
        _copy_into(adapter, saved, mismatch, prefix)
    except InputError:
        detach(model)
        raise
    return adapter


def load_control(unet: nn.Module, path: str | os.PathLike) -> Control | None:
    """Attach the control signal of a saved adapter to a UNet; None if the adapter has none.

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
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    saved_width, width = (
        len(m.get_parameter(name)) for m, name in ((encoder, "conv_out.bias"), (unwrap(unet), "conv_in.bias"))
    )
    if saved_width != width:
        raise InputError(
            f"{file} was trained for another UNet: its control encoder outputs {saved_width} channels, not {width}; "
            "use the adapter's base model."
        )
    palette = header["control_encoder"]["palette"]
    return attach_control(unet, encoder, None if palette is None else np.array(palette, np.uint8))


def match_names(saved: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Match this model's names: whether CLIP's have the prefix ``text_model`` depends on transformers' version."""
    outer = "text_model."
    if any(name.startswith(outer) for name, _ in named_modules(model)):
        return {name if name.startswith(outer) else outer + name: tensor for name, tensor in saved.items()}
    return {name.removeprefix(outer): tensor for name, tensor in saved.items()}


@torch.no_grad()
def _copy_into(adapter: Adapter, saved: dict[str, Tensor], mismatch: str, prefix: str) -> None:
    current = dict(adapter.named_tensors())
    for name in sorted(saved.keys() | current.keys()):
        file_shape = tuple(saved[name].shape) if name in saved else "missing"
        model_shape = tuple(current[name].shape) if name in current else "missing"
        if file_shape != model_shape:
            raise InputError(
                f"{mismatch}: {prefix}{name} is {file_shape} in the file and {model_shape} in the model; "
                "use the adapter's base model."
            )
    for name, tensor in saved.items():
        current[name].copy_(tensor)
