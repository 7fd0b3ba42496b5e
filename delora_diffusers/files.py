"""Save and load adapters: one safetensors file, an entry for each tensor of each adapted module.

The names are ``unet.NAME.delora_A`` and so on (``text_encoder.NAME...`` where it was trained). The header's single
metadata entry, ``delora_diffusers``, is JSON with the format version, the base model and the configurations.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from delora_diffusers.adapter import Adapter
from delora_diffusers.attachment import attach, detach
from delora_diffusers.control import Control, attach_control, saved_encoder
from delora_diffusers.errors import InputError
from delora_diffusers.reading import (
    CONTROL_PREFIX,
    FORMAT_VERSION,
    METADATA_KEY,
    WEIGHTS_NAME,
    adapter_path,
    parse_config,
    read_adapter,
)


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to, moved to ``path`` on success and removed on failure.

    Raises:
        InputError: there is no room on the disk, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written ({error}); free some space or choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike,
    *,
    component: str = "unet",
    text_encoders: Mapping[str, Adapter] | None = None,
    control: Control | None = None,
    base_model: str | None = None,
    pipeline: str | None = None,
    training: dict[str, Any] | None = None,
    subject: int = 0,
) -> Path:
    """Write an adapter to one safetensors file.

    Args:
        adapter: the UNet's adapter, or that of ``component``, which may be ``"transformer"``.
        path: a folder (the file gets the name ``pytorch_delora_weights.safetensors``) or a ``.safetensors`` file.
        text_encoders: their adapters by name, ``text_encoder`` and ``text_encoder_2``, where they were trained.
        control: the control signal that was trained with it; its encoder and palette go into the file.
        base_model: hub id or folder of the model that the adapter belongs to.
        pipeline: class of the base model's pipeline, which tells the formats of other tools what it is.
        training: settings to remember: steps, rates, prompt.
        subject: which one, of an adapter that holds several.

    Returns:
        The file's path. The same adapter always gives the same bytes.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    components = {component: adapter, **(text_encoders or {})}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "config": {name: dataclasses.asdict(part.config) for name, part in components.items()},
    }
    header |= {name: value for name, value in (("pipeline", pipeline), ("training", training)) if value is not None}
    tensors = {
        f"{component}.{name}": tensor.detach().float().cpu().contiguous().clone()
        for component, part in components.items()
        for name, tensor in part.named_tensors(subject)
    }
    if control is not None:
        header["control_encoder"] = {"palette": None if control.palette is None else control.palette.tolist()}
        tensors |= {
            CONTROL_PREFIX + name: tensor.detach().float().cpu().contiguous().clone()
            for name, tensor in control.encoder.state_dict().items()
        }
    with written_whole(file) as temporary:
        # One entry: several would come in an order that changes from one process to the next.
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
    return file


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
