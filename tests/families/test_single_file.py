"""Base models in one file: opened by their header, loaded part by part, equal to the folders that they came from."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.tiny_sd import write
from delora_diffusers import AdapterConfig, InputError, attach, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.families.checkpoint_names import layout_of, new_layout
from delora_diffusers.families.checks import check_model_folder
from delora_diffusers.families.clip_tokenizer import clip_tokenizer
from delora_diffusers.families.loading import load_pipeline, open_model
from delora_diffusers.families.pipeline_files import family_named
from delora_diffusers.families.single_file import CONFIGURATIONS, open_single_file
from delora_diffusers.methods.config import EVERYTHING, TEXT_ENCODER_TARGETS
from delora_diffusers.names import hub_file
from tests.helpers import randomize, run_in_child
from tests.hub_server import connect, serve_hub

pytestmark = pytest.mark.integration  # a minute in all on a busy core, most tests over a second

UNET = "model.diffusion_model."
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def adapter_for(folder: Path, output: Path, **config: Any) -> Path:
    """An adapter of all of a model's denoiser and text encoders, away from its start."""
    model = open_model(str(folder))
    encoders = {}
    for number, name in enumerate(model.text_encoders):
        generator = torch.Generator().manual_seed(number + 1)
        settings = AdapterConfig(targets=TEXT_ENCODER_TARGETS, rank=2, **config)
        encoders[name] = attach(model.load(name, torch.float32), settings, generator)
        randomize(encoders[name], 0.5)
    unet = model.load("unet", torch.float32)
    adapter = attach(unet, AdapterConfig(rank=2, **config), torch.Generator().manual_seed(0))
    randomize(adapter, 0.5)
    return save_adapter(adapter, output, text_encoders=encoders, base_model=str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: write(root / kind, kind=kind) for kind in PIPELINES}


@pytest.fixture(scope="module")
def nothing(folders, tmp_path_factory) -> dict[str, Path]:
    """An adapter of each model that changes nothing."""
    root, adapters = tmp_path_factory.mktemp("nothing"), {}
    for kind, folder in folders.items():
        unet = open_model(str(folder)).load("unet", torch.float32)
        adapters[kind] = save_adapter(attach(unet, AdapterConfig(rank=1)), root / kind, base_model=str(folder))
    return adapters


@pytest.fixture(scope="module")
def files(folders, nothing, tmp_path_factory) -> dict[str, Path]:
    """Each folder as one file."""
    root, written = tmp_path_factory.mktemp("files"), {}
    for kind in folders:
        written[kind] = root / f"{kind}.safetensors"
        main(["merge", "--adapter", str(nothing[kind]), "--single_file", str(written[kind])])
    return written


def values(name: Path | str, **options: Any) -> dict[str, torch.Tensor]:
    """Every tensor of every part of a model."""
    model = open_model(str(name), **options)
    parts = {c: model.load(c, torch.float32).state_dict() for c in model.skeletons}
    return {f"{component}/{name}": tensor for component, part in parts.items() for name, tensor in part.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
CLIPS_OF_XL = "conditioner.embedders."
KNOWN_NAMES = {
    "sd1": {
        "unet/down_blocks.0.resnets.0.time_emb_proj.weight": UNET + "input_blocks.1.0.emb_layers.1.weight",
        "unet/down_blocks.0.downsamplers.0.conv.bias": UNET + "input_blocks.3.0.op.bias",
        "unet/mid_block.attentions.0.proj_in.weight": UNET + "middle_block.1.proj_in.weight",
        "unet/up_blocks.0.upsamplers.0.conv.weight": UNET + "output_blocks.2.1.conv.weight",
        "unet/up_blocks.1.upsamplers.0.conv.weight": UNET + "output_blocks.5.2.conv.weight",
        "unet/up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight": UNET
        + "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
        "vae/decoder.up_blocks.0.resnets.2.conv1.weight": "first_stage_model.decoder.up.3.block.2.conv1.weight",
        "vae/encoder.mid_block.attentions.0.to_out.0.bias": "first_stage_model.encoder.mid.attn_1.proj_out.bias",
        "text_encoder/encoder.layers.11.mlp.fc1.bias": CLIP + "encoder.layers.11.mlp.fc1.bias",
    },
    "sd2-v": {
        "text_encoder/encoder.layers.22.mlp.fc2.bias": OPEN_CLIP + "transformer.resblocks.22.mlp.c_proj.bias",
        "text_encoder/encoder.layers.3.self_attn.k_proj.weight": OPEN_CLIP
        + "transformer.resblocks.3.attn.in_proj_weight",
        "text_encoder/embeddings.position_embedding.weight": OPEN_CLIP + "positional_embedding",
    },
    "sdxl": {
        "unet/add_embedding.linear_2.bias": UNET + "label_emb.0.2.bias",
        "unet/up_blocks.0.upsamplers.0.conv.weight": UNET + "output_blocks.2.2.conv.weight",
        "unet/down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.bias": UNET
        + "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.bias",
        "text_encoder/final_layer_norm.weight": CLIPS_OF_XL + "0.transformer.text_model.final_layer_norm.weight",
        "text_encoder_2/text_projection.weight": CLIPS_OF_XL + "1.model.text_projection",
        "text_encoder_2/text_model.encoder.layers.31.self_attn.out_proj.bias": CLIPS_OF_XL
        + "1.model.transformer.resblocks.31.attn.out_proj.bias",
    },
}
"""Names in the released checkpoints."""


@pytest.mark.parametrize(("kind", "count"), [("sd1", 1130), ("sd2-base", 1214), ("sd2-v", 1214), ("sdxl", 2513)])
def test_names_in_new_files_are_those_of_the_released_checkpoints(kind, count):
    """The counts are those of diffusers' scripts/convert_diffusers_to_original_*.py, which has the same names."""
    from delora_diffusers.families.loading import _skeletons

    layout = new_layout(_skeletons(CONFIGURATIONS / kind))
    names = {f"{component}/{name}": stored for component, part in layout.items() for name, stored in part.items()}
    assert len({stored.name for stored in names.values()}) == count
    for name, expected in KNOWN_NAMES.get(kind, {}).items():
        assert names[name].name == expected
    projection = names["vae/decoder.mid_block.attentions.0.to_q.weight"]
    assert (projection.name.rpartition("decoder.")[2], projection.dimensions) == ("mid.attn_1.q.weight", 4)
    if kind == "sd2-v":
        rows = [names[f"text_encoder/encoder.layers.3.self_attn.{part}_proj.weight"].row for part in "qkv"]
        assert rows == [0, 1024, 2048]


def test_a_folder_as_a_file_and_back_has_the_same_values(folders, files, nothing, tmp_path):
    for kind, folder in folders.items():
        config = {"model_config": str(folder)}
        assert_equal(values(files[kind], **config), values(folder))
        words = ["merge", "--adapter", nothing[kind], "--pretrained_model_name_or_path", files[kind]]
        main([*map(str, words), "--model_config", str(folder), "--output_dir", str(tmp_path / kind)])
        assert_equal(values(tmp_path / kind), values(folder))
        assert sorted(p.name for p in (tmp_path / kind).iterdir()) == sorted(p.name for p in folder.iterdir())
        skeletons = open_model(str(folder)).skeletons
        file = open_single_file(str(files[kind]))
        assert layout_of(file, skeletons) == {
            part: {name: stored._replace(dimensions=len(file.tensors[stored.name].shape)) for name, stored in w.items()}
            for part, w in new_layout(skeletons).items()
        }


def test_a_merged_file_equals_the_merged_folder_and_loads_in_diffusers(folders, files, tmp_path):
    import diffusers

    for kind, folder in folders.items():
        adapter = adapter_for(folder, tmp_path / kind)
        config = ["--model_config", str(folder)]
        outputs = {name: tmp_path / f"{kind}-{name}" for name in ("folder", "new.safetensors", "edited.safetensors")}
        merge = ["merge", "--adapter", str(adapter)]
        main([*merge, "--output_dir", str(outputs["folder"])])
        main([*merge, "--single_file", str(outputs["new.safetensors"])])
        of_file = [*merge, "--pretrained_model_name_or_path", str(files[kind]), *config]
        main([*of_file, "--single_file", str(outputs["edited.safetensors"])])
        main([*of_file, "--output_dir", str(tmp_path / f"{kind}-2")])
        expected, before = values(outputs["folder"]), values(folder)
        changed = {name for name in before if not torch.equal(before[name], expected[name])}
        encoders = {name.partition("/")[0] for name in changed}
        assert encoders == {"unet", *open_model(str(folder)).text_encoders}
        for name in ("new.safetensors", "edited.safetensors"):
            assert_equal(values(outputs[name], model_config=str(folder)), expected)
            stock = getattr(diffusers, PIPELINES[kind]).from_single_file(
                str(outputs[name]), config=str(folder), local_files_only=True
            )
            parts = {part: getattr(stock, part).state_dict() for part in open_model(str(folder)).skeletons}
            assert_equal({f"{c}/{n}": t for c, part in parts.items() for n, t in part.items()}, expected)
        assert_equal(values(tmp_path / f"{kind}-2"), expected)


def test_every_parameter_of_an_open_clip_encoder_is_merged_where_it_is(folders, files, tmp_path):
    """Full fine-tuning also changes biases within the fused projection, and the transposed text projection."""
    folder = folders["sdxl"]
    model = open_model(str(folder))
    unet = attach(model.load("unet", torch.float32), AdapterConfig(rank=1))
    encoder = attach(model.load("text_encoder_2", torch.float32), AdapterConfig(method="full", targets=(EVERYTHING,)))
    randomize(encoder, 0.5)
    adapter = save_adapter(unet, tmp_path / "a", text_encoders={"text_encoder_2": encoder}, base_model=str(folder))
    merge = ["merge", "--adapter", str(adapter)]
    of_file = ["--pretrained_model_name_or_path", str(files["sdxl"]), "--model_config", str(folder)]
    main([*merge, "--output_dir", str(tmp_path / "folder")])
    main([*merge, *of_file, "--single_file", str(tmp_path / "edited.safetensors")])
    main([*merge, "--single_file", str(tmp_path / "new.safetensors")])
    expected, before = values(tmp_path / "folder"), values(folder)
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert {"text_encoder_2/text_projection.weight"} < changed and any("q_proj.bias" in name for name in changed)
    for name in ("edited", "new"):
        assert_equal(values(tmp_path / f"{name}.safetensors", model_config=str(folder)), expected)


def test_what_is_not_adapted_stays_in_an_edited_file(folders, files, tmp_path):
    tensors = load_file(files["sd1"])
    extra = {"model_ema.decay": torch.tensor(0.5), "cond_stage_model.logit_scale": torch.tensor([3], dtype=torch.int64)}
    stored = {name: tensor.half() if "first_stage" in name else tensor for name, tensor in tensors.items()} | extra
    base = tmp_path / "base.safetensors"
    save_file(stored, base, metadata={"format": "pt", "modelspec.title": "Mine"})
    words = ["merge", "--adapter", adapter_for(folders["sd1"], tmp_path / "a"), "--model_config", folders["sd1"]]
    words += ["--pretrained_model_name_or_path", base, "--single_file", tmp_path / "out.safetensors"]
    main([*map(str, words)])
    merged = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "modelspec.title": "Mine"}
    assert merged.keys() == stored.keys()
    changed = {name for name in stored if not torch.equal(merged[name], stored[name])}
    assert changed and all("attn" in name for name in changed)
    assert not any(name.startswith("first_stage_model") for name in changed)
    header = (int.from_bytes(base.read_bytes()[:8], "little"), base.stat().st_size)
    assert base.read_bytes()[: header[0] + 8] == (tmp_path / "out.safetensors").read_bytes()[: header[0] + 8]


def sparse(path: Path, kind: str, dtype: str = "F16", **marks: str) -> Path:
    """A checkpoint with the true shapes of a model and no values on the disk."""
    from delora_diffusers.families.loading import _skeletons

    skeletons = _skeletons(CONFIGURATIONS / kind)
    entries: dict[str, Any] = {"__metadata__": marks}
    shapes: dict[str, tuple[int, ...]] = {}
    for component, part in new_layout(skeletons).items():
        weights = skeletons[component].state_dict()
        for name, stored in part.items():
            shape = tuple(weights[name].shape)
            shape = shape[::-1] if stored.transposed else shape
            shape = (shapes.get(stored.name, (0,))[0] + shape[0], *shape[1:])
            shapes[stored.name] = shape + (1,) * (stored.dimensions - len(shape))
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * 2
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + offset)
    return path


def test_true_shapes_need_no_configuration(tmp_path):
    """Parameters as published; the file is not read, so that its 2 to 7 GB take neither memory nor time."""
    sizes = {"sd1": (859_520_964, 64), "sd2-base": (865_910_724, 64), "sdxl": (2_567_463_684, 128)}
    for kind, (count, side) in sizes.items():
        model = open_model(str(sparse(tmp_path / f"{kind}.safetensors", kind)))
        unet = model.skeletons["unet"]
        assert sum(parameter.numel() for parameter in unet.parameters()) == count
        assert unet.config.sample_size == side and set(model.in_file) == set(model.skeletons)
        assert model.pipeline.scheduler.config.prediction_type == "epsilon"
        assert [
            t.pad_token_id for t in (model.pipeline.tokenizer, getattr(model.pipeline, "tokenizer_2", None)) if t
        ] == {
            "sd1": [49407],
            "sd2-base": [0],
            "sdxl": [49407, 0],
        }[kind]
    model = open_model(str(sparse(tmp_path / "v.safetensors", "sd2-v", **{"modelspec.prediction_type": "v"})))
    assert model.skeletons["unet"].config.sample_size == 96
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"
    half = open_model(str(tmp_path / "sd1.safetensors")).load("vae", torch.float16)
    assert half.dtype == torch.float16 and not any(parameter.is_meta for parameter in half.parameters())


def test_the_tokenizer_is_open_clips():
    import open_clip

    theirs, ours = open_clip.get_tokenizer("ViT-H-14"), clip_tokenizer("!")
    words = [word.removesuffix("</w>") for word in ours.get_vocab() if word.isascii() and "<|" not in word]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 40))) for _ in range(500)]
    texts += [
        "a photo of sks dog!",
        "it's 42 dogs' tails",
        "日本語 テスト",
        "naïve café 🐶",
        "(masterpiece:1.2), 1girl",
        "!!!",
    ]
    padded = ours(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(padded, theirs(texts))
    first = clip_tokenizer()(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(first[padded != 0], padded[padded != 0]) and set(first[padded == 0].tolist()) == {49407}


def without(*prefixes: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


REFUSED: dict[str, tuple[Any, str]] = {
    "a LoRA": (lambda t: {"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, "is a LoRA; give the model that it was"),
    "an autoencoder": (without(UNET, "cond"), "has no weights for its unet; give a complete text-to-image model"),
    "no unet's weight": (without(UNET + "out.2.bias"), "has no weight conv_out.bias for its unet"),
    "no text encoder": (without("cond_stage_model"), "has no text_encoder, and neither does --model_config"),
    "no autoencoder": (without("first_stage_model"), "has no vae, and neither does --model_config"),
    "inpainting": (
        lambda t: t | {UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
        "is an inpainting model, not a text-to-image model",
    ),
    "a refiner": (
        lambda t: t | {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)},
        "is the refiner of Stable Diffusion XL",
    ),
    "CosXL": (lambda t: t | {"edm_vpred.sigma_max": torch.zeros(())}, "EDM's noise schedule"),
    "another width": (
        lambda t: t | {UNET + "time_embed.0.bias": torch.zeros(3)},
        r"has time_embedding.linear_1.bias of shape \(3,\) instead of \(128,\) for its unet",
    ),
    "fp8": (
        lambda t: t | {UNET + "out.2.bias": t[UNET + "out.2.bias"].to(torch.float8_e4m3fn)},
        "stores conv_out.bias as neither fp32, fp16 nor bf16",
    ),
    "zero SNR with epsilon": (lambda t: t | {"ztsnr": torch.zeros(0)}, "predicts epsilon, which does not work with a"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_other_files_are_one_sentence(folders, files, tmp_path, case):
    change, message = REFUSED[case]
    config = shutil.copytree(folders["sd1"], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(change(load_file(files["sd1"])), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=message) as raised:
        open_model(str(tmp_path / "m.safetensors"), model_config=str(config))
    assert "\n" not in str(raised.value)


def test_files_without_a_configuration_are_one_sentence(folders, files, nothing, tmp_path):
    def refused(message: str, name: object, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            open_model(str(name), **options)

    refused("is not recognised as Stable Diffusion 1.x, 2.x or XL; .* with --model_config", files["sd1"])
    refused("under diffusers' names; .* --model_config", folders["sd1"] / "unet/diffusion_pytorch_model.safetensors")
    refused("contains no denoiser", folders["sd1"] / "vae/diffusion_pytorch_model.safetensors")
    refused("is an adapter; give it to --adapter", nothing["sd1"])
    refused("--variant chooses files of a folder", files["sd1"], variant="fp16")
    refused("--model_config belongs to a base model in a single", folders["sd1"], model_config=str(folders["sd1"]))
    refused("--model_config cannot be used: the base model a/b/c does", files["sd1"], model_config="a/b/c")
    refused("--model_config .*sd1.safetensors is not a pipeline", files["sd1"], model_config=str(files["sd1"]))
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4)}, tmp_path / "flux.safetensors")
    refused("--model_config, for example black-forest-labs/FLUX.1-schnell", tmp_path / "flux.safetensors")
    for name, message in {"m.ckpt": "is a pickle", "m.gguf": "is not a .safetensors file"}.items():
        (tmp_path / name).write_bytes(b"x" * 100)
        refused(message, tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes(files["sd1"].read_bytes()[:-1000])
    refused("is damaged", tmp_path / "cut.safetensors", model_config=str(folders["sd1"]))
    with sparse(tmp_path / "no-vae.safetensors", "sd1").open("r+b") as stream:
        header = stream.read(200_000)
        stream.seek(0)
        stream.write(header.replace(b"first_stage_model", b"other_stage_model"))
    refused("has no vae; give a pipeline that has its weights with --model_config", tmp_path / "no-vae.safetensors")


def test_what_a_file_lacks_comes_from_the_configurations_folder(folders, files, tmp_path):
    tensors = load_file(files["sdxl"])
    kept = {n: t for n, t in tensors.items() if not n.startswith(("first_stage_model", "conditioner.embedders.1"))}
    save_file({name: tensor + 1 for name, tensor in kept.items()}, tmp_path / "part.safetensors")
    model = open_model(str(tmp_path / "part.safetensors"), model_config=str(folders["sdxl"]))
    assert sorted(model.in_file) == ["text_encoder", "unet"]
    expected = values(folders["sdxl"])
    for name, tensor in values(tmp_path / "part.safetensors", model_config=str(folders["sdxl"])).items():
        assert torch.equal(tensor, expected[name] + (1 if name.startswith(("unet", "text_encoder/")) else 0)), name


def test_a_file_is_quantized_as_its_folder_is(folders, files):
    from delora_diffusers.families.quantization import quantization_config

    weights = []
    for name, options in ((folders["sd1"], {}), (files["sd1"], {"model_config": str(folders["sd1"])})):
        model = open_model(str(name), **options)
        settings = quantization_config("int8", torch.bfloat16, model.family.UNQUANTIZED)
        unet = model.load("unet", torch.bfloat16, "cpu", settings)
        weights.append({n: p.dequantize() if "Int8" in type(p).__name__ else p for n, p in unet.named_parameters()})
        assert "Int8" in type(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight).__name__
        assert unet.conv_in.weight.dtype == torch.bfloat16 and not unet.conv_in.weight.requires_grad
    assert_equal(*weights)


def test_a_denoiser_under_diffusers_names_is_one(folders):
    unet = folders["sd1"] / "unet" / "diffusion_pytorch_model.safetensors"
    assert open_model(str(unet), model_config=str(folders["sd1"])).in_file == ["unet"]
    assert_equal(values(unet, model_config=str(folders["sd1"])), values(folders["sd1"]))


def test_the_text_encoder_may_lack_its_outer_name(folders, files, tmp_path):
    renamed = {
        name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(files["sd1"]).items()
    }
    save_file(renamed, tmp_path / "m.safetensors")
    assert_equal(values(tmp_path / "m.safetensors", model_config=str(folders["sd1"])), values(folders["sd1"]))


def test_names_of_files_on_the_hub():
    file = ("owner/model.v1", "a/b.safetensors")
    assert hub_file("owner/model.v1/a/b.safetensors") == (*file, None)
    for kind in ("blob", "resolve"):
        address = f"https://huggingface.co/owner/model.v1/{kind}/refs%2Fpr%2F1/a/b.safetensors?download=true"
        assert hub_file(address) == (*file, "refs/pr/1")
    for other in ("owner/model", "m.safetensors", "a/m.safetensors", "./a/b/m.safetensors", "/a/b/m.safetensors"):
        assert hub_file(other) is None
    for other in ("owner/model/../../m.safetensors", "owner/model/m.ckpt", "https://civitai.com/a/b/c.safetensors"):
        assert hub_file(other) is None
    with pytest.raises(InputError, match="download it, and give the file"):
        check_model_folder("https://civitai.com/api/download/models/1")


def open_from_hub(endpoint: str, cache: Path, expected: Path, requests: Any) -> None:
    connect(endpoint, cache)
    name = "tiny/one/sub/model.safetensors"
    family_named(name, model_config="tiny/folder")
    assert len(open_model(name, model_config="tiny/folder", with_weights=False).in_file) == 3
    assert not list(cache.rglob("*.safetensors"))
    model = open_model(name, model_config="tiny/folder")
    assert_equal(values(name, model_config="tiny/folder"), values(expected))
    assert sorted(model.in_file) == ["text_encoder", "unet", "vae"]
    weights = [path for path in cache.rglob("*.safetensors") if "folder" in str(path)]
    assert not weights  # the file has all of them
    address = "https://huggingface.co/tiny/one/blob/main/unet.safetensors"
    assert_equal(values(address, model_config="tiny/folder"), values(expected))
    names = [path.parent.name for path in cache.rglob("*.safetensors") if "folder" in str(path)]
    assert sorted(names) == ["text_encoder", "vae"]


def test_files_on_the_hub_are_downloaded_when_their_weights_are_needed(folders, files, tmp_path):
    repository = tmp_path / "one"
    (repository / "sub").mkdir(parents=True)
    shutil.copy(files["sd1"], repository / "sub" / "model.safetensors")
    shutil.copy(folders["sd1"] / "unet" / "diffusion_pytorch_model.safetensors", repository / "unet.safetensors")
    with serve_hub({"tiny/one": repository, "tiny/folder": folders["sd1"]}) as (endpoint, _):
        run_in_child(open_from_hub, endpoint, tmp_path / "cache", folders["sd1"], None)


def test_a_transformer_comes_from_a_file_and_the_rest_from_the_folder(tmp_path):
    from data.tiny_pipelines import write as write_pipeline

    folder = write_pipeline(tmp_path / "qwen", "qwenimage")
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "m.safetensors")
    model = open_model(str(tmp_path / "m.safetensors"), model_config=str(folder))
    assert model.in_file == ["transformer"]
    loaded = model.load("transformer", torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor + 1) for name, tensor in weights.items())
    assert load_pipeline(str(folder)).vae is not None
