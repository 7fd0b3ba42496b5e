"""Tiny models of each family, and adapters for them."""

from pathlib import Path

import pytest
import torch

from data.tiny_sd import write
from delora_diffusers import AdapterConfig, attach, save_adapter
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from delora_diffusers.pipelines.conditions import text_encoders
from tests.helpers import randomize


@pytest.fixture(scope="session")
def models(tiny_sd, tmp_path_factory) -> dict[str, Path]:
    return {"sd1": tiny_sd, "sdxl": write(tmp_path_factory.mktemp("xl") / "tiny-xl", kind="sdxl")}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset accelerate's state, which otherwise lasts as long as the process."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def save_random_adapter(model: Path, folder: Path, seed: int, with_text: bool) -> Path:
    """Save an adapter with random parameters, of the text encoders too if asked for."""
    pipeline = load_pipeline(str(model))
    adapters = {"unet": attach(pipeline.unet, AdapterConfig(rank=2), torch.Generator().manual_seed(seed))}
    config = AdapterConfig(rank=2, targets=TEXT_ENCODER_TARGETS)
    for name, encoder in text_encoders(pipeline).items() if with_text else ():
        adapters[name] = attach(encoder, config, torch.Generator().manual_seed(seed + 1))
    for adapter in adapters.values():
        randomize(adapter, 0.5)
    unet = adapters.pop("unet")
    save_adapter(unet, folder, text_encoders=adapters, base_model=str(model), pipeline=type(pipeline).__name__)
    return folder


@pytest.fixture(scope="session")
def adapters(models, tmp_path_factory) -> dict[tuple[str, bool], list[Path]]:
    """Two adapters by the kind of the model and whether they adapt the text encoders."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        (kind, text): [
            save_random_adapter(models[kind], folder / f"{kind}-{text}-{seed}", seed, text) for seed in (0, 5)
        ]
        for kind in models
        for text in (False, True)
    }
