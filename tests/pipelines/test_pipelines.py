"""Stable Diffusion 1.x, 2.x and XL: train, generate, and compare with stock diffusers and PEFT after each export."""

import json
import re

import numpy as np
import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from data.tiny_sd import KINDS, write
from delora_diffusers import AdapterConfig, attach, load_adapter, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from delora_diffusers.pipelines.adapted_pipeline import AdaptedPipeline
from delora_diffusers.pipelines.conditions import encode_prompts, text_encoders
from tests.helpers import randomize, run_in_child, together_flags, train, training_flags, write_photos

pytestmark = pytest.mark.integration  # seconds a test

PROMPT, STEPS = "a sks dog", 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: write(folder / kind, kind=kind) for kind in KINDS}


def sample(pipeline) -> np.ndarray:
    """Sample an image, 0 to 1, from a stock pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=STEPS, generator=generator, output_type="np").images[0]


def save_randomized(model, folder, config: AdapterConfig, with_text: bool):
    """Save an adapter with random parameters; returns the image that our own pipeline generates with it."""
    pipeline = load_pipeline(str(model))
    unet = attach(pipeline.unet, config, torch.Generator().manual_seed(0))
    # Without a bound, a scale of 0.5 gives 10x the weights, and rounding errors then change the image completely.
    scale = 0.5 if config.method == "delora" else 0.1
    randomize(unet, scale)
    texts = {}
    if with_text:
        for name, encoder in text_encoders(pipeline).items():
            text_config = AdapterConfig(**config.__dict__ | {"targets": TEXT_ENCODER_TARGETS})
            texts[name] = attach(encoder, text_config, torch.Generator().manual_seed(1))
            randomize(texts[name], scale)
    kind = type(pipeline).__name__
    save_adapter(unet, folder, text_encoders=texts, base_model=str(model), pipeline=kind)
    fresh = load_pipeline(str(model))
    base = sample(fresh)
    AdaptedPipeline(fresh, [folder]).use([(folder, 1.0)])
    ours = sample(fresh)
    assert np.abs(ours - base).max() > 0.02
    return ours


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("config", "with_text"),
    [
        (AdapterConfig(rank=4), True),
        (AdapterConfig(rank=4, start="zero"), False),
        (AdapterConfig(rank=4, weight_norm="frobenius"), False),
        (AdapterConfig(rank=4, start="zero", weight_norm="frobenius"), True),
        (AdapterConfig(rank=4, method="lora"), True),
    ],
    ids=["frozen column", "zero column", "frozen frobenius", "zero frobenius", "lora"],
)
def test_stock_diffusers_generates_the_same_image_from_an_export(models, tmp_path, kind, config, with_text):
    ours = save_randomized(models[kind], tmp_path / "adapter", config, with_text)
    export = ["export", "--adapter", str(tmp_path / "adapter"), "--format"]
    for name in ("diffusers", "kohya"):
        file = tmp_path / f"{name}.safetensors"
        main([*export, name, "--output", str(file)])
        pipeline = DiffusionPipeline.from_pretrained(models[kind])
        pipeline.load_lora_weights(str(file))
        assert np.abs(sample(pipeline) - ours).max() < 1e-4, name
    main([*export, "peft", "--output", str(tmp_path / "peft")])
    pipeline = DiffusionPipeline.from_pretrained(models[kind])
    for name in ["unet", *text_encoders(pipeline)] if with_text else ["unet"]:
        folder = tmp_path / "peft" / name if with_text else tmp_path / "peft"
        setattr(pipeline, name, peft.PeftModel.from_pretrained(getattr(pipeline, name), folder))
    assert np.abs(sample(pipeline) - ours).max() < 1e-4


SD_BLOCK = r"(down_blocks_\d+|up_blocks_\d+|mid_block)_attentions_\d+"
SGM_BLOCK = r"(input_blocks_\d+_1|output_blocks_\d+_1|middle_block_1)"
PROJECTION = r"_transformer_blocks_\d+_attn[12]_to_(q|k|v|out_0)"
TEXT = r"_text_model_encoder_layers_\d+_self_attn_(q|k|v|out)_proj"
GRAMMAR = {
    "sd1": rf"lora_unet_{SD_BLOCK}{PROJECTION}|lora_te{TEXT}",
    "sd2": rf"lora_unet_{SD_BLOCK}{PROJECTION}|lora_te{TEXT}",
    "sdxl": rf"lora_unet_{SGM_BLOCK}{PROJECTION}|lora_te[12]{TEXT}",
}
"""Module names as sd-scripts writes them; each module has lora_down.weight, lora_up.weight and alpha."""


@pytest.mark.parametrize("kind", list(KINDS))
def test_kohya_files_follow_the_grammar(models, tmp_path, kind):
    save_randomized(models[kind], tmp_path / "adapter", AdapterConfig(rank=4), True)
    file = tmp_path / "lora.safetensors"
    main(
        [
            "export",
            "--adapter",
            str(tmp_path / "adapter"),
            "--format",
            "kohya",
            "--output",
            str(file),
            "--dtype",
            "fp16",
        ]
    )
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(file).items():
        module, _, key = name.partition(".")
        assert re.fullmatch(GRAMMAR[kind], module), name
        modules.setdefault(module, {})[key] = tensor
    for module, tensors in modules.items():
        assert tensors.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}, module
        assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
        rank = tensors["lora_down.weight"].shape[0]
        assert tensors["lora_up.weight"].shape[1] == rank == tensors["alpha"] and tensors["alpha"].shape == ()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "8"
    assert metadata["ss_base_model_version"] == ("sdxl_base_v1-0" if kind == "sdxl" else "sd_v1")


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
@pytest.mark.parametrize("with_text", [False, True])
def test_dreambooth_from_training_to_images(models, photographs, tmp_path, kind, with_text):
    """After training with validation, ``generate`` writes the image that stock diffusers generates from the export."""
    out, images = tmp_path / "out", tmp_path / "images"
    flags = training_flags(models[kind], photographs, out, "--resolution", 64, "--random_flip", "--train_batch_size", 2)
    flags += ["--validation_prompt", "a toy", "--validation_inference_steps", "2", "--num_validation_images", "1"]
    run_in_child(train, [*flags, *(["--train_text_encoder"] if with_text else [])])
    assert (out / "validation" / "step-000006.png").is_file()
    saved = load_file(out / "pytorch_delora_weights.safetensors")
    components = {name.partition(".")[0] for name in saved}
    assert components == {
        "unet",
        *({"text_encoder"} if with_text else {}),
        *({"text_encoder_2"} if with_text and kind == "sdxl" else {}),
    }
    trained = [n for n in saved if n.endswith("delora_B") and not torch.equal(saved[n], saved[n + "0"])]
    assert len(trained) == sum(name.endswith("delora_B") for name in saved)
    flags = ["--adapter", str(out), "--prompt", PROMPT, "--num_images", "1", "--num_inference_steps", str(STEPS)]
    main(["generate", *flags, "--output_dir", str(images), "--guidance_scale", "5"])
    main(["export", "--adapter", str(out), "--format", "diffusers", "--output", str(tmp_path / "lora.safetensors")])
    pipeline = DiffusionPipeline.from_pretrained(models[kind])
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
    stock = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings, output_type="pil").images[0]
    record = json.loads((images / "metadata.jsonl").read_text())
    from PIL import Image

    ours = np.asarray(Image.open(images / record["file_name"]), dtype=int)
    assert np.abs(ours - np.asarray(stock, dtype=int)).max() <= 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_conditions_equal_those_of_the_stock_pipeline(models, kind):
    pipeline = load_pipeline(str(models[kind]))
    ours = encode_prompts(pipeline, ["a dog", "a cat in the snow"], "cpu")
    theirs = pipeline.encode_prompt(
        ["a dog", "a cat in the snow"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs[0])
    if kind == "sdxl":
        torch.testing.assert_close(ours["text_embeds"], theirs[2])


def test_size_conditions_of_xl():
    from delora_diffusers.crops import crop_boxes, scaled_size, views_of

    views = views_of(Image.new("RGB", (300, 200)), (100, 100), [0.0, 1.0], flip=True)
    assert scaled_size((300, 200), (100, 100)) == (150, 100)
    assert crop_boxes((300, 200), (100, 100), [0.0, 1.0]) == [(0, 0, 100, 100), (50, 0, 150, 100)]
    # In the mirror image the left crop is on the right.
    assert [view.sizes for view in views] == [(200, 300, 0, left, 100, 100) for left in (0, 50, 50, 0)]


def test_text_encoder_adapters_load_with_either_naming(models, tmp_path):
    """Transformers removed the outer module of CLIP's text model; files written before and after this both load."""
    from safetensors.torch import save_file

    save_randomized(models["sd1"], tmp_path, AdapterConfig(rank=4), True)
    file = tmp_path / "pytorch_delora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    renamed = {}
    for name, tensor in load_file(file).items():
        inner = name.removeprefix("text_encoder.")
        if inner != name:
            inner = inner.removeprefix("text_model.") if inner.startswith("text_model.") else f"text_model.{inner}"
            name = f"text_encoder.{inner}"
        renamed[name] = tensor
    save_file(renamed, file, metadata=metadata)
    pipeline = load_pipeline(str(models["sd1"]))
    assert len(load_adapter(pipeline.text_encoder, file, "text_encoder").names) == 8


def test_the_miniature_exported(tmp_path):
    """With a trained model and its scheduler, stock diffusers generates the same image from an export."""
    folder = str(load_pipeline(None).config["_name_or_path"])
    ours = save_randomized(folder, tmp_path / "a", AdapterConfig(rank=4), False)
    file = str(tmp_path / "lora.safetensors")
    main(["export", "--adapter", str(tmp_path / "a"), "--format", "diffusers", "--output", file])
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.load_lora_weights(file)
    assert np.abs(sample(pipeline) - ours).max() < 1e-4


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_merged_folder_is_complete_and_generates_the_same_image(models, tmp_path, kind):
    """Weights keep the model's dtype and are rounded once; everything is copied except a pickle of the old weights."""
    import shutil

    model = shutil.copytree(models[kind], tmp_path / "model")
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old weights")
    (model / "notes.txt").write_text("keep me")
    ours = save_randomized(model, tmp_path / "a", AdapterConfig(rank=4), True)
    merge = ["merge", "--adapter", str(tmp_path / "a"), "--output_dir"]
    main([*merge, str(tmp_path / "merged")])
    assert np.abs(sample(DiffusionPipeline.from_pretrained(tmp_path / "merged")) - ours).max() < 1e-5
    files = {p.relative_to(model) for p in model.rglob("*") if p.is_file()}
    copied = {p.relative_to(tmp_path / "merged") for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    assert {str(p) for p in files - copied} == {"unet/diffusion_pytorch_model.bin"} and copied <= files

    half = DiffusionPipeline.from_pretrained(model).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    main([*merge, str(tmp_path / "merged-half"), "--pretrained_model_name_or_path", str(tmp_path / "half")])
    pipeline = load_pipeline(str(tmp_path / "half"))
    for component in ("unet", *text_encoders(pipeline)):
        part = getattr(pipeline, component)
        adapter = load_adapter(part, tmp_path / "a", component)
        (file,) = (tmp_path / "merged-half" / component).glob("*.safetensors")
        merged = load_file(file)
        for name in adapter.names:
            key = name if f"{name}.weight" in merged else f"text_model.{name}"
            assert merged[f"{key}.weight"].dtype == torch.float16
            assert torch.equal(merged[f"{key}.weight"], adapter.weight(name).half()), name


def test_merge_rejects_another_model(models, tmp_path):
    save_randomized(models["sd1"], tmp_path / "a", AdapterConfig(rank=4), False)
    for kind, message in (
        ("sd2", r"has A of shape \(\d+, 32\), not \(\d+, 48\)"),
        ("sdxl", r"has A of shape \(\d+, 32\), not \(\d+, 80\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            flags = ["--pretrained_model_name_or_path", str(models[kind]), "--output_dir", str(tmp_path / "m")]
            main(["merge", "--adapter", str(tmp_path / "a"), *flags])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_subjects_of_xl_trained_at_once(models, tmp_path):
    """Each sample keeps its sizes, crops and pooled embeddings, with prior preservation as well."""
    folders = [write_photos(tmp_path / name, count) for name, count in (("a", 3), ("b", 4))]
    more = ["--train_batch_size", 2, "--learning_rate", 1e-3, "--random_flip", "--with_prior_preservation"]
    more += ["--class_prompt", "a toy", "--num_class_images", 2, "--validation_inference_steps", 1]
    flags = together_flags(models["sdxl"], tmp_path / "together", folders, *more, "--max_train_steps", 3)
    run_in_child(train, flags)
    alone_flags = ("--instance_prompt", "a sks b", "--seed", 1, "--max_train_steps", 3)
    run_in_child(train, training_flags(models["sdxl"], folders[1], tmp_path / "alone", *more, *alone_flags))

    file = "pytorch_delora_weights.safetensors"
    alone, together = load_file(tmp_path / "alone" / file), load_file(tmp_path / "together" / "b" / file)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=1e-4)
