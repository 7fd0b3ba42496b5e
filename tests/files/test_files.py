"""Adapter files: round trips, and a clear one-sentence error for files that cannot be used."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from delora_diffusers import AdapterConfig, InputError, attach, attached_adapter, detach, load_adapter, save_adapter
from tests.helpers import randomize


@pytest.fixture
def saved(unet, tmp_path):
    adapter = attach(unet, AdapterConfig(rank=4))
    randomize(adapter)
    return save_adapter(adapter, tmp_path / "out", base_model="some/model")


@pytest.mark.parametrize(
    "config", [AdapterConfig(rank=4), AdapterConfig(rank=4, start="zero", weight_norm="frobenius")]
)
def test_save_load_save_gives_the_same_bytes(unet, unet_inputs, tmp_path, config):
    adapter = attach(unet, config)
    randomize(adapter)
    with torch.no_grad():
        output = unet(*unet_inputs).sample
    first = save_adapter(adapter, tmp_path / "a", base_model="some/model")
    detach(unet)
    adapter = load_adapter(unet, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(unet(*unet_inputs).sample, output)
    second = save_adapter(adapter, tmp_path / "b.safetensors", base_model="some/model")
    assert first.read_bytes() == second.read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["pytorch_delora_weights.safetensors"]


@pytest.mark.integration
def test_another_process_writes_the_same_bytes(unet, saved, tiny_sd, tmp_path):
    script = (
        "import sys; from diffusers import UNet2DConditionModel as U; from delora_diffusers import *\n"
        "u = U.from_pretrained(sys.argv[1], subfolder='unet'); a = load_adapter(u, sys.argv[2])\n"
        "save_adapter(a, sys.argv[3], base_model='some/model')"
    )
    copy = tmp_path / "copy.safetensors"
    subprocess.run([sys.executable, "-c", script, str(tiny_sd), str(saved), str(copy)], check=True)
    assert copy.read_bytes() == saved.read_bytes()


def test_names_and_shapes_in_the_file(saved):
    tensors = load_file(saved)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k."
    shapes = {key.removeprefix(name): tuple(t.shape) for key, t in tensors.items() if key.startswith(name)}
    assert shapes == {
        "delora_A": (4, 32),
        "delora_B": (64, 4),
        "delora_lambda": (),
        "delora_w_norm": (32,),
        "delora_A0": (4, 32),
        "delora_B0": (64, 4),
    }


def rewrite(path, tensors=None, **header):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["delora_diffusers"]) | header
    save_file(tensors or load_file(path), path, metadata={"delora_diffusers": json.dumps(metadata)})


def test_rejects_files_that_are_not_adapters(unet, saved, tmp_path):
    detach(unet)
    cases = {}
    (tmp_path / "text").write_text("this is certainly not a tensor file, is it? " * 3)
    cases["text"] = "is not a safetensors file"
    (tmp_path / "empty").write_bytes(b"")
    cases["empty"] = "is truncated"
    (tmp_path / "half").write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    cases["half"] = "is truncated"
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    cases["other"] = "not an adapter saved by delora-diffusers"
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            load_adapter(unet, tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
    with pytest.raises(InputError, match="no adapter at"):
        load_adapter(unet, tmp_path / "nowhere")
    assert attached_adapter(unet) is None


def test_rejects_nan_newer_versions_and_other_architectures(unet, saved, tiny_sd):
    detach(unet)
    original = saved.read_bytes()
    tensors = load_file(saved)
    key = next(name for name in sorted(tensors) if name.endswith("delora_B"))
    tensors[key][0, 0] = torch.nan
    rewrite(saved, tensors)
    with pytest.raises(InputError, match=f"not finite in {key}"):
        load_adapter(unet, saved)

    saved.write_bytes(original)
    rewrite(saved, format_version=2)
    with pytest.raises(InputError, match="format version 2, newer than 1"):
        load_adapter(unet, saved)

    saved.write_bytes(original)
    from diffusers import UNet2DConditionModel

    wider = UNet2DConditionModel.from_config(dict(unet.config) | {"cross_attention_dim": 48})
    with pytest.raises(
        InputError, match=r"a different architecture.*: unet\.\S+ is \(4, 32\) in the file and \(4, 48\) in"
    ):
        load_adapter(wider, saved)
    assert attached_adapter(wider) is None
    with pytest.raises(InputError, match="has no text_encoder; choose from unet"):
        load_adapter(unet, saved, "text_encoder")


def test_full_disk_leaves_no_partial_file(unet, saved, tmp_path, monkeypatch):
    import delora_diffusers.files.writing as writing

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    adapter = attached_adapter(unet)
    assert adapter is not None
    with pytest.raises(InputError, match="No space left on device.*free some space"):
        save_adapter(adapter, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
