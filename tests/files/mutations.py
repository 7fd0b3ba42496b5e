"""Random mutations of adapter files and PEFT folders, each a function of a random generator and the contents."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from delora_diffusers.files.reading import COMPONENTS
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import METADATA_KEY

TARGETS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",  # 32 x 32
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",  # 64 x 32
)
TEXT_TARGET = "encoder.layers.0.self_attn.q_proj"
XL = "StableDiffusionXLPipeline"
BASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "delora, zero start, SDXL": {"start": "zero", "delora_lambda": 2.0},
    "delora, Frobenius, split": {"weight_norm": "frobenius", "path": "split"},
    "delora, text encoder": {"weight_norm": "none"},
    "lora, split": {"method": "lora", "path": "split", "alpha": 3},
    "oft, two blocks": {"method": "oft", "blocks": 2, "coft_eps": 6e-5},
    "control encoder": {"method": "lora"},
    "control encoder, palette": {},
}
"""The settings of every good adapter file."""
PEFT_BASES = {"peft, zero start": {"start": "zero"}, "peft, frozen start": {}}

LIMIT = 2.0
"""Seconds of processor time that everything done with one mutated file may take together."""
INJECTED = "INJECTED: a separate line"
LONG_NAME = "down_blocks." + "1" * 5000 + ".attentions.0.transformer_blocks.0.attn1.to_q"
ODD_STRINGS = (
    *("", " ", ".", "..", "*", "\0", "é", "../../x", "/etc", "x" * 3000, "1" * 5000, LONG_NAME),
    *("\x1b[2J\x1b]0;title\x07", "\r\x08over", f"a\n{INJECTED}", "\u202eabc\u2066", "a\u2028b\u0085c", "\x9b31m"),
)
KNOWN_STRINGS = (*METHODS, *COMPONENTS, *TARGETS, XL, "zero", "frozen", "column", "frobenius", "none", "split", "to_q")
ODD_VALUES = (
    *(None, True, False, [], {}, [None], [[]], {"a": {}}, [[["x"]]], ["*"], ["to_q"], ["to_q", 1], [[0, 0, 0]]),
    *(0, 1, 2, 3, 4, 8, 16, 32, 64, -1, -(10**20), 2**31, 2**63, 10**400, 0.5, 2.0, -0.0, 1e-320, 1e29, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "\ud800", ["\ud800\x1b"], {"\x1b[1m": "\x1b"}, {f"\n{INJECTED}": 1}),
    *ODD_STRINGS,
    *KNOWN_STRINGS,
)
RAW_VALUES = (
    *("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "9" * 5000, "1e999", "-", "1,", "'a'"),
    '"' + "\\u001b" * 300_000 + '"',
)
ODD_NUMBERS = (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e30, -1e30, 1e-45, 65504.0, 0.0, -1.0)
DTYPES = ("F32", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "F" * 100)


# Mutations of the tensors: they give a valid safetensors file.


def set_numbers(random: Random, tensors: dict[str, Tensor]) -> None:
    """Set one number, or all, of some tensors to NaN, infinity, a huge one or zero."""
    for name in random.sample(sorted(tensors), random.randint(1, len(tensors))):
        tensor, number = tensors[name].clone(), random.choice(ODD_NUMBERS)
        if random.random() < 0.5 and tensor.numel():
            tensor.view(-1)[random.randrange(tensor.numel())] = number
        else:
            tensor.fill_(number)
        tensors[name] = tensor


def change_shape(random: Random, tensors: dict[str, Tensor]) -> None:
    name = random.choice(sorted(tensors))
    tensor = tensors[name]
    shapes: list[Callable[[], Tensor]] = [
        lambda: tensor.flatten()[:1].reshape(()),
        lambda: tensor.flatten()[:1],
        lambda: tensor.flatten()[:1].repeat(3),
        lambda: tensor.flatten()[None],
        lambda: tensor.flatten()[:, None],
        lambda: tensor.flatten(),
        lambda: tensor.T if tensor.ndim == 2 else tensor.reshape(1, -1).T,
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: tensor[:1] if tensor.ndim else tensor.repeat(2),
        lambda: tensor[..., :1] if tensor.ndim else tensor.repeat(1, 2),
        lambda: tensor.reshape(*[1] * 70, *tensor.shape),
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(64),
        lambda: tensor[:0] if tensor.ndim else tensor.repeat(0),
    ]
    tensors[name] = random.choice(shapes)()


def change_rank(random: Random, tensors: dict[str, Tensor]) -> None:
    """Repeat all tensors along one dimension; what used to fit together still does, but not the settings."""
    dim = random.choice((0, -1))
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = torch.cat([tensor, tensor], dim)


def cast(random: Random, tensors: dict[str, Tensor]) -> None:
    dtype = random.choice((torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn))
    for name in random.sample(sorted(tensors), random.randint(1, len(tensors))):
        tensors[name] = tensors[name].to(dtype)


def remove_tensor(random: Random, tensors: dict[str, Tensor]) -> None:
    if len(tensors) > 1:
        del tensors[random.choice(sorted(tensors))]


def exchange_tensors(random: Random, tensors: dict[str, Tensor]) -> None:
    first, second = random.choices(sorted(tensors), k=2)
    tensors[first], tensors[second] = tensors[second], tensors[first]


def rename_tensor(random: Random, tensors: dict[str, Tensor]) -> None:
    """Give a tensor another name, or part of another name, with or without keeping the original."""
    name = random.choice(sorted(tensors))
    parts = name.split(".")
    parts[random.randrange(len(parts))] = random.choice(ODD_STRINGS + KNOWN_STRINGS)
    renamed = random.choice((".".join(parts), random.choice(ODD_STRINGS), name.replace("_", "."), name + "\x1b"))
    tensors[renamed] = tensors[name].clone() if random.random() < 0.3 else tensors.pop(name)


def rename_module(random: Random, tensors: dict[str, Tensor]) -> None:
    """Give all tensors of a module another module's name."""
    target, other = random.choice(sorted({name.rpartition(".")[0] for name in tensors})), random.choice(ODD_STRINGS)
    new = random.choice((f"unet.{other}", f"unet.{other}.to_q", other, f"{target}{other}"))
    for name in list(tensors):
        if name.rpartition(".")[0] == target:
            tensors[f"{new}.{name.rpartition('.')[2]}"] = tensors.pop(name)


# Mutations of JSON text: the metadata of an adapter file, and PEFT's settings.


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def replace_value(random: Random, text: str) -> str:
    root = [json.loads(text)]
    container, key = random.choice(places(root))
    container[key] = copy.deepcopy(random.choice(ODD_VALUES))
    return json.dumps(root[0])


def replace_with_raw_text(random: Random, text: str) -> str:
    """Replace a value by text that Python cannot write as JSON, such as 100,000 brackets."""
    root = [json.loads(text)]
    container, key = random.choice(places(root))
    container[key] = "RAW"
    return json.dumps(root[0]).replace('"RAW"', random.choice(RAW_VALUES))


def remove_value(random: Random, text: str) -> str:
    root = json.loads(text)
    if places(root):
        container, key = random.choice(places(root))
        del container[key]
    return json.dumps(root)


def rename_key(random: Random, text: str) -> str:
    root = json.loads(text)
    keyed = [(container, key) for container, key in places(root) if isinstance(container, dict)]
    if keyed:
        container, key = random.choice(keyed)
        container[random.choice(ODD_STRINGS + KNOWN_STRINGS)] = container.pop(key)
    return json.dumps(root)


def add_value(random: Random, text: str) -> str:
    root = json.loads(text)
    containers = [container for container, _ in places(root) if isinstance(container, dict)]
    if containers:
        key = random.choice(("training", "alpha", "blocks", "control_encoder", "palette", *ODD_STRINGS, *KNOWN_STRINGS))
        random.choice(containers)[key] = copy.deepcopy(random.choice((*ODD_VALUES, {"palette": None}, {"rank": 2})))
    return json.dumps(root)


def exchange_values(random: Random, text: str) -> str:
    root = json.loads(text)
    if places(root):
        (first, i), (second, j) = random.choices(places(root), k=2)
        first[i], second[j] = copy.deepcopy(second[j]), copy.deepcopy(first[i])
    return json.dumps(root)


def damage_text(random: Random, text: str) -> str:
    position = random.randrange(len(text) + 1)
    return text[:position] + random.choice(('"', "{", "]", "\\u12", "\x1b", "\u202e", "0")) + text[position + 1 :]


# Mutations of the header: the tensors' data stays as it is.


def tensor_entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def announce_shape(random: Random, header: dict[str, Any]) -> None:
    entry = random.choice(tensor_entries(header))
    shape, count = entry["shape"], (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
    same_size = [[count], [1, count], [count, 1], shape[::-1], [1] * 70 + shape, [1] * 5000 + shape]
    others = [[], [0], [0, 2**62], [2**62, 4], [2**32, 2**32], [-1], [1.5], "4", [None], [*shape, 2], [True], [10**30]]
    entry["shape"] = random.choice(same_size + others)


def announce_dtype(random: Random, header: dict[str, Any]) -> None:
    """Another type; half the time with the shape that such numbers would have."""
    entry = random.choice(tensor_entries(header))
    entry["dtype"] = random.choice(DTYPES)
    factor = {"F16": 2, "BF16": 2, "U8": 4, "BOOL": 4, "F8_E4M3": 4, "F4": 8}.get(entry["dtype"], 0.5)
    if random.random() < 0.5 and isinstance(entry["shape"], list) and entry["shape"] and entry["shape"][-1]:
        entry["shape"][-1] = int(entry["shape"][-1] * factor)


def announce_offsets(random: Random, header: dict[str, Any]) -> None:
    entry, other = random.choices(tensor_entries(header), k=2)
    start, end = entry["data_offsets"]
    choices = [
        other["data_offsets"],
        [end, start],
        [start, end - 4],
        [start + 4, end],
        [start, 2**63],
        [-4, end - start - 4],
    ]
    entry["data_offsets"] = list(random.choice([*choices, [start], [start, end, end], [], [2**64, 2**65], [0.5, 1]]))


def rename_entry(random: Random, header: dict[str, Any]) -> None:
    header[random.choice(ODD_STRINGS)] = header.pop(random.choice(sorted(header)))


def remove_entry(random: Random, header: dict[str, Any]) -> None:
    if len(header) > 2:
        del header[random.choice(sorted(header))]


def copy_entry(random: Random, header: dict[str, Any]) -> None:
    """A second name for the same data."""
    name = random.choice(sorted(header))
    header[name + random.choice(("2", ".x", "\x1b"))] = header[name]


def change_metadata(random: Random, header: dict[str, Any]) -> None:
    metadata: Any = header.get("__metadata__", {})
    choices = [
        None,
        [],
        "x",
        {},
        {METADATA_KEY: None},
        {METADATA_KEY: {}},
        metadata | {"x" * 1000: "\x1b"},
        {"a": ["b"]},
    ]
    header["__metadata__"] = random.choice(choices)


def replace_in_header(random: Random, header: dict[str, Any]) -> None:
    container, key = random.choice(places(header))
    container[key] = copy.deepcopy(random.choice(ODD_VALUES))


# Mutations of the bytes.


def position_in(random: Random, content: bytes) -> int:
    """Half the time in the header, where more depends on each byte."""
    end = min(len(content), 8 + int.from_bytes(content[:8], "little")) if random.random() < 0.5 else len(content)
    return random.randrange(end + 1)


def repeat_name(random: Random, content: bytes) -> bytes:
    """The header's JSON has a name twice, the first or second time with null."""
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].decode().strip()
    name = json.dumps(random.choice(list(json.loads(text))))
    text = random.choice(
        (text[:-1] + f", {name}: null}}", f"{{{name}: null, {text[1:]}", f"{{{name}: {{}}, {text[1:]}")
    )
    return len(text.encode()).to_bytes(8, "little") + text.encode() + content[8 + size :]


def nest_header(random: Random, content: bytes) -> bytes:
    """The header's JSON has a value that is nested 100,000 times, or a number of 5000 digits, and so on."""
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].rstrip()[:-1] + b', "x": ' + random.choice(RAW_VALUES).encode() + b"}"
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def change_header_size(random: Random, content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    sizes = (0, 1, size - 1, size + 1, size + 8, len(content) - 8, len(content), 2**31, 2**40, 2**63, 2**64 - 1)
    return max(0, random.choice(sizes)).to_bytes(8, "little") + content[8:]


def flip_bytes(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.randint(1, 8)):
        changed[position_in(random, content) % len(changed)] ^= random.randint(1, 255)
    return bytes(changed)


def insert_bytes(random: Random, content: bytes) -> bytes:
    position = position_in(random, content)
    return content[:position] + random.randbytes(random.randint(1, 30)) + content[position:]


def remove_bytes(random: Random, content: bytes) -> bytes:
    position = position_in(random, content)
    return content[:position] + content[position + random.randint(1, 50) :]


def copy_bytes(random: Random, content: bytes) -> bytes:
    """Some bytes once more, over or between those elsewhere."""
    source, position, count = position_in(random, content), position_in(random, content), random.randint(1, 200)
    return content[:position] + content[source : source + count] + content[position + random.choice((0, count)) :]


def truncate(random: Random, content: bytes) -> bytes:
    return content[: position_in(random, content)]


Mutation = Callable[[Random, bytes], bytes]


def in_tensors(change: Callable[[Random, dict[str, Tensor]], None]) -> Mutation:
    """The mutation of a file that changes its tensors."""

    def mutate(random: Random, content: bytes) -> bytes:
        tensors = load(content)
        change(random, tensors)
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        return save(tensors, read_header(content)["__metadata__"])

    mutate.__name__ = change.__name__
    return mutate


def in_metadata(change: Callable[[Random, str], str]) -> Mutation:
    """The mutation of a file that changes the adapter's own JSON in the metadata."""

    def mutate(random: Random, content: bytes) -> bytes:
        header = read_header(content)
        metadata = header.get("__metadata__", {})
        metadata[METADATA_KEY] = change(random, metadata.get(METADATA_KEY, "{}"))
        return with_header(content, header)

    mutate.__name__ = change.__name__
    return mutate


def in_header(change: Callable[[Random, dict[str, Any]], None]) -> Mutation:
    """The mutation of a file that changes its header."""

    def mutate(random: Random, content: bytes) -> bytes:
        header = read_header(content)
        change(random, header)
        return with_header(content, header)

    mutate.__name__ = change.__name__
    return mutate


def in_text(change: Callable[[Random, str], str]) -> Mutation:
    """The mutation of a file that is JSON."""

    def mutate(random: Random, content: bytes) -> bytes:
        return change(random, content.decode()).encode()

    mutate.__name__ = change.__name__
    return mutate


def read_header(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


JSON_CHANGES = [
    *(replace_value, replace_value, remove_value, rename_key, add_value, exchange_values),
    *(replace_with_raw_text, damage_text),  # after these two it may not be JSON any more
]
OF_TENSORS = [
    *(set_numbers, change_shape, change_rank, cast, remove_tensor, exchange_tensors, rename_tensor, rename_module),
]
OF_HEADER = [
    *(announce_shape, announce_dtype, announce_offsets, rename_entry, remove_entry, copy_entry),
    *(change_metadata, replace_in_header),
]
OF_BYTES = [
    *(repeat_name, nest_header, change_header_size, flip_bytes, insert_bytes, remove_bytes, copy_bytes, truncate),
]
MUTATIONS: list[Mutation] = [
    *map(in_tensors, OF_TENSORS),
    *map(in_metadata, JSON_CHANGES),
    *map(in_header, OF_HEADER),
    *OF_BYTES,
]
"""All mutations of an adapter file, in the order in which one file can have several of them."""
PEFT_SETTINGS_MUTATIONS = [*map(in_text, JSON_CHANGES), flip_bytes, insert_bytes, remove_bytes, truncate]
VALID = len(OF_TENSORS) + len(JSON_CHANGES)
"""The number of mutations, from the first, after which a file is still a safetensors file."""


def mutated(content: bytes, random: Random) -> tuple[bytes, str]:
    """One to three mutations of a file, and their names; half the time it remains a safetensors file."""
    choices = range(random.choice((VALID, len(MUTATIONS))))
    chosen = [MUTATIONS[i] for i in sorted(random.sample(choices, random.choice((1, 1, 2, 3))))]
    for mutation in chosen:
        content = mutation(random, content)
    return content, ", ".join(mutation.__name__ for mutation in chosen)


# What is done with a mutated file, and what must come of it.
