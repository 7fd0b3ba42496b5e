"""Shared fixtures: tiny models, photos and inputs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import multiprocessing.process
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import write_photos

torch.set_num_threads(1)


def pytest_collection_finish():
    """Modules stay until the end: the collections that the library asks for need not visit them each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that starts a Python process fails unless it is marked: that keeps the quick tier quick."""
    if item.get_closest_marker("integration") or item.get_closest_marker("gpu"):
        return (yield)
    popen, complaint = subprocess.Popen.__init__, f"{item.name} starts a process; mark it with pytest.mark.integration"

    def checked_popen(process: subprocess.Popen, command: Any, *arguments: Any, **settings: Any) -> None:
        if not isinstance(command, str) and str(command[0]) in (sys.executable, "bash"):
            pytest.fail(complaint)
        popen(process, command, *arguments, **settings)

    def refuse(*_: object) -> None:
        pytest.fail(complaint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", checked_popen)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        return (yield)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """Folder with a tiny Stable Diffusion pipeline."""
    from data.tiny_sd import write

    return write(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_scorers(tmp_path_factory) -> Path:
    """Folder with a tiny ``dino`` and ``clip``."""
    from data.tiny_scorers import write

    return write(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Folder with five photos to train on."""
    return write_photos(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def unet(tiny_sd):
    """A fresh tiny UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()


@pytest.fixture
def unet_inputs():
    """(sample, timestep, encoder_hidden_states) for the tiny UNet."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 7, 32, generator=generator),
    )
