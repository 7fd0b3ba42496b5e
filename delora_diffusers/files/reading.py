"""Read adapter files without trusting them: anything that is not an adapter is rejected with a one-sentence error."""

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
MAX_HEADER_BYTES = 8 * 2**20
"""For comparison, the header of an adapter for SDXL's attention has 0.6 MB."""


def adapter_path(path: str | os.PathLike) -> Path:
    """The adapter file for a path or hub id: the file itself, the file in an output folder or the file on the hub.

    Raises:
        InputError: there is no adapter file.
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
            f"no adapter at {repo_id}: it is not a local folder, and {WEIGHTS_NAME} was not found on the hub "
            f"({' '.join(str(error).split())[:200]}); check the name."
        ) from error


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of an adapter file: ``format_version``, ``base_model``, ``config`` by component and so on.

    Raises:
        InputError: the file is missing, is not an adapter, is truncated or has a newer format version.
    """
    return read_adapter(adapter_path(path), tensors=False)[0]


def read_tensors(file: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and, if requested, all tensors of a safetensors file.

    Raises:
        InputError: the file is not safetensors, is truncated, has a name twice, or has a tensor that is empty or not
            floating point.
    """
    _check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            for name in names:
                piece = opened.get_slice(name)
                if piece.get_dtype() not in ("F32", "F16", "BF16"):
                    raise InputError(
                        f"{file} stores {name} as {piece.get_dtype()}; only F32, F16 and BF16 are supported."
                    )
                if 0 in piece.get_shape():
                    raise InputError(
                        f"{file} has an empty tensor {name} of shape {tuple(piece.get_shape())}; save it again."
                    )
            loaded = {name: opened.get_tensor(name) for name in names} if tensors else {}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        problem = "is truncated" if "incomplete" in str(error).lower() else "is not a safetensors file"
        raise InputError(f"{file} {problem} ({error}); save or download it again.") from error
    return metadata, loaded


def _check_header(file: Path) -> None:
    """Check the header's length and names before anything is allocated for them."""
    message = f"{file} is not a safetensors file (%s); save or download it again."
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        available = file.stat().st_size - 8
        if available < 2:
            raise InputError(f"{file} is truncated (it has {max(available + 8, 0)} bytes); save or download it again.")
        if size > MAX_HEADER_BYTES and size <= available:
            raise InputError(
                f"{file} has a header of {size / 2**20:.0f} MiB, far more than an adapter's; give an adapter file."
            )
        if size > available:
            raise InputError(message % f"it announces a header of {size} bytes but has {available}")
        header = stream.read(size)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            raise InputError(f"{file} has {next(n for n in names if names.count(n) > 1)} twice; save it again.")
        return entries

    try:
        json.loads(header, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(message % f"its header is not JSON: {str(error)[:100]}") from error


def read_adapter(file: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header (see ``read_header``) and, if requested, all tensors by name, checked against the header.

    Raises:
        InputError: see ``read_tensors``; or the header is not an adapter's, or the tensors do not match it.
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
            f"{file} is a safetensors file, but not an adapter saved by delora-diffusers; give one of those."
        )
    if version > FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version}, newer than {FORMAT_VERSION}, the newest that this version can read; "
            "update delora-diffusers."
        )
    for component in configs:
        if component not in COMPONENTS:
            raise InputError(
                f"{file} has an unknown component {component!r}; the known ones are {', '.join(COMPONENTS)}."
            )
    if tensors:
        _check_tensors(file, header, loaded)
    return header, loaded


def parse_config(file: Path, values: Any) -> AdapterConfig:
    """The configuration in a header.

    Raises:
        InputError: a setting is unknown or invalid.
    """
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    unknown = sorted(set(values) - known) if isinstance(values, dict) else ["config"]
    if unknown:
        raise InputError(f"{file} has the unknown setting {unknown[0]}; update delora-diffusers.")
    try:
        return AdapterConfig(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{file} has invalid settings ({error}); save it again.") from error


def _check_tensors(file: Path, header: dict[str, Any], loaded: dict[str, Tensor]) -> None:
    """Check that every tensor belongs to a component in the header and every module has its method's tensors."""
    expected = {}
    for component, values in header["config"].items():
        config = parse_config(file, values)
        method = METHODS[config.method]
        minimal = dataclasses.replace(config, rank=1, blocks=1)
        starts = method_functions(config.method).initialize(torch.ones(1, 1, 1), minimal, torch.Generator())
        expected[component] = (config, {method.key_prefix + key for start in starts for key in start})
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in loaded.items():
        module, _, last = name.rpartition(".")
        component = name.partition(".")[0]
        if name.startswith(CONTROL_PREFIX) and "control_encoder" in header:
            continue
        if component not in expected or last not in expected[component][1]:
            raise InputError(f"{file} contains {name}, which is not a tensor of this adapter; save it again.")
        modules.setdefault(module, {})[last] = tensor
    for module, tensors in modules.items():
        config, keys = expected[module.partition(".")[0]]
        missing = sorted(keys - tensors.keys())
        if missing:
            raise InputError(f"{file} has no {module}.{missing[0]}; save or download it again.")
        if METHODS[config.method].has_factors:
            _check_shapes(file, module, config, {name.partition("_")[2]: t for name, t in tensors.items()})


def _check_shapes(file: Path, module: str, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Check A (r, in), B (out, r) and the tensors whose shapes follow from theirs."""
    in_features, out_features = tensors["A"].shape[-1], tensors["B"].shape[0]
    norm = {"column": (in_features,), "frobenius": (), "none": None}[config.weight_norm]
    shapes = {"A": (config.rank, in_features), "B": (out_features, config.rank), "lambda": (), "w_norm": norm}
    shapes |= {"A0": shapes["A"], "B0": shapes["B"]}
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[key]:
            raise InputError(
                f"{file}: {module} has {key} of shape {tuple(tensor.shape)}, not {shapes[key]}; save it again."
            )
