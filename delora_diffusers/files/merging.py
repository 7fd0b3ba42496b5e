"""Write adapters into the weights of a pipeline folder, file by file and tensor by tensor.

Every part of the pipeline is copied as it is; then the adapted tensors are written over in the copy, where they lie, in
the dtype that they have. So at no time is more than one weight matrix and the adapters in memory.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.atomic import atomic_folder
from delora_diffusers.errors import InputError
from delora_diffusers.files.low_rank import module_tensors
from delora_diffusers.files.reading import adapter_path, parse_config, read_adapter
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import method_functions

OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx", "*.pb")
"""Weights in formats that are not read here; left out of the parts that the adapters change."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Change:
    """What several adapters make of one weight."""

    def __init__(self):
        self.terms: list[tuple[AdapterConfig, dict[str, Tensor], float]] = []

    def __call__(self, weight: Tensor) -> Tensor:
        """``W + sum_i s_i (W_i' - W)`` in float32, for W of any dtype."""
        exact = weight.float()
        total = exact.clone()
        for config, tensors, strength in self.terms:
            stacked = {key: tensor[None] for key, tensor in tensors.items()}
            changed = method_functions(config.method).adapted_weight(exact[None], stacked, config)[0]
            total = changed if len(self.terms) == 1 and strength == 1 else total + strength * (changed - exact)
        return total


def read_changes(adapters: Sequence[tuple[Path, float]]) -> dict[str, dict[str, Change]]:
    """By component and module.

    Raises:
        InputError: an adapter is not right, or follows maps.
    """
    found: dict[str, dict[str, Change]] = {}
    for path, strength in adapters:
        file = adapter_path(path)
        header, tensors = read_adapter(file)
        if "control_encoder" in header:
            raise InputError(f"{file} follows maps, which a pipeline folder has no place for; use generate.")
        for component, values in header["config"].items():
            config = parse_config(file, values)
            own = [name for name in tensors if name.startswith(component + ".")]
            for module, keys in module_tensors(own).items():
                change = found.setdefault(component, {}).setdefault(module.removeprefix(component + "."), Change())
                change.terms.append((config, {key: tensors[name] for key, name in keys.items()}, strength))
    return found


def merge_folder(folder: Path, adapters: Sequence[tuple[Path, float]], output_dir: Path) -> None:
    """Write the pipeline of a folder with the adapters in its weights to a new folder, whole or not at all.

    Raises:
        InputError: a weight that is adapted is not there, has another shape or is no float; no room on the disk.
    """
    changes = read_changes(adapters)
    for component, of_modules in changes.items():
        seen = set()
        for file in _weights(folder, component):
            for module, _ in _places(file, of_modules):
                seen.add(module)
        lacking = sorted(of_modules.keys() - seen)
        if lacking:
            raise InputError(
                f"{folder / component} has no weight of {lacking[0]} in a safetensors file; name the adapter's own "
                "model, in safetensors."
            )

    def ignore(place: str, names: list[str]) -> set[str]:
        changed = Path(place).name in changes and Path(place).parent == folder
        hidden = {name for name in names if name == ".cache"}
        return hidden | (set(shutil.ignore_patterns(*OTHER_WEIGHTS)(place, names)) if changed else set())

    with atomic_folder(output_dir) as part:
        shutil.copytree(folder, part, ignore=ignore, dirs_exist_ok=True)  # follows the links of the hub's cache
        todo = [(file, changes[component]) for component in changes for file in _weights(part, component)]
        for file, of_modules in tqdm(todo, desc="merging", leave=False):
            _write_over(file, of_modules)


def _weights(folder: Path, component: str) -> list[Path]:
    return sorted((folder / component).glob("*.safetensors"))


def _places(file: Path, changes: dict[str, Change]) -> Iterator[tuple[str, str]]:
    """(module, tensor's name) of the adapted weights in a file."""
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        for module, change in changes.items():
            name = _name_in(names, module)
            if name is None:
                continue
            piece = opened.get_slice(name)
            shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
            if dtype not in FLOATS:
                raise InputError(f"{file} holds {name} as {dtype}; merge into a model in fp32, fp16 or bf16.")
            for config, tensors, _ in change.terms:
                fitting = _fitting_shape(config, tensors)
                if fitting is not None and fitting != shape:
                    raise InputError(f"the adapter does not fit {file}: {name} is {shape} there and {fitting} in it.")
            yield module, name


def _name_in(names: set[str], module: str) -> str | None:
    """The weight's name in a file: of a module or, with full fine-tuning, of a parameter; CLIP's outer name or not."""
    for prefix in ("", "text_model."):
        for inner in (module, module.removeprefix("text_model.")):
            for name in (f"{prefix}{inner}.weight", prefix + inner):
                if name in names:
                    return name
    return None


def _fitting_shape(config: AdapterConfig, tensors: dict[str, Tensor]) -> tuple[int, ...] | None:
    """The weight's shape, where the adapter's tensors tell it."""
    if config.method == "full":
        return tuple(tensors["W"].shape)
    if {"A", "B"} <= tensors.keys() and config.method != "delora_multiplicative":
        return tensors["B"].shape[0], tensors["A"].shape[1]
    return None


def _write_over(file: Path, changes: dict[str, Change]) -> None:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    for module, name in list(_places(file, changes)):
        with safe_open(file, "pt") as opened:
            weight = opened.get_tensor(name).clone()
        merged = changes[module](weight).to(weight.dtype).contiguous()
        with file.open("r+b") as stream:
            stream.seek(8 + size + header[name]["data_offsets"][0])
            stream.write(merged.view(torch.uint8).numpy().tobytes())
