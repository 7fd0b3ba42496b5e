"""v-prediction and a terminal SNR of zero: in training, at sampling, in adapter files, and from a file's metadata."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_dreambooth_delora
from data.tiny_sd import write
from delora_diffusers import AdapterConfig, InputError, attach, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.commands import generate_model
from delora_diffusers.commands.generate_model import SCHEDULERS
from delora_diffusers.families.loading import OpenModel, open_model
from delora_diffusers.files.reading import read_header
from delora_diffusers.pipelines.adapted_pipeline import base_model_of
from delora_diffusers.training.noising import noising_of
from tests.helpers import training_flags

V_AND_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
FROM_PURE_NOISE = sorted(SCHEDULERS.keys() - {"pndm", "lms"})


def set_scheduler(model: Any, name: str | None, steps: int = 10) -> Any:
    base = SimpleNamespace(name=model.name)
    generate_model.set_scheduler(model.pipeline, Namespace(scheduler=name, num_inference_steps=steps), base)  # pyright: ignore
    return model.pipeline.scheduler


def reference_alphas() -> torch.Tensor:
    """Lin et al., WACV 2024, algorithm 1, on Stable Diffusion's schedule; (1000,), float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    roots = torch.cumprod(1 - betas, 0).sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def test_training_reaches_pure_noise_and_its_weights_stay_finite(tiny_sd):
    model = open_model(str(tiny_sd), **V_AND_ZERO)
    losses = {"loss_type": "l2", "debiased_estimation_loss": False, "huber_c": None, "huber_schedule": None}
    losses |= {"weighting_scheme": None, "logit_mean": None, "logit_std": None, "mode_scale": None}
    args = Namespace(pretrained_model_name_or_path="x", snr_gamma=5.0, noise_offset=0.0, **losses)
    noising: Any = noising_of(model, args)
    alphas = noising.scheduler.alphas_cumprod
    torch.testing.assert_close(alphas.double(), reference_alphas(), atol=1e-6, rtol=1e-4)
    latents = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = noising(latents, torch.Generator().manual_seed(1))
    assert all(torch.isfinite(tensor).all() for tensor in batch.values())
    last = batch["timesteps"] == 999
    assert last.any() and torch.equal(batch["target"][last], -latents[last])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(batch["noisy"][last], noise[last])
    snr = (reference_alphas() / (1 - reference_alphas()))[batch["timesteps"]]
    expected = snr.clamp_max(5) / (
        snr + 1
    )  # Hang et al., of v-prediction; no weight where nothing of the image is left
    torch.testing.assert_close(batch["weights"].double(), expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", [None, *FROM_PURE_NOISE])
def test_samplers_begin_at_pure_noise_and_end_at_the_image(tiny_sd, name):
    """A denoiser that knows the only image: with its v every sampler gives that image, whatever the noise."""
    model = open_model(str(tiny_sd), **V_AND_ZERO)
    scheduler = set_scheduler(model, name, 20)
    assert int(scheduler.timesteps[0]) == 999
    alphas = reference_alphas().float()
    image, generator = torch.tensor([[[[0.7, -1.2], [0.1, 2.0]]]]), torch.Generator().manual_seed(3)
    sample = torch.randn(image.shape, generator=generator) * scheduler.init_noise_sigma
    extra = {} if name in ("dpm++", "unipc") else {"generator": generator}
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(sample, t)
        alpha = alphas[int(t)]
        noise = (noisy - alpha.sqrt() * image) / (1 - alpha).sqrt()
        sample = scheduler.step(alpha.sqrt() * noise - (1 - alpha).sqrt() * image, t, sample, **extra).prev_sample
    torch.testing.assert_close(sample, image, atol=0.08, rtol=0.02)


def test_what_cannot_be_right_is_refused(tiny_sd, tmp_path):
    def refused(message: str, action: Any) -> None:
        with pytest.raises(InputError, match=message):
            action()

    refused("predicts epsilon, which does not", lambda: open_model(str(tiny_sd), rescale_betas_zero_snr=True))
    for name in ("pndm", "lms"):
        model = open_model(str(tiny_sd), **V_AND_ZERO)
        refused(f"--scheduler {name} does not begin at pure noise", lambda m=model, n=name: set_scheduler(m, n))
    from data.tiny_pipelines import write as write_pipeline

    flow = write_pipeline(tmp_path / "flow", "zimage")
    refused("--prediction_type does not apply to .* a flow", lambda: open_model(str(flow), prediction_type="epsilon"))
    refused("--rescale_betas_zero_snr does not", lambda: open_model(str(flow), rescale_betas_zero_snr=True))


def test_a_scheduler_that_cannot_begin_at_pure_noise_becomes_ddim(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "pndm")
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "scheduler" / "scheduler_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith(("clip", "_"))}
    file.write_text(json.dumps(config | {"_class_name": "PNDMScheduler"}))
    assert type(open_model(str(folder), prediction_type="v_prediction").pipeline.scheduler).__name__ == "PNDMScheduler"
    scheduler = open_model(str(folder), **V_AND_ZERO).pipeline.scheduler
    assert type(scheduler).__name__ == "DDIMScheduler" and scheduler.config.clip_sample is False
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.beta_start == 0.00085


def test_a_file_tells_what_it_predicts(tmp_path):
    folder = write(tmp_path / "xl", kind="sdxl")
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, marks, metadata, expected in (
        ("none", {}, {}, ("epsilon", None)),
        ("marks", {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, ("v_prediction", True)),
        ("recorded", {}, {"modelspec.prediction_type": "v"}, ("v_prediction", None)),
    ):
        save_file(unet | marks, tmp_path / f"{name}.safetensors", metadata=metadata)
        options: dict[str, Any] = {"model_config": str(folder)}
        model = open_model(str(tmp_path / f"{name}.safetensors"), **options)
        config = model.pipeline.scheduler.config
        assert (config.prediction_type, config.get("rescale_betas_zero_snr") or None) == expected, name
    model = open_model(
        str(tmp_path / "marks.safetensors"), **options, prediction_type="epsilon", rescale_betas_zero_snr=False
    )
    assert model.pipeline.scheduler.config.prediction_type == "epsilon"


def test_adapters_record_what_they_were_told(unet, tmp_path):
    adapter = attach(unet, AdapterConfig(rank=2))
    plain, recorded = save_adapter(adapter, tmp_path / "a", base_model="x/y"), tmp_path / "b"
    save_adapter(adapter, recorded, base_model="x/y", model_config="x/z", **V_AND_ZERO)
    assert set(read_header(plain)) == {"format_version", "base_model", "config"}
    base = base_model_of([recorded], None)
    assert (base.model_config, base.prediction_type, base.rescale_betas_zero_snr) == ("x/z", "v_prediction", True)
    elsewhere = base_model_of([recorded], "other", prediction_type="epsilon")
    assert (elsewhere.model_config, elsewhere.prediction_type) == (None, "epsilon")
    with pytest.raises(InputError, match="was trained with prediction_type None and .* with v_prediction; choose one"):
        base_model_of([plain, recorded], None)
    for wrong in ({"prediction_type": "sample"}, {"rescale_betas_zero_snr": 1}, {"model_config": 3}):
        save_adapter(adapter, tmp_path / "c", base_model="x/y", **wrong)
        with pytest.raises(InputError, match="not an adapter saved by delora-diffusers"):
            read_header(tmp_path / "c")


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def train(model: object, photographs: Path, output: Path, *more: object) -> dict[str, torch.Tensor]:
    flags = ("--max_train_steps", 2, "--validation_prompt", "a toy", "--validation_steps", 2, "--snr_gamma", 5)
    few = ("--validation_inference_steps", 2, "--num_validation_images", 1)
    train_dreambooth_delora.main(training_flags(model, photographs, output, *flags, *few, *more))  # pyright: ignore
    return load_file(output / "pytorch_delora_weights.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def generate(output: Path, *more: object) -> list[np.ndarray]:
    words = ["--prompt", "a sks toy", "--num_images", 2, "--num_inference_steps", 3, "--output_dir", output, *more]
    main(["generate", *map(str, words)])
    return pixels(output)


@pytest.mark.integration
def test_flags_train_and_sample_as_a_configured_folder_does(tiny_sd, photographs, tmp_path, monkeypatch):
    configured = shutil.copytree(tiny_sd, tmp_path / "configured")
    file = configured / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | V_AND_ZERO | {"timestep_spacing": "trailing"}
    file.write_text(json.dumps(config))
    flags = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    expected = train(configured, photographs, tmp_path / "e")
    assert_same(train(tiny_sd, photographs, tmp_path / "f", *flags), expected)
    plain = train(tiny_sd, photographs, tmp_path / "p")
    assert not all(torch.equal(plain[name], tensor) for name, tensor in expected.items())
    for image in ("validation/step-000002.png", "samples/00.png"):
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "e" / image)), np.asarray(Image.open(tmp_path / "f" / image))
        )
    images = generate(tmp_path / "ei", "--adapter", tmp_path / "e")
    for one, other in zip(images, generate(tmp_path / "fi", "--adapter", tmp_path / "f")):
        assert np.array_equal(one, other)
    records = (tmp_path / "fi" / "metadata.jsonl").read_text()
    assert '"prediction_type": "v_prediction"' in records and '"rescale_betas_zero_snr": true' in records
    without = generate(tmp_path / "pi", "--adapter", tmp_path / "f", "--no-rescale_betas_zero_snr")
    assert not np.array_equal(images[0], without[0])
    main(["merge", "--adapter", str(tmp_path / "f"), "--output_dir", str(tmp_path / "merged")])
    for one, other in zip(images, generate(tmp_path / "mi", "--pretrained_model_name_or_path", tmp_path / "merged")):
        assert np.abs(one.astype(int) - other).max() <= 1


def aligned(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_training_and_generating_from_a_file_give_the_bytes_of_its_folder(kind, photographs, tmp_path, monkeypatch):
    folder = write(tmp_path / "folder", kind=kind)
    unet = open_model(str(folder)).load("unet", torch.float32)
    nothing = save_adapter(attach(unet, AdapterConfig(rank=1)), tmp_path / "nothing", base_model=str(folder))
    main(["merge", "--adapter", str(nothing), "--single_file", str(tmp_path / "m.safetensors")])
    # Weights are mapped from files, and the last bits of a product depend on how its factors lie in memory.
    load = OpenModel.load
    monkeypatch.setattr(OpenModel, "load", lambda *words, **options: aligned(load(*words, **options)))
    monkeypatch.chdir(tmp_path)
    more = ("--train_text_encoder", "--mixed_precision", "no")
    config = ("--model_config", "folder")
    expected = train(folder, photographs, tmp_path / "e", *more)
    assert_same(train("m.safetensors", photographs, tmp_path / "f", *more, *config), expected)
    monkeypatch.chdir(tmp_path / "e")  # the adapter finds both from anywhere
    images, of_file = (generate(tmp_path / f"{run}i", "--adapter", tmp_path / run) for run in "ef")
    assert len(images) == 2 and all(np.array_equal(one, other) for one, other in zip(images, of_file))
    header = read_header(tmp_path / "f")
    assert header["base_model"] == str(tmp_path / "m.safetensors") and header["model_config"] == str(folder)
    assert "from_single_file('m.safetensors', config='folder'" in (tmp_path / "f" / "README.md").read_text()
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(["generate", "--adapter", str(tmp_path / "f"), "--prompt", "x", "--output_dir", str(tmp_path / "x")])
