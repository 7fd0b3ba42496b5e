"""Read adapter files, trusting nothing in them: what is not an adapter is refused in one sentence."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import method_functions
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import WEIGHTS_NAME, may_be_hub_id

FORMAT_VERSION = 1
METADATA_KEY = "delora_diffusers"
CONTROL_PREFIX = "control_encoder."
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
MOST_HEADER_BYTES = 8 * 2**20
"""An adapter of SDXL's attention has a header of 0.6 MB."""


def adapter_path(path: str | os.PathLike) -> Path:
    """The adapter file that a path or hub id means: the file itself, the one in an output folder, the one on the hub.

    Raises:
        InputError: there is none.
    """
    local = Path(path)
    if not local.exists() and "/" in str(path) and may_be_hub_id(str(path)):
        return _from_hub(str(path))
    file = local / WEIGHTS_NAME if local.is_dir() else local
    if not file.is_file():
        raise InputError(f"no adapter at {file}; give an output folder of the training script or a .safetensors file.")
    return file


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, WEIGHTS_NAME))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"no adapter at {repo_id}, neither a folder here nor {WEIGHTS_NAME} on the hub "
            f"({' '.join(str(error).split())[:200]}); check the name."
        ) from error


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """What an adapter file says of itself: ``format_version``, ``base_model``, ``config`` by component.

    Raises:
        InputError: the file is missing, is not an adapter, is truncated or has a newer format version.
    """
    return read_adapter(adapter_path(path), tensors=False)[0]


def read_tensors(file: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and, if wanted, all tensors of a safetensors file.

    Raises:
        InputError: it is not one, is truncated, has a name twice, or holds what is no float or is empty.
    """
    _check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            for name in names:
                piece = opened.get_slice(name)
                if piece.get_dtype() not in ("F32", "F16", "BF16"):
                    raise InputError(f"{file} holds {name} as {piece.get_dtype()}; an adapter holds floats.")
                if 0 in piece.get_shape():
                    raise InputError(f"{file} holds nothing in {name}, whose shape is {tuple(piece.get_shape())}.")
            loaded = {name: opened.get_tensor(name) for name in names} if tensors else {}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        what = "is truncated" if "incomplete" in str(error).lower() else "is not a safetensors file"
        raise InputError(f"{file} {what} ({error}); save or download it again.") from error
    return metadata, loaded


def _check_header(file: Path) -> None:
    """The length and the names of the header, before anything is made of them."""
    refusal = f"{file} is not a safetensors file (%s); save or download it again."
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        there = file.stat().st_size - 8
        if there < 2:
            raise InputError(f"{file} is truncated (it has {max(there + 8, 0)} bytes); save or download it again.")
        if size > MOST_HEADER_BYTES and size <= there:
            raise InputError(f"{file} has a header of {size / 2**20:.0f} MiB, far more than an adapter's; refused.")
        if size > there:
            raise InputError(refusal % f"its header would have {size} bytes of {there}")
        header = stream.read(size)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise InputError(f"{file} has {next(n for n in names if names.count(n) > 1)} twice; refused.")
        return found

    try:
        json.loads(header, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(refusal % f"its header is not JSON: {str(error)[:100]}") from error


def read_adapter(file: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header (see ``read_header``) and, if wanted, all tensors by name, checked against the header.

    Raises:
        InputError: see ``read_tensors``; or the header is no adapter's, or the tensors are not those that it announces.
    """
    metadata, loaded = read_tensors(file, tensors)
    try:
        header = json.loads(metadata[METADATA_KEY])
        version, configs = header["format_version"], header["config"]
        right = isinstance(version, int) and isinstance(configs, dict) and bool(configs)
        right = right and isinstance(header["base_model"], str | None)
        right = right and isinstance(header.get("pipeline"), str | None)
        right = right and isinstance(header.get("training", {}), dict)
        right = right and isinstance(header.get("control_encoder", {"palette": None})["palette"], list | None)
    except (KeyError, ValueError, TypeError, RecursionError):
        right = False
    if not right:
        raise InputError(
            f"{file} is a safetensors file, but not an adapter saved by delora-diffusers; give one that is."
        )
    if version > FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version}, newer than {FORMAT_VERSION}, the newest that this version reads; "
            "update delora-diffusers."
        )
    for component in configs:
        if component not in COMPONENTS:
            raise InputError(f"{file} has a component {component!r}; it may be {', '.join(COMPONENTS)}.")
    if tensors:
        _check_tensors(file, header, loaded)
    return header, loaded


def parse_config(file: Path, values: Any) -> AdapterConfig:
    """The configuration in a header.

    Raises:
        InputError: it has settings that are unknown or wrong.
    """
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    unknown = sorted(set(values) - known) if isinstance(values, dict) else ["config"]
    if unknown:
        raise InputError(f"{file} has a setting this version does not know, {unknown[0]}; update delora-diffusers.")
    try:
        return AdapterConfig(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{file} has settings that are not right ({error}); save it again.") from error


def _check_tensors(file: Path, header: dict[str, Any], loaded: dict[str, Tensor]) -> None:
    """Every tensor belongs to an announced component, and a module has the tensors of its method."""
    expected = {}
    for component, values in header["config"].items():
        config = parse_config(file, values)
        method = METHODS[config.method]
        alone = dataclasses.replace(config, rank=1, blocks=1)
        starts = method_functions(config.method).initialize(torch.ones(1, 1, 1), alone, torch.Generator())
        expected[component] = (config, {method.key_prefix + key for start in starts for key in start})
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in loaded.items():
        module, _, last = name.rpartition(".")
        component = name.partition(".")[0]
        if name.startswith(CONTROL_PREFIX) and "control_encoder" in header:
            continue
        if component not in expected or last not in expected[component][1]:
            raise InputError(f"{file} holds {name}, which means nothing in this adapter; refused.")
        modules.setdefault(module, {})[last] = tensor
    for module, own in modules.items():
        config, keys = expected[module.partition(".")[0]]
        missing = sorted(keys - own.keys())
        if missing:
            raise InputError(f"{file} lacks {module}.{missing[0]}; save or download it again.")
        if METHODS[config.method].has_factors:
            _check_shapes(file, module, config, {name.partition("_")[2]: t for name, t in own.items()})


def _check_shapes(file: Path, module: str, config: AdapterConfig, own: dict[str, Tensor]) -> None:
    """A (r, in) and B (out, r), and what goes with them."""
    wide, out = own["A"].shape[-1], own["B"].shape[0]
    norm = {"column": (wide,), "frobenius": (), "none": None}[config.weight_norm]
    shapes = {"A": (config.rank, wide), "B": (out, config.rank), "lambda": (), "w_norm": norm}
    shapes |= {"A0": shapes["A"], "B0": shapes["B"]}
    for key, tensor in own.items():
        if tuple(tensor.shape) != shapes[key]:
            raise InputError(f"{file}: {module} has {key} of shape {tuple(tensor.shape)}, not {shapes[key]}.")
