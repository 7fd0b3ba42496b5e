"""Loading a part of a base model takes as much host memory as the part in its dtype, and no float32 copy beside it."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from delora_diffusers.families.loading import open_model
from tests.helpers import run_in_child

pytestmark = pytest.mark.integration

MIB = 2**20
WIDTHS = (128, 256, 704)
"""Of a UNet with 0.4 GB of float32 weights."""
MARGIN = 48
"""MiB beside the weights: a weight is read in float32, and those are at most 34 MiB."""


def anonymous_memory(pid: int) -> float:
    """MiB of a process that no file backs; the pages of a mapped file can be dropped at any time."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(value) / 1024


def write_large_unet(model: Path, folder: Path, shard: str) -> tuple[Path, float]:
    """A copy of the tiny model with a large UNet in float32; returns it and the MiB of the UNet in float32."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae")
    config = json.loads((model / "unet" / "config.json").read_text())
    config |= {"block_out_channels": WIDTHS, "attention_head_dim": 8, "norm_num_groups": 32}
    config |= {"down_block_types": ["DownBlock2D"] * 2 + ["CrossAttnDownBlock2D"]}
    config |= {"up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * 2}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    unet.to_empty(device="cpu").requires_grad_(False)
    for parameter in unet.parameters():
        parameter.fill_(0.5)
    unet.save_pretrained(folder / "unet", max_shard_size=shard)
    return folder, sum(p.numel() * 4 for p in unet.parameters()) / MIB


def load(folder: str, dtype: torch.dtype, connection: Connection) -> None:
    """Load the UNet on request, and say when it is loaded."""
    model = open_model(folder)
    model.load("vae", torch.float32)  # what is imported and allocated once is not counted
    connection.send(os.getpid())
    connection.recv()
    unet = model.load("unet", dtype)
    connection.send({parameter.dtype for parameter in unet.parameters()})
    connection.recv()


def loading_peak(folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """MiB that loading a UNet takes in a new process, at its peak and afterwards."""
    here, there = multiprocessing.Pipe()
    with ThreadPoolExecutor() as executor:
        child = executor.submit(run_in_child, load, str(folder), dtype, there)

        def answer() -> Any:
            while not here.poll(0.01):
                if child.done():
                    child.result()  # raises its error
            return here.recv()

        process = answer()
        before = peak = anonymous_memory(process)
        here.send("load")
        while not here.poll(0.0005) and not child.done():
            peak = max(peak, anonymous_memory(process))
        assert answer() == {dtype}
        after = anonymous_memory(process)
        here.send("end")
        child.result()
    return max(peak, after) - before, after - before


@pytest.fixture(scope="module", params=["1GB", "100MB"], ids=["one file", "shards"])
def large(tiny_sd, tmp_path_factory, request):
    """A model with a large UNet in float32, and the MiB of that UNet; its files are removed at the end."""
    folder, size = write_large_unet(tiny_sd, tmp_path_factory.mktemp("large") / "model", request.param)
    files = list((folder / "unet").glob("*.safetensors"))
    assert (len(files) > 2) == (request.param == "100MB") and 350 < size < 450
    yield folder, size
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_no_float32_copy_of_the_unet_is_in_host_memory(large, dtype):
    folder, size = large
    peak, after = loading_peak(folder, dtype)
    assert size / 2 - 8 < after < size / 2 + 16
    assert peak < size / 2 + MARGIN, f"{peak:.0f} MiB for {size / 2:.0f} MiB of weights"
