"""Merge adapters into a base model that is one file, or write a pipeline folder as one file.

As in ``merging``, at no time is more than the adapters and a few weight matrices in memory.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.files.headers import safetensors_header
from delora_diffusers.files.merging import FLOATS, Change, check_change, merged_weight, read_changes, weight_name


class Stored(NamedTuple):
    """Where a weight is in a single file.

    Attributes:
        name: in the file. row: where it begins, if several matrices are stored as one.
        transposed: whether it is stored so. dimensions: of the tensor in the file, the last of which may be 1.
    """

    name: str
    row: int
    transposed: bool
    dimensions: int


Layout = dict[str, dict[str, Stored]]
"""Where each weight is, by component and by its name in diffusers' model."""


def merge_single_file(
    file: Path, layout: Layout, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], adapters: Any, output: Path
) -> None:
    """Write a copy of a single file with adapters merged into its weights, completely or not at all.

    All other tensors, the metadata and the order of the file stay as they are.

    Args:
        shapes: of the weights in diffusers' models, by component and name.
        adapters: see ``read_changes``.

    Raises:
        InputError: see ``merge_folder``.
    """
    header, begin = safetensors_header(file, "a base model"), _begin(file)
    changes = check_changes(file, layout, shapes, read_changes(adapters))
    with atomic_write(output) as copy:
        shutil.copyfile(file, copy)
        for stored, name, shape, change in tqdm(changes, desc="merging", leave=False):
            with safe_open(copy, "pt") as opened:
                whole = opened.get_tensor(stored.name).clone()
            part = whole.T if stored.transposed else whole[stored.row : stored.row + shape[0]] if shape else whole
            part.copy_(merged_weight(name, part.reshape(shape), change).reshape(part.shape))
            with copy.open("r+b") as stream:
                stream.seek(begin + header[stored.name]["data_offsets"][0])
                stream.write(_bytes(whole))


def check_changes(
    file: Path,
    layout: Layout,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    changes: Mapping[str, Mapping[str, Change]],
) -> list[tuple[Stored, str, tuple[int, ...], Change]]:
    """(where it is, name, shape, change) of all changes of a single file's weights; see ``merge_single_file``.

    Raises:
        InputError: one does not fit.
    """
    header, checked = safetensors_header(file, "a base model"), []
    for component, name, change in _changed(file, layout, changes):
        stored, shape = layout[component][name], shapes[component][name]
        check_change(file, name, change, shape, header[stored.name]["dtype"])
        checked.append((stored, name, shape, change))
    return checked


def write_single_file(
    folder: Path,
    files: Mapping[str, Sequence[Path]],
    layout: Layout,
    adapters: Any,
    marks: Sequence[str],
    metadata: Mapping[str, str],
    output: Path,
) -> None:
    """Write the models of a pipeline folder, with adapters merged into their weights, to one file.

    Args:
        files: with the weights of each component. layout: which of them go where.
        marks: names of empty tensors to add, by which other tools know the kind of model.
        metadata: of the new file.

    Raises:
        InputError: a weight is missing, or see ``merge_folder``.
    """
    changes = {(c, name): change for c, name, change in _changed(folder, layout, read_changes(adapters))}
    with ExitStack() as stack:
        opened = {c: [stack.enter_context(safe_open(path, "pt")) for path in paths] for c, paths in files.items()}
        tensors: dict[str, list[Part]] = {}
        for component, weights in layout.items():
            where = {name: file for file in opened[component] for name in file.keys()}  # noqa: SIM118
            for weight, stored in weights.items():
                name = weight_name(set(where), weight)
                if name is None:
                    raise InputError(f"{folder / component} has no weight {weight} in safetensors; save it so.")
                part = Part(stored, where[name], name, changes.get((component, weight)))
                if part.dtype not in FLOATS:
                    raise InputError(f"{folder / component} stores {name} as {part.dtype}; save it as fp32 or fp16.")
                if part.change is not None:
                    check_change(folder / component, name, part.change, part.shape, part.dtype)
                tensors.setdefault(stored.name, []).append(part)
        _write(
            output,
            {name: sorted(parts, key=lambda part: part.stored.row) for name, parts in tensors.items()},
            marks,
            metadata,
        )


class Part(NamedTuple):
    """A weight of a folder that becomes a tensor of a single file, or rows of one.

    Attributes:
        file: that is open. name: in that file. change: that adapters make.
    """

    stored: Stored
    file: Any
    name: str
    change: Change | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """Its dtype, as safetensors calls it."""
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        """The weight with its change, as it is stored."""
        weight = self.file.get_tensor(self.name)
        weight = weight if self.change is None else merged_weight(self.name, weight, self.change)
        return weight.T if self.stored.transposed else weight


def _write(output: Path, tensors: Mapping[str, list[Part]], marks: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Write tensors, each made when it is written, to a safetensors file; wide dtypes come first, so that all align."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    entries |= {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in marks}
    order = sorted(tensors, key=lambda name: (-FLOATS[tensors[name][0].dtype].itemsize, name))
    offset = 0
    for name in order:
        first, rows = tensors[name][0], sum(part.shape[0] for part in tensors[name])
        shape = first.shape[::-1] if first.stored.transposed else (rows, *first.shape[1:])
        shape += (1,) * (first.stored.dimensions - len(shape))
        size = math.prod(shape) * FLOATS[first.dtype].itemsize
        entries[name] = {"dtype": first.dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with atomic_write(output) as temporary, temporary.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in tqdm(order, desc="writing", leave=False):
            dtype = FLOATS[tensors[name][0].dtype]
            for part in tensors[name]:
                stream.write(_bytes(part.read().to(dtype)))


def _changed(
    source: Path, layout: Layout, changes: Mapping[str, Mapping[str, Change]]
) -> Iterator[tuple[str, str, Change]]:
    """(component, weight, change) of every change that adapters make.

    Raises:
        InputError: the base model has no such weight.
    """
    for component, modules in changes.items():
        names = set(layout.get(component, ()))
        for module, change in modules.items():
            name = weight_name(names, module)
            if name is None:
                raise InputError(
                    f"{source} has no weight for {component}.{module}; give the adapter's base model, with that part."
                )
            yield component, name, change


def _begin(file: Path) -> int:
    """Where the tensors of a safetensors file begin."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
