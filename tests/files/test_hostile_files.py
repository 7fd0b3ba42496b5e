"""Adapter files that are damaged, hostile or huge: a one-sentence error, no output, little memory."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from delora_diffusers import AdapterConfig, InputError, attach, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.files.low_rank import low_rank_factors
from delora_diffusers.files.reading import parse_config, read_adapter
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def good(tiny_sd, tmp_path_factory) -> bytes:
    """The bytes of an adapter file."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    adapter = attach(unet, AdapterConfig(rank=2, targets=("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)))
    return save_adapter(adapter, tmp_path_factory.mktemp("good"), base_model="x").read_bytes()


def split_file(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_file(header: str | dict, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_header(content: bytes, **changes) -> bytes:
    """The same tensors with changes in the header."""
    header, data = split_file(content)
    metadata = json.loads(header["__metadata__"]["delora_diffusers"])
    for key, value in changes.items():
        if key in ("format_version", "base_model", "config", "pipeline", "training", "control_encoder"):
            metadata[key] = value
        else:
            metadata["config"]["unet"][key] = value
    header["__metadata__"]["delora_diffusers"] = json.dumps(metadata)
    return join_file(header, data)


def with_dtype(content: bytes, dtype: str, factor: int) -> bytes:
    header, data = split_file(content)
    name = next(n for n in header if n.endswith("delora_A"))
    header[name]["dtype"] = dtype
    header[name]["shape"][-1] //= factor
    return join_file(header, data)


def with_renamed(content: bytes, old: str, new: str) -> bytes:
    header, data = split_file(content)
    return join_file(json.dumps(header).replace(old, new), data)


def with_duplicate_name(content: bytes) -> bytes:
    header, data = split_file(content)
    name = next(n for n in header if n.endswith("delora_A"))
    return join_file(json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", data)


def with_empty_tensor(content: bytes) -> bytes:
    header, data = split_file(content)
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["unet.x.delora_A"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [end, end]}
    return join_file(header, data)


def with_huge_header(content: bytes) -> bytes:
    header, data = split_file(content)
    header["__metadata__"]["more"] = "x" * (10 * 2**20)
    return join_file(header, data)


CASES = {
    "empty file": (lambda g: b"", "is truncated"),
    "half a length": (lambda g: g[:5], "is truncated"),
    "half a header": (lambda g: g[:100], "is not a safetensors file"),
    "half the data": (lambda g: g[:-100], "is truncated"),
    "2^60 bytes of header": (
        lambda g: (2**60).to_bytes(8, "little") + g[8:],
        "it announces a header of 1152921504606846976 bytes",
    ),
    "a header of 10 MB": (with_huge_header, "has a header of 10 MiB, far more than an adapter's"),
    "a pickle": (lambda g: pickle.dumps({"unet": [1.0] * 100}), "is not a safetensors file"),
    "a zip of torch": (lambda g: b"PK\x03\x04" + g[8:], "is not a safetensors file"),
    "nested a hundred thousand times": (lambda g: join_file("[" * 100_000, b""), "is not a safetensors file"),
    "integers": (lambda g: with_dtype(g, "I32", 1), "as I32; only F32, F16 and BF16 are supported"),
    "doubles": (lambda g: with_dtype(g, "F64", 2), "as F64; only F32, F16 and BF16 are supported"),
    "an empty tensor": (with_empty_tensor, r"an empty tensor unet.x.delora_A of shape \(0, 4\)"),
    "a name twice": (with_duplicate_name, "delora_A' is given twice.*; save or download it again"),
    "another name": (lambda g: with_renamed(g, "delora_A0", "delora_Z0"), "delora_Z0, which is not a tensor of"),
    "another component": (lambda g: with_renamed(g, '"unet.mid', '"vae.mid'), "which is not a tensor of this adapter"),
    "another rank": (lambda g: with_header(g, rank=3), r"has A of shape \(2, 64\), not \(3, 64\)"),
    "a rank of -1": (lambda g: with_header(g, rank=-1), "rank is -1"),
    "a rank of 10^12": (lambda g: with_header(g, rank=10**12), "has A of shape"),
    "a rank in words": (lambda g: with_header(g, rank="many"), "rank is 'many'"),
    "a lambda that is not a number": (lambda g: with_header(g, delora_lambda=[1]), r"delora_lambda is \[1\]"),
    "invalid targets": (lambda g: with_header(g, targets=7), "targets is 7"),
    "an unknown setting": (lambda g: with_header(g, surprise=1), "has the unknown setting surprise"),
    "a path as a component": (lambda g: with_header(g, config={"../../x": {}}), "unknown component '../../x'"),
    "no configuration": (lambda g: with_header(g, config=[]), "not an adapter saved by delora-diffusers"),
    "a pipeline that is not a string": (lambda g: with_header(g, pipeline=7), "not an adapter saved by"),
    "training settings that are not an object": (lambda g: with_header(g, training=[1]), "not an adapter saved by"),
    "an invalid control encoder": (lambda g: with_header(g, control_encoder=3), "not an adapter saved by"),
    "an invalid palette": (lambda g: with_header(g, control_encoder={"palette": 3}), "not an adapter saved by"),
    "a version in words": (lambda g: with_header(g, format_version="1"), "not an adapter saved by delora-diffusers"),
    "a base model that is not a string": (lambda g: with_header(g, base_model={"a": 1}), "not an adapter saved by"),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("command", ["info", "export"])
def test_is_rejected_with_one_sentence_and_nothing_is_written(good, tmp_path, case, command):
    change, message = CASES[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(change(good))
    flags = {
        "info": [str(file)],
        "export": ["--adapter", str(file), "--format", "peft", "--output", str(tmp_path / "o")],
    }
    with pytest.raises(SystemExit, match=message) as raised:
        main([command, *flags[command]])
    assert str(raised.value).startswith("error: ") and str(file) in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_unchanged_file_is_valid(good, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(good)
    main(["info", str(tmp_path / "x.safetensors")])
    output = capsys.readouterr().out
    assert "rank: 2" in output and "█" in output and "distance |W' - W|_F" in output and "trained lambda" in output


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_rejected_or_harmless(good, tmp_path, data):
    """With bytes changed, removed or inserted anywhere, the file is still a UNet's adapter or raises InputError."""
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(content) - 1, 3000)) | st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "remove", "insert"]))
        if kind == "change":
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "remove":
            del content[position : position + data.draw(st.integers(1, 50))]
        else:
            content[position:position] = data.draw(st.binary(min_size=1, max_size=30))
        if not content:
            break
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(content))
    try:
        header, tensors = read_adapter(file)
        for component, values in header["config"].items():
            low_rank_factors(component, parse_config(file, values), tensors)
    except InputError:
        return
    assert header["config"].keys() == {"unet"}


@pytest.mark.integration
def test_reading_a_large_file_takes_at_most_twice_its_size(good, tmp_path):
    """A file of 200 MB: the peak memory of reading it, above that of the imports, as the system measures it."""
    file = tmp_path / "good.safetensors"
    file.write_bytes(good)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    wide = 12_500_000
    shapes = {"A": (2, wide), "A0": (2, wide), "B": (4, 2), "B0": (4, 2), "lambda": ()}
    tensors = {f"unet.m.delora_{key}": torch.ones(shape) for key, shape in shapes.items()}
    header = json.loads(metadata["delora_diffusers"])
    header["config"]["unet"] |= {"weight_norm": "none", "targets": ["m"]}
    save_file(tensors, file, metadata={"delora_diffusers": json.dumps(header)})
    del tensors
    size = file.stat().st_size
    assert size > 190 * 2**20
    measure = "import resource, sys; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
    measure += "from delora_diffusers.files import reading, low_rank; before = peak(); from pathlib import Path\n"
    measure += f"header, tensors = reading.read_adapter(Path({str(file)!r})); print(peak() - before)"
    process = subprocess.run([sys.executable, "-c", measure], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 2 * size
    assert load_file(file).keys() == {f"unet.m.delora_{key}" for key in shapes}
