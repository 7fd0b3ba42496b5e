"""Merge adapters into the weights of a pipeline folder, file by file and tensor by tensor.

Every part of the pipeline is copied unchanged; the adapted tensors are then overwritten in place in the copy, in the
dtype that they have. At no time is more than the adapters and one weight matrix in memory.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.atomic import atomic_folder
from delora_diffusers.errors import InputError
from delora_diffusers.files.low_rank import module_tensors
from delora_diffusers.files.reading import adapter_path, check_shapes, parse_config, read_adapter, visible_weights
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import method_functions

OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx", "*.pb")
"""Weights in formats that merging does not read; not copied for components that the adapters change."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Term:
    """What one adapter file contributes to the change of one weight."""

    file: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    strength: float


class Change:
    """The combined change that several adapters make to one weight."""

    def __init__(self):
        self.terms: list[Term] = []

    def __call__(self, weight: Tensor) -> Tensor:
        """``W + sum_i s_i (W_i' - W)`` in float32, for W of any dtype."""
        exact = weight.float()
        total = exact.clone()
        for term in self.terms:
            stacked = {key: tensor[None].float() for key, tensor in term.tensors.items()}
            changed = method_functions(term.config.method).adapted_weight(exact[None], stacked, term.config)[0]
            alone = len(self.terms) == 1 and term.strength == 1
            total = changed if alone else total + term.strength * (changed - exact)
        return total


def read_changes(adapters: Sequence[tuple[Path, float]]) -> dict[str, dict[str, Change]]:
    """The changes that the adapters make, by component and module.

    Raises:
        InputError: an adapter is invalid or was trained on maps.
    """
    changes: dict[str, dict[str, Change]] = {}
    for path, strength in adapters:
        file = adapter_path(path)
        header, tensors = read_adapter(file)
        if "control_encoder" in header:
            raise InputError(f"{file} was trained on maps, which a merged pipeline cannot take; use generate.")
        for component, values in header["config"].items():
            config = parse_config(file, values)
            names = [name for name in tensors if name.startswith(component + ".")]
            for module, keys in module_tensors(names).items():
                change = changes.setdefault(component, {}).setdefault(module.removeprefix(component + "."), Change())
                change.terms.append(Term(file, config, {key: tensors[name] for key, name in keys.items()}, strength))
    return changes


def merge_folder(
    folder: Path,
    adapters: Sequence[tuple[Path, float]],
    output_dir: Path,
    edit: Callable[[Path], None] | None = None,
) -> None:
    """Write a copy of a pipeline folder with the adapters merged into its weights, completely or not at all.

    Args:
        edit: changes other files of the copy.

    Raises:
        InputError: an adapted weight is missing, has another shape or is not floating point, or the disk is full.
    """
    changes = read_changes(adapters)
    for component, module_changes in changes.items():
        seen = set()
        for file in visible_weights(folder / component):
            for module, _ in _adapted_weights(file, module_changes):
                seen.add(module)
        missing = sorted(module_changes.keys() - seen)
        if missing:
            raise InputError(
                f"{folder / component} has no safetensors weight for {missing[0]}; give the adapter's base model, "
                "saved as safetensors."
            )

    def ignore(directory: str, names: list[str]) -> set[str]:
        changed = Path(directory).name in changes and Path(directory).parent == folder
        hidden = {name for name in names if name == ".cache"}
        return hidden | (set(shutil.ignore_patterns(*OTHER_WEIGHTS)(directory, names)) if changed else set())

    def write(copy: Path) -> None:
        # Follows the symlinks in the hub's cache. Permissions are not copied: the base model may be read-only.
        shutil.copytree(folder, copy, ignore=ignore, dirs_exist_ok=True, copy_function=shutil.copyfile)
        if edit is not None:
            edit(copy)

    merge_into_new_folder(write, changes, output_dir)


def merge_into_new_folder(
    write: Callable[[Path], None], changes: Mapping[str, dict[str, Change]], output_dir: Path
) -> None:
    """Write a pipeline folder, then change its weights, completely or not at all.

    Args:
        write: fills the folder that it is given. changes: all of its weights are there.

    Raises:
        InputError: see ``merge_folder``.
    """
    with atomic_folder(output_dir) as copy:
        write(copy)
        files = [(file, changes[component]) for component in changes for file in visible_weights(copy / component)]
        for file, module_changes in tqdm(files, desc="merging", leave=False):
            _overwrite(file, module_changes)


def _adapted_weights(file: Path, changes: dict[str, Change]) -> Iterator[tuple[str, str]]:
    """(module, tensor name) of the adapted weights in a file."""
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        for module, change in changes.items():
            name = weight_name(names, module)
            if name is None:
                continue
            piece = opened.get_slice(name)
            check_change(file, name, change, tuple(piece.get_shape()), piece.get_dtype())
            yield module, name


def check_change(file: Path, name: str, change: Change, shape: tuple[int, ...], dtype: str) -> None:
    """Check that a change fits the weight of this name, shape and dtype in a file.

    Raises:
        InputError
    """
    if dtype not in FLOATS:
        raise InputError(f"{file} stores {name} as {dtype}; merge into a model in fp32, fp16 or bf16.")
    for term in change.terms:
        check_shapes(term.file, name, term.config, term.tensors, shape)


def merged_weight(name: str, weight: Tensor, change: Change) -> Tensor:
    """A weight with its change, in its dtype.

    Raises:
        InputError: it overflows.
    """
    merged = change(weight).to(weight.dtype).contiguous()
    if torch.isfinite(weight).all() and not torch.isfinite(merged).all():
        raise InputError(f"the merged {name} overflows in {str(weight.dtype)[6:]}; use smaller --adapter_weights.")
    return merged


def weight_name(names: set[str], module: str) -> str | None:
    """The name in a file of a module's weight or, with full fine-tuning, of a parameter; ``text_model`` is optional."""
    for prefix in ("", "text_model."):
        for inner in (module, module.removeprefix("text_model.")):
            for name in (f"{prefix}{inner}.weight", prefix + inner):
                if name in names:
                    return name
    return None


def _overwrite(file: Path, changes: dict[str, Change]) -> None:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    for module, name in list(_adapted_weights(file, changes)):
        with safe_open(file, "pt") as opened:
            weight = opened.get_tensor(name).clone()
        merged = merged_weight(name, weight, changes[module])
        with file.open("r+b") as stream:
            stream.seek(8 + size + header[name]["data_offsets"][0])
            stream.write(merged.view(torch.uint8).numpy().tobytes())
