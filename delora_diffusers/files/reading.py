"""Read adapter files without trusting them: anything that is not an adapter is rejected with a one-sentence error."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delora_diffusers.errors import LOADING_ERRORS, InputError
from delora_diffusers.files.headers import safetensors_header
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import method_functions
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import METADATA_KEY, PREDICTION_TYPES, WEIGHTS_NAME, checkpoint_folders, may_be_hub_id
from delora_diffusers.text_files import is_text, parse_json

FORMAT_VERSION = 1
CONTROL_PREFIX = "control_encoder."
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
MAX_TENSORS = 20_000
"""For comparison, an adapter for every linear layer of SDXL has 7,000."""
MAX_DIMENSIONS = 8
"""Torch has 64 at most."""


def adapter_path(path: str | os.PathLike) -> Path:
    """The adapter file for a path or hub id: the file itself, that of an output folder or checkpoint, or on the hub.

    Raises:
        InputError: there is no adapter file.
    """
    local = Path(path)
    if not local.exists() and "/" in str(path) and may_be_hub_id(str(path)):
        return from_hub(str(path), WEIGHTS_NAME)
    file = local / WEIGHTS_NAME if local.is_dir() else local
    if not file.is_file():
        checkpoints = [folder for folder in checkpoint_folders(local) if (folder / WEIGHTS_NAME).is_file()]
        if checkpoints:
            raise InputError(
                f"{local} is not finished; give one of its checkpoints, for example {checkpoints[-1]} "
                f"({', '.join(folder.name for folder in checkpoints)})."
            )
        raise InputError(f"no adapter at {file}; give an output folder of the training script or a .safetensors file.")
    return file


def from_hub(repo_id: str, name: str) -> Path:
    """A file of a repository on the hub.

    Raises:
        InputError: it is not there.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"no adapter at {repo_id}: it is not a local folder, and {name} was not found on the hub "
            f"({' '.join(str(error).split())[:200]}); check the name."
        ) from error


def visible_weights(folder: Path) -> list[Path]:
    """The safetensors files in a folder of a model, without hidden ones."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name[0] != ".")


def weight_names(folder: Path) -> set[str]:
    """The names of the weights in a model's folder; empty if no file gives them without being loaded."""
    names: set[str] = set()
    for file in visible_weights(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        except (SafetensorError, OSError):
            return set()
    for file in sorted(folder.glob("[!.]*.bin")) if not names else ():
        try:
            names.update(torch.load(file, map_location="meta", mmap=True, weights_only=True))
        except LOADING_ERRORS:
            return set()
    return names


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
    safetensors_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise InputError(f"{file} has {len(names)} tensors, far more than an adapter; give an adapter file.")
            for name in names:
                piece = opened.get_slice(name)
                if len(piece.get_shape()) > MAX_DIMENSIONS:
                    raise InputError(f"{file} has {name} with {len(piece.get_shape())} dimensions; save it again.")
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


def read_adapter(file: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header (see ``read_header``) and, if requested, all tensors by name, checked against the header.

    Raises:
        InputError: see ``read_tensors``; or the header is not an adapter's, or the tensors do not match it.
    """
    metadata, loaded = read_tensors(file, tensors)
    header = _parse_header(metadata)
    if header is None:
        raise InputError(
            f"{file} is a safetensors file, but not an adapter saved by delora-diffusers; give one, or make one of "
            "a LoRA with python -m delora_diffusers import."
        )
    version, configs = header["format_version"], header["config"]
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
        check_tensors(file, header, loaded)
    return header, loaded


def _parse_header(metadata: dict[str, str]) -> dict[str, Any] | None:
    """The header in a file's metadata; None if it is not an adapter's."""
    try:
        header = parse_json(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        return None
    if not isinstance(header, dict) or type(header.get("format_version")) is not int:
        return None
    if header["format_version"] < 1:
        return None
    names = ("base_model", "pipeline", "revision", "variant", "model_config", "prediction_type")
    texts = [header.get(name) for name in names]
    valid = "base_model" in header and all(text is None or (isinstance(text, str) and is_text(text)) for text in texts)
    valid = valid and header.get("prediction_type") in (None, *PREDICTION_TYPES)
    valid = valid and isinstance(header.get("rescale_betas_zero_snr"), bool | None)
    valid = valid and isinstance(header.get("config"), dict) and bool(header["config"])
    valid = valid and isinstance(header.get("training", {}), dict)
    control = header.get("control_encoder", {"palette": None})
    valid = valid and isinstance(control, dict) and "palette" in control and _is_palette(control["palette"])
    return header if valid else None


def _is_palette(palette: Any) -> bool:
    """Whether a value is None or the colours of at most 256 classes."""
    if palette is None:
        return True
    if not isinstance(palette, list) or not 0 < len(palette) <= 256:
        return False
    return all(
        isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)
        for colour in palette
    )


def parse_config(file: Path, values: Any) -> AdapterConfig:
    """The configuration in a header.

    Raises:
        InputError: a setting is unknown or invalid.
    """
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    if not isinstance(values, dict):
        raise InputError(f"{file} has settings that are not a JSON object; save it again.")
    unknown = sorted(values.keys() - known)
    if unknown:
        raise InputError(f"{file} has the unknown setting {unknown[0]}; update delora-diffusers.")
    try:
        return AdapterConfig(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def check_tensors(file: Path, header: dict[str, Any], loaded: dict[str, Tensor]) -> None:
    """Check that every tensor is finite and belongs to a module with all tensors of its method.

    Raises:
        InputError: it does not, or a component has no module.
    """
    configs = {component: parse_config(file, values) for component, values in header["config"].items()}
    keys = {component: _keys(config) for component, config in configs.items()}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{file} contains values that are not finite in {name}; take an earlier checkpoint of the training."
            )
        if not name.isprintable():
            raise InputError(f"{file} contains a tensor with the name {name!r}; save or download it again.")
        module, _, last = name.rpartition(".")
        component = name.partition(".")[0]
        if name.startswith(CONTROL_PREFIX) and "control_encoder" in header:
            continue
        if component not in configs or last not in keys[component]:
            raise InputError(f"{file} contains {name}, which is not a tensor of this adapter; save it again.")
        modules.setdefault(module, {})[keys[component][last]] = tensor
    for module, tensors in modules.items():
        component = module.partition(".")[0]
        missing = sorted(
            keys[component].keys() - {f"{METHODS[configs[component].method].key_prefix}{k}" for k in tensors}
        )
        if missing:
            raise InputError(f"{file} has no {module}.{missing[0]}; save or download it again.")
        _check_dimensions(file, module, configs[component], tensors)
    empty = sorted(configs.keys() - {module.partition(".")[0] for module in modules})
    if empty:
        raise InputError(f"{file} has settings for {empty[0]}, but none of its tensors; save or download it again.")


def _keys(config: AdapterConfig) -> dict[str, str]:
    """The last part of the names of a method's tensors in a file, and the key that it stands for."""
    method, side = METHODS[config.method], config.number_of_blocks
    return {method.key_prefix + key: key for key in method_functions(config.method).shapes((side, side), config)}


def _check_dimensions(file: Path, module: str, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Check what can be checked without the pretrained weight."""
    if config.method != "full":
        side = config.number_of_blocks
        for key, shape in method_functions(config.method).shapes((side, side), config).items():
            if tensors[key].ndim != len(shape):
                raise InputError(
                    f"{file}: {module} has {key} with {tensors[key].ndim} dimensions instead of {len(shape)}; save it "
                    "again."
                )
    if METHODS[config.method].has_factors:
        check_shapes(file, module, config, tensors, (tensors["B"].shape[0], tensors["A"].shape[1]))


def check_shapes(
    file: Path, module: str, config: AdapterConfig, tensors: Mapping[str, Tensor], weight: tuple[int, ...]
) -> None:
    """Check the shapes of all tensors of a module, by key, against that of the pretrained weight.

    Raises:
        InputError: a shape is wrong, or the method cannot adapt such a weight.
    """
    if config.method != "full" and len(weight) != 2:
        raise InputError(f"{file}: {module} is {weight} in the model, but only matrices can be adapted; save it again.")
    try:
        expected = method_functions(config.method).shapes(weight, config)
    except InputError as error:
        raise InputError(f"{file} does not fit the model: {module}: {error}") from error
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise InputError(
                f"{file}: {module} has {key} of shape {tuple(tensors[key].shape)}, not {shape}; give the adapter's "
                "base model, or save it again."
            )
