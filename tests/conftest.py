"""Shared fixtures: tiny models, photos and inputs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

from tests.helpers import write_photos

torch.set_num_threads(1)


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
