"""Save and load adapters: one safetensors file, an entry for each tensor of each adapted module.

The names are ``unet.NAME.delora_A`` and so on (``text_encoder.NAME...`` where it was trained). The header's single
metadata entry, ``delora_diffusers``, is JSON with the format version, the base model and the configurations.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from delora_diffusers.adapter import Adapter
from delora_diffusers.attachment import attach, detach
from delora_diffusers.config import AdapterConfig
from delora_diffusers.control import Control, attach_control, saved_encoder
from delora_diffusers.errors import InputError

WEIGHTS_NAME = "pytorch_delora_weights.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "delora_diffusers"
CONTROL_PREFIX = "control_encoder."


def adapter_path(path: str | os.PathLike) -> Path:
    """The adapter file that a path means: the file itself, or the one in an output folder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no adapter at {file}; give an output folder of the training script or a .safetensors file.")
    return file


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
    text_encoder: Adapter | None = None,
    control: Control | None = None,
    base_model: str | None = None,
    subject: int = 0,
) -> Path:
    """Write an adapter to one safetensors file.

    Args:
        adapter: the UNet's adapter.
        path: a folder (the file gets the name ``pytorch_delora_weights.safetensors``) or a ``.safetensors`` file.
        text_encoder: the text encoder's adapter, where one was trained.
        control: the control signal that was trained with it; its encoder and palette go into the file.
        base_model: hub id or folder of the model that the adapter belongs to.
        subject: which one, of an adapter that holds several.

    Returns:
        The file's path. The same adapter always gives the same bytes.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    components = {"unet": adapter} | ({"text_encoder": text_encoder} if text_encoder is not None else {})
    header = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "config": {name: dataclasses.asdict(part.config) for name, part in components.items()},
    }
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


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """What an adapter file says of itself: ``format_version``, ``base_model``, ``config`` by component.

    Raises:
        InputError: the file is missing, is not an adapter, is truncated or has a newer format version.
    """
    return read_adapter(adapter_path(path), tensors=False)[0]


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
    config = _config(file, header["config"][component])
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
    encoder = saved_encoder(saved)
    there, here = encoder.get_parameter("conv_out.bias").shape, unet.get_parameter("conv_in.bias").shape
    if there != here:
        raise InputError(
            f"{file} was made for another UNet: its control encoder gives {there[0]}, not {here[0]} channels."
        )
    palette = header["control_encoder"]["palette"]
    return attach_control(unet, encoder, None if palette is None else np.array(palette, np.uint8))


def _config(file: Path, values: dict[str, Any]) -> AdapterConfig:
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{file} has a setting this version does not know, {unknown[0]}; update delora-diffusers.")
    return AdapterConfig(**values)


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


def read_adapter(file: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header (see ``read_header``) and, if wanted, all tensors by name."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            loaded = {name: opened.get_tensor(name) for name in opened.keys()} if tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        what = "is truncated" if "incomplete" in str(error).lower() else "is not a safetensors file"
        raise InputError(f"{file} {what} ({error}); save or download it again.") from error
    try:
        header = json.loads(metadata[METADATA_KEY])
        version = header["format_version"]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{file} is a safetensors file, but not an adapter saved by delora-diffusers; give one that is."
        ) from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version}, newer than {FORMAT_VERSION}, the newest that this version reads; "
            "update delora-diffusers."
        )
    return header, loaded
