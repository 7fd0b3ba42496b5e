"""The parts of a base model: their dtypes, values, variants and files on the hub."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from delora_diffusers import InputError
from delora_diffusers.families.loading import open_model
from tests.helpers import run_in_child
from tests.hub_server import serve_hub


def test_nothing_has_values_when_a_model_is_opened(models):
    for folder in models.values():
        model = open_model(str(folder))
        assert set(model.skeletons) == {"unet", "vae", *model.family.TEXT_ENCODERS}
        for component, skeleton in model.skeletons.items():
            assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers())), component
            assert getattr(model.pipeline, component) is None
        assert model.pipeline.tokenizer is not None and model.pipeline.scheduler is not None


def test_parts_loaded_alone_equal_those_of_the_stock_pipeline(models):
    from diffusers import DiffusionPipeline

    for folder in models.values():
        stock = DiffusionPipeline.from_pretrained(folder)
        model = open_model(str(folder))
        for component in model.skeletons:
            expected = getattr(stock, component).state_dict()
            values = model.load(component, torch.float32).state_dict()
            assert values.keys() == expected.keys()
            assert all(torch.equal(values[name], tensor) for name, tensor in expected.items())


def with_half_unet(model: Path, folder: Path, keep: bool) -> Path:
    """A copy of a model whose UNet has other weights as variant fp16, beside the plain ones or in place of them."""
    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: (tensor + 1).half() for name, tensor in load_file(file).items()}
    save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    if not keep:
        file.unlink()
    return folder


@pytest.mark.parametrize("keep", [True, False])
def test_a_variant_that_only_one_part_has(tiny_sd, tmp_path, keep):
    folder = with_half_unet(tiny_sd, tmp_path / "half", keep)
    plain = {c: open_model(str(tiny_sd)).load(c, torch.float32).state_dict() for c in ("unet", "vae", "text_encoder")}
    model = open_model(str(folder), variant="fp16")
    for component, expected in plain.items():
        values = model.load(component, torch.float32).state_dict()
        shift = 1 if component == "unet" else 0
        for name, tensor in expected.items():
            torch.testing.assert_close(values[name], tensor + shift, atol=2e-3 * shift, rtol=0)
    if keep:
        values = open_model(str(folder)).load("unet", torch.float32).state_dict()
        assert all(torch.equal(values[name], tensor) for name, tensor in plain["unet"].items())
    else:
        with pytest.raises(InputError, match="the weights of its unet only as variant fp16; pass --variant fp16"):
            open_model(str(folder))


def digests(name: str, variant: str | None) -> tuple[str, dict[str, str]]:
    """The folder of a model, and a digest of the values of each of its parts."""
    model, values = open_model(name, variant=variant), {}
    for component in model.skeletons:
        tensors = model.load(component, torch.float32).state_dict()
        content = b"".join(key.encode() + tensors[key].numpy().tobytes() for key in sorted(tensors))
        values[component] = hashlib.sha256(content).hexdigest()
        model.drop(component)
    return str(model.folder), values


def digests_of_hub_ids(names: dict[str, str | None], endpoint: str, cache: Path, file: Path) -> None:
    """Write the digests of these hub ids and variants."""
    from huggingface_hub import constants, hf_api

    # The environment was read when huggingface_hub was imported, which happened before this process was forked.
    constants.HF_HUB_OFFLINE, constants.ENDPOINT, hf_api.api.endpoint = False, endpoint, endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_XET = str(cache), True
    file.write_text(json.dumps({name: digests(name, variant) for name, variant in names.items()}))


@pytest.mark.integration
def test_hub_ids_are_downloaded_and_loaded_part_by_part(models, tmp_path):
    half = with_half_unet(models["sd1"], tmp_path / "half", keep=True)
    folders = {"tiny/sdxl": models["sdxl"], "tiny/half": half}
    variants = {name: "fp16" if name == "tiny/half" else None for name in folders}
    with serve_hub(folders) as (endpoint, requests):
        run_in_child(digests_of_hub_ids, variants, endpoint, tmp_path / "cache", tmp_path / "digests")
    for name, (downloaded, values) in json.loads((tmp_path / "digests").read_text()).items():
        assert Path(downloaded).is_relative_to(tmp_path / "cache"), name
        assert digests(str(folders[name]), variants[name])[1] == values, name
    files = {request.split("/resolve/")[1].split("/", 1)[1] for request in requests if "tiny/half/resolve/" in request}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert "unet/diffusion_pytorch_model.safetensors" not in files
