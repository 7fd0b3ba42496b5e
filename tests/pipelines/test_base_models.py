"""Base models whose configuration says more than the usual, lacks something, or is damaged: honoured or refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from data.tiny_sd import write
from delora_diffusers import AdapterConfig, InputError, attach, save_adapter
from delora_diffusers.crops import View
from delora_diffusers.families.checks import check_model_folder, check_variant
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.families.pipeline_files import family_named
from delora_diffusers.families.table import family_of
from delora_diffusers.files.reading import read_header
from delora_diffusers.names import recorded_model_name
from delora_diffusers.pipelines.adapted_pipeline import base_model_of
from delora_diffusers.pipelines.conditions import encode_prompts, tokenize, warn_of_truncation
from delora_diffusers.pipelines.noise_schedule import check_ddpm, ddpm_schedule
from delora_diffusers.pipelines.sampling import sample_images
from delora_diffusers.training.encoding import encode_images

pytestmark = pytest.mark.integration  # seconds a test


@pytest.fixture(scope="module")
def tiny_xl(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("xl") / "tiny-xl", kind="sdxl")


def edited(model: Path, tmp_path: Path, file: str, **changes: object) -> str:
    """A copy of a model with changes in one of its JSON files; a value of ... removes the key."""
    folder = shutil.copytree(model, tmp_path / "edited")
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return str(folder)


SCHEDULERS = {
    "sample prediction": ({"prediction_type": "sample"}, "predicts 'sample' and not epsilon or v_prediction"),
    "flow prediction": ({"prediction_type": "flow_prediction"}, "predicts 'flow_prediction'"),
    "EDM": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "has a EDMDPMSolverMultistepScheduler"),
    "EDM Euler": ({"_class_name": "EDMEulerScheduler"}, "has a EDMEulerScheduler"),
    "flow matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "has a FlowMatchEulerDiscreteScheduler"),
    "LCM": ({"_class_name": "LCMScheduler"}, "has a LCMScheduler"),
    "flow sigmas": ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "with flow sigmas"),
    "continuous": (
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"},
        "continuous timesteps",
    ),
}


@pytest.mark.parametrize("case", list(SCHEDULERS))
def test_a_foreign_noise_schedule_is_never_trained_as_ddpm(tiny_sd, tmp_path, case):
    changes, message = SCHEDULERS[case]
    folder = edited(tiny_sd, tmp_path, "scheduler/scheduler_config.json", **changes)
    if "_class_name" in changes:
        index = json.loads((Path(folder) / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", changes["_class_name"]]
        (Path(folder) / "model_index.json").write_text(json.dumps(index))
    pipeline = load_pipeline(folder)
    for check in (check_ddpm, ddpm_schedule):
        with pytest.raises(InputError, match=message):
            check(pipeline.scheduler, folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_the_usual_schedules_give_the_same_noise(tiny_sd, kind, prediction):
    import diffusers

    usual = getattr(diffusers, f"{kind}Scheduler")(prediction_type=prediction, beta_schedule="scaled_linear")
    schedule = ddpm_schedule(usual, "x")
    assert schedule.config["prediction_type"] == prediction
    torch.testing.assert_close(schedule.alphas_cumprod, usual.alphas_cumprod, atol=1e-6, rtol=1e-5)


REFUSED = {
    "shift_factor": ("vae/config.json", {"shift_factor": 0.1}, "an autoencoder with shift_factor 0.1, which a Stable"),
    "latents_mean in 1.x": (
        "vae/config.json",
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "with latents_mean or latents_std, which a StableDiffusionPipeline ignores",
    ),
    "quantized UNet": (
        "unet/config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "the unet of the base model .* is quantized",
    ),
    "quantized text encoder": (
        "text_encoder/config.json",
        {"quantization_config": {"quant_method": "gptq"}},
        "the text_encoder of the base model .* is quantized",
    ),
    "class labels": ("unet/config.json", {"num_class_embeds": 10}, "(could not be loaded|num_class_embeds 10)"),
    "nine channels": ("unet/config.json", {"in_channels": 9}, "(could not be loaded|9 input channels)"),
    "no class of unet": ("model_index.json", {"unet": ["diffusers", "NoSuchModel"]}, "could not be loaded"),
    "another pipeline": ("model_index.json", {"_class_name": "NoSuchPipeline"}, "is a NoSuchPipeline; choose a model"),
    "an inpainting pipeline": (
        "model_index.json",
        {"_class_name": "StableDiffusionInpaintPipeline"},
        "is a StableDiffusionInpaintPipeline; choose a model with one of these: StableDiffusionPipeline, ",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_the_pipeline_would_ignore_is_refused(tiny_sd, tmp_path, case):
    file, changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        load_pipeline(edited(tiny_sd, tmp_path, file, **changes))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("text_encoder/model.safetensors", b"damaged"),
        ("text_encoder/model.safetensors", None),
        ("unet/diffusion_pytorch_model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ("unet/config.json", b"{"),
        ("unet/config.json", b"[]"),
        ("model_index.json", b"\xff\xfe{\0}\0"),
        ("text_encoder/config.json", b'{"architectures": 3}'),
        ("text_encoder/config.json", b'{"hidden_size": "wide"}'),
    ],
)
def test_damaged_files_are_one_sentence(tiny_sd, tmp_path, file, content):
    folder = shutil.copytree(tiny_sd, tmp_path / "damaged")
    if content is None:  # weights as a pickle of something else
        (folder / file).unlink()
        torch.save({"not": "weights"}, folder / "text_encoder" / "pytorch_model.bin")
        (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04damaged")
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_pipeline(str(folder))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


def test_latents_mean_and_std_are_honoured_in_training_and_sampling(tiny_xl, tmp_path):
    mean, std = [2.0, -2.0, 1.0, -1.0], [3.0, 0.5, 2.0, 1.0]
    folder = edited(tiny_xl, tmp_path, "vae/config.json", latents_mean=mean, latents_std=std)
    pipeline = load_pipeline(folder)
    family = family_of("StableDiffusionXLPipeline")
    scale = family.scale(pipeline.vae)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    column = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    m, s = column
    torch.testing.assert_close(scale.scaled(x), (x - m) / s * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(scale.unscaled(scale.scaled(x)), x, atol=1e-5, rtol=1e-5)

    view = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cache = encode_images(family, pipeline.vae, [[View(view, None, (64, 64, 0, 0, 64, 64))]], 1, torch.device("cpu"))
    sampled = cache.sample([0], torch.Generator().manual_seed(1), 0)
    noise = torch.randn(cache.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, scale.scaled(cache.mean + cache.std * noise))

    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    arguments = {"prompt": "x", "num_inference_steps": 2, "height": 64, "width": 64}
    expected = stock(**arguments, generator=torch.Generator().manual_seed(0)).images[0]
    ours = sample_images(pipeline, [0], 64, prompt=["x"], num_inference_steps=2)[0]
    assert np.abs(np.asarray(expected, float) - np.asarray(ours, float)).max() <= 1


def overflowing(model: Path, folder: Path) -> str:
    """A copy of a model whose autoencoder is finite in float32 but overflows in fp16."""
    shutil.copytree(model, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    largest = weights["decoder.conv_in.weight"].abs().max()
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        weights[name] = weights[name] * (5e4 / largest)
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def test_an_autoencoder_that_overflows_is_decoded_again_in_float32(tiny_sd, tmp_path):
    pipeline = load_pipeline(overflowing(tiny_sd, tmp_path / "x"))
    arguments = {"prompt": ["x"], "num_inference_steps": 1}
    expected = np.asarray(sample_images(pipeline, [0], 32, **arguments)[0], float)
    pipeline.to(torch.float16)
    image = np.asarray(sample_images(pipeline, [0], 32, **arguments)[0], float)
    assert pipeline.vae.dtype == torch.float32 and image.max() > 0
    assert np.abs(image - expected).mean() < 10


def test_a_unet_that_overflows_is_said(tiny_sd):
    pipeline = load_pipeline(str(tiny_sd))
    pipeline.unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(InputError, match="the denoiser gave values that are not finite in float32"):
        sample_images(pipeline, [0], 32, prompt=["x"], num_inference_steps=1)


def test_a_tokenizer_without_a_length_takes_the_text_encoders(tiny_sd, tmp_path):
    reference = load_pipeline(str(tiny_sd))
    for file, changes in (
        ("tokenizer/tokenizer_config.json", {"model_max_length": ...}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10_000}),
    ):
        shutil.rmtree(tmp_path / "edited", ignore_errors=True)
        pipeline = load_pipeline(edited(tiny_sd, tmp_path, file, **changes))
        assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings
        prompts = ["a dog", "dog " * 200]
        tokens, expected = (tokenize(p, prompts, "cpu")["text_encoder"] for p in (pipeline, reference))
        assert torch.equal(tokens, expected)
        sample_images(pipeline, [0], 32, prompt=["x"], num_inference_steps=1)
        encode_prompts(pipeline, prompts, "cpu")


def test_a_caption_that_is_cut_is_said(tiny_sd, caplog):
    pipeline = load_pipeline(str(tiny_sd))
    warn_of_truncation(pipeline, ["a dog"])
    assert caplog.messages == []
    warn_of_truncation(pipeline, ["a dog", "a photo of sks dog " + "very " * 90 + "red", "b " * 300])
    (message,) = caplog.messages
    assert message.startswith("truncated: the prompt 'a photo of sks dog very") and "77 are read" in message
    assert "1 more prompts are too long" in message


def rename_to_variant(model: Path, folder: Path, variant: str = "fp16") -> Path:
    shutil.copytree(model, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    return folder


def test_weights_that_exist_only_as_a_variant(tiny_sd, tmp_path):
    folder = rename_to_variant(tiny_sd, tmp_path / "half")
    with pytest.raises(InputError, match=r"has the weights of its \w+ only as variant fp16; pass --variant fp16"):
        load_pipeline(str(folder))
    assert family_named(str(folder), variant="fp16") is family_of("StableDiffusionPipeline")
    pipeline = load_pipeline(str(folder), variant="fp16")
    save_adapter(attach(pipeline.unet, AdapterConfig(rank=2)), tmp_path / "a", base_model=str(folder), variant="fp16")
    base = base_model_of([tmp_path / "a"], None)
    assert (base.name, base.variant) == (str(folder), "fp16")
    assert base_model_of([tmp_path / "a"], "other", variant="bf16").variant == "bf16"
    load_pipeline(base.name, variant=base.variant)


def test_variants_are_recognized_by_name():
    sharded = ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.bin"]
    with pytest.raises(InputError, match="of its unet only as variant fp16"):
        check_variant("x", sharded, None)
    check_variant("x", sharded, "fp16")
    check_variant("x", ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "text_encoder/model.bin"], None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is truncated"),
        ("model.ckpt", "is a pickle, which can run any code"),
        ("sd15.gguf", "is not a .safetensors file"),
    ],
)
def test_a_single_file_that_is_no_model_is_refused_at_once(tmp_path, monkeypatch, name, message):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for given in (name, str(tmp_path / name)):
        with pytest.raises(InputError, match=message):
            check_model_folder(given)


def test_a_local_base_model_is_recorded_so_that_it_is_found_from_anywhere(tiny_sd, tmp_path, monkeypatch):
    shutil.copytree(tiny_sd, tmp_path / "one" / "model")
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    name = recorded_model_name("model")
    adapter = attach(load_pipeline("model").unet, AdapterConfig(rank=2))
    save_adapter(adapter, tmp_path / "a", base_model=name)
    monkeypatch.chdir(tmp_path / "two")
    base = base_model_of([tmp_path / "a"], None)
    assert base.name == str((tmp_path / "one" / "model").resolve())
    load_pipeline(base.name)
    assert recorded_model_name("owner/model") == "owner/model" and recorded_model_name("mini-sd") == "mini-sd"
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(InputError, match="which is not here; give it with --pretrained_model_name_or_path"):
        base_model_of([tmp_path / "a"], None)
    assert read_header(tmp_path / "a")["base_model"] == name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("text_encoder/model.safetensors", "embeddings.token_embedding.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_out.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_single_missing_weight_is_refused(tiny_sd, tmp_path, file, name, pickled):
    """The libraries would fill it at random."""
    folder = shutil.copytree(tiny_sd, tmp_path / "incomplete")
    weights = load_file(folder / file)
    kept = {key: tensor for key, tensor in weights.items() if not key.endswith(name)}
    assert len(kept) == len(weights) - 1
    if pickled:
        (folder / file).unlink()
        stem = "pytorch_model" if file.startswith("text") else "diffusion_pytorch_model"
        torch.save(kept, (folder / file).with_name(f"{stem}.bin"))
    else:
        save_file(kept, folder / file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="(has no weight|could not be loaded)"):
        load_pipeline(str(folder))


def test_weights_in_bin_files_load(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "bin")
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = folder / part / f"{stem}.safetensors"
        torch.save(
            load_file(file),
            folder / part / f"{stem.replace('model', 'pytorch_model') if stem == 'model' else stem}.bin",
        )
        file.unlink()
    load_pipeline(str(folder))


def test_a_tokenizer_without_vocabulary_is_refused(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "wordless")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="(has a tokenizer without vocabulary|could not be loaded)"):
        load_pipeline(str(folder))
