"""LoRAs of other tools: whatever names they have, the model computes what it computes with diffusers or PEFT."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from data.tiny_pipelines import write as write_transformer
from data.tiny_sd import write
from delora_diffusers import InputError
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import OpenModel, open_model
from delora_diffusers.files.formats import Source, write_kohya
from delora_diffusers.files.lora_files import adapter_files, highest_rank, read_lora
from delora_diffusers.files.low_rank import Factors

pytestmark = pytest.mark.integration  # seconds a test

KINDS = ("sd1", "sdxl", "flux")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def folders(tiny_sd, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    xl, flux = write(root / "xl", kind="sdxl"), write_transformer(root / "flux", "flux")
    return {"sd1": tiny_sd, "sdxl": xl, "flux": flux}


def stock(folder: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return pipeline


def denoiser_of(pipeline: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    return name, getattr(pipeline, name)


def randomized(model: torch.nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))


def weights_with_lora(pipeline: Any) -> dict[tuple[str, str], torch.Tensor]:
    """The weights of every linear module, with the LoRAs that diffusers or PEFT have attached."""
    weights = {}
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        model = getattr(pipeline, component, None)
        for name, module in model.named_modules() if model is not None else ():
            if hasattr(module, "get_delta_weight"):
                weights[component, name] = sum(module.get_delta_weight(a) for a in module.active_adapters).detach()
    return weights


def read(model: OpenModel, path: Path) -> dict[tuple[str, str], torch.Tensor]:
    models = {name: skeleton for name, skeleton in model.skeletons.items() if name != "vae"}
    components = read_lora(adapter_files(path), models, type(model.pipeline).__name__)
    return {(c, m): f.b @ f.a for c, modules in components.items() for m, f in modules.items()}


def assert_same(ours: dict, reference: dict) -> None:
    assert len(reference) > 10 and ours.keys() == reference.keys()
    for key, delta in reference.items():
        torch.testing.assert_close(ours[key], delta, atol=1e-6, rtol=1e-5)


def peft_config(rank: int = 4, targets: list[str] = ATTENTION, **more: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=targets, **{"lora_alpha": rank, **more})


def with_adapters(folder: Path, config: LoraConfig, encoders: bool) -> Any:
    pipeline = stock(folder)
    denoiser_of(pipeline)[1].add_adapter(config)
    for number, name in enumerate(("text_encoder", "text_encoder_2") if encoders else ()):
        encoder = getattr(pipeline, name, None)
        if encoder is not None and type(encoder).__name__.startswith("CLIP"):
            encoder.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "out_proj", "fc1"]))
            randomized(encoder, number + 1)
    randomized(denoiser_of(pipeline)[1])
    return pipeline


def state_dicts(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    parts = ("unet", "transformer", "text_encoder", "text_encoder_2")
    models = {name: getattr(pipeline, name, None) for name in parts}
    return {n: get_peft_model_state_dict(m) for n, m in models.items() if getattr(m, "peft_config", None)}


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_diffusers_writes(folders, tmp_path, kind):
    """With the header that says alpha, and with the encoders' tensors beside the denoiser's."""
    config = peft_config(lora_alpha=7, use_rslora=True, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 5})
    pipeline = with_adapters(folders[kind], config, encoders=True)
    states = state_dicts(pipeline)
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    modules = {part: getattr(pipeline, part) for part in states}
    type(pipeline).save_lora_weights(tmp_path, **layers, **_collate_lora_metadata(modules))
    reloaded = stock(folders[kind])
    reloaded.load_lora_weights(tmp_path)
    ours = read(open_model(str(folders[kind])), tmp_path)
    assert_same(ours, weights_with_lora(pipeline))
    assert_same(ours, weights_with_lora(reloaded))
    assert {part for part, _ in ours} == states.keys() and highest_rank(adapter_files(tmp_path)) == 4


@pytest.mark.parametrize(
    ("kind", "style"), [("sd1", "kohya"), ("sdxl", "kohya"), ("sdxl", "lora.down"), ("sd1", "processors")]
)
def test_names_of_other_tools_and_older_versions(folders, tmp_path, kind, style):
    pipeline = with_adapters(folders[kind], peft_config(lora_alpha=2.5), encoders=style == "kohya")
    states, tensors = state_dicts(pipeline), {}
    for part, state in states.items():
        named = {f"{part}.{name}": tensor for name, tensor in state.items()}
        if style == "kohya":
            encoder = "lora_te1" if kind == "sdxl" else "lora_te"
            prefix = {"unet": "lora_unet", "text_encoder": encoder, "text_encoder_2": "lora_te2"}[part]
            for name, tensor in state.items():
                module, side = name.split(".lora_")
                if part != "unet":
                    module = f"text_model.{module.removeprefix('text_model.')}"
                key = f"{prefix}_{module.replace('.', '_')}"
                tensors[f"{key}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = tensor
                tensors[f"{key}.alpha"] = torch.tensor(2.5 if part == "unet" else 6.0)
        else:
            for n, tensor in named.items():
                n = n.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
                if style == "processors":
                    n = re.sub(r"\.to_(q|k|v|out)(\.0)?\.lora\.", r".processor.to_\1_lora.", n)
                tensors[n] = tensor
                tensors[re.sub(r"\.lora\..*|_lora\..*", "", n) + ".lora.alpha"] = torch.tensor(2.5)
            if style == "processors":  # which stored no alpha
                tensors = {n: t * (2.5 / 4 if "_lora.up" in n else 1) for n, t in tensors.items() if "alpha" not in n}
    file = save(tensors, tmp_path / "lora.safetensors")
    assert_same(read(open_model(str(folders[kind])), file), weights_with_lora(pipeline))


@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3", "zimage"])
def test_original_names_of_our_own_exports(folders, tmp_path, kind):
    """SGM's names of SDXL, and transformers' names with fused q, k and v, each member with its own rank again."""
    folder = folders.get(kind) or write_transformer(tmp_path / "model", kind)
    model = open_model(str(folder))
    name, targets = model.family.DENOISER, model.family.TARGETS
    g = torch.Generator().manual_seed(0)
    expected, factors = {}, {}
    linears = {n: m for n, m in model.skeletons[name].named_modules() if isinstance(m, torch.nn.Linear)}
    for n, m in linears.items():
        if f".{n}".endswith(tuple(f".{t}" for t in targets)):
            factors[n] = Factors(
                torch.randn(m.out_features, 3, generator=g), torch.randn(3, m.in_features, generator=g)
            )
            expected[name, n] = factors[n].b @ factors[n].a
    source = Source({name: factors}, None, type(model.pipeline).__name__)
    file = write_kohya(source, tmp_path / "k.safetensors", torch.float32)
    assert_same(read(model, file), expected)
    components = read_lora([file], {name: model.skeletons[name]}, type(model.pipeline).__name__)
    assert {f.rank for f in components[name].values()} == {3}


@pytest.mark.parametrize("several", [False, True])
def test_peft_folders(folders, tmp_path, several):
    pipeline = stock(folders["sd1"])
    config = peft_config(
        6, lora_alpha=9, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn2.to_k": 1, r".*attn1\.to_[qv]": 3}
    )
    wrapped = {"unet": get_peft_model(pipeline.unet, config)}
    if several:
        other = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], use_rslora=True)
        wrapped["text_encoder"] = get_peft_model(pipeline.text_encoder, other)
    for number, (name, model) in enumerate(wrapped.items()):
        randomized(model, number)
        model.save_pretrained(tmp_path / name if several else tmp_path)
    assert {"adapter_config.json"} < {path.name for path in (tmp_path / ("unet" if several else ".")).iterdir()}
    reference = weights_with_lora(pipeline)
    ours = read(open_model(str(folders["sd1"])), tmp_path)
    assert ours.keys() == reference.keys() and all(torch.allclose(ours[k], reference[k], atol=1e-6) for k in ours)


def test_xlabs_names_are_left_to_diffusers(folders, tmp_path):
    model, g = open_model(str(folders["flux"])), torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        for part, rows, width in (("qkv_lora1", 96, 32), ("proj_lora1", 32, 32)):
            name = f"double_blocks.{block}.processor.{part}"
            tensors[f"{name}.down.weight"] = torch.randn(3, width, generator=g)
            tensors[f"{name}.up.weight"] = torch.randn(rows, 3, generator=g)
    ours = read(model, save(tensors, tmp_path / "xlabs.safetensors"))
    name = "double_blocks.1.processor.qkv_lora1"
    product = tensors[f"{name}.up.weight"] @ tensors[f"{name}.down.weight"]
    for rows, projection in zip(product.chunk(3), "qkv"):
        torch.testing.assert_close(ours["transformer", f"transformer_blocks.1.attn.to_{projection}"], rows)


def kohya(module: str = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q", **tensors: Any) -> dict[str, Any]:
    pair = {"lora_down.weight": torch.ones(2, 64), "lora_up.weight": torch.ones(64, 2), **tensors}
    return {f"lora_unet_{module}.{key}": tensor for key, tensor in pair.items() if tensor is not None}


PROJ_IN = "mid_block_attentions_0_proj_in"
REFUSED = {
    "a convolution": (
        kohya()
        | kohya(PROJ_IN, **{"lora_down.weight": torch.ones(2, 64, 1, 1), "lora_up.weight": torch.ones(64, 2, 1, 1)}),
        r"adapts convolutions, such as lora_unet_mid_block_attentions_0_proj_in .1 of its 2 modules., .* merge it",
    ),
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "is a LoHa, as lora_unet_x.hada_w1_a shows"),
    "LoKr": ({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
    "DoRA": (kohya(dora_scale=torch.ones(64)), "is a DoRA with a learned magnitude"),
    "full": ({"lora_unet_x.diff": torch.ones(2, 2)}, "is a difference of full weights"),
    "another model": (
        kohya("input_blocks_1_1_x"),
        "adapts lora_unet_input_blocks_1_1_x, which the base model does not",
    ),
    "other widths": (
        kohya(**{"lora_down.weight": torch.ones(2, 32)}),
        r"unet.mid_block.*to_q is .64, 32. in the file and .64, 64. in the model; give the LoRA's base model",
    ),
    "half a pair": (kohya(**{"lora_up.weight": None}), "has no B of lora_unet_mid_block"),
    "ranks": (kohya(**{"lora_up.weight": torch.ones(64, 3)}), "A .2, 64. and B .64, 3. of .* do not fit together"),
    "not finite": (kohya(alpha=torch.tensor(float("nan"))), "values that are not finite"),
    "an alpha that overflows": (kohya(alpha=torch.tensor([1.0, 2.0])), "alpha .2,. and A .* do not fit together"),
    "twice": (
        kohya() | {n.replace("lora_unet_", "lora_te_"): t for n, t in kohya("x").items()},
        "adapts lora_te_x, which the base model does not have",
    ),
    "other tensors": (kohya() | {"foo.weight": torch.ones(2)}, "contains foo.weight, which is not a tensor of a LoRA"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_plain_lora_of_this_model_is_refused(folders, tmp_path, case):
    tensors, message = REFUSED[case]
    file = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=message):
        read(open_model(str(folders["sd1"])), file)


def test_refused_folders(folders, tmp_path):
    model = open_model(str(folders["sd1"]))
    for settings, message in (
        ({"peft_type": "LOHA"}, "contains a LOHA adapter; only LORA is supported"),
        ({"peft_type": "DELORA"}, "contains a DELORA adapter; convert it with .*import --peft_dir"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "was initialized by pissa, which also changes"),
        ({"peft_type": "LORA", "lora_alpha": "x"}, "an alpha of mid_block.* that is not a number"),
    ):
        name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        save(
            {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)},
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match=message):
            read(model, tmp_path)
    (tmp_path / "lora.ckpt").write_bytes(b"x" * 100)
    with pytest.raises(
        InputError, match="is not a safetensors file; convert it, because other formats can contain code"
    ):
        read(model, tmp_path / "lora.ckpt")


def test_import_of_a_lora(folders, tmp_path, capsys):
    """generate, merge and info take the imported adapter; its update is the one that diffusers computes."""
    pipeline = with_adapters(folders["sdxl"], peft_config(rank_pattern={"to_k": 2}), encoders=True)
    states = state_dicts(pipeline)
    type(pipeline).save_lora_weights(tmp_path / "lora", **{f"{part}_lora_layers": s for part, s in states.items()})
    reference = stock(folders["sdxl"])
    reference.load_lora_weights(tmp_path / "lora")
    flags = ["--pretrained_model_name_or_path", str(folders["sdxl"]), "--output_dir"]
    main(["import", "--lora", str(tmp_path / "lora"), *flags, str(tmp_path / "imported")])
    main(["info", str(tmp_path / "imported")])
    assert "method: lora" in capsys.readouterr().out
    main(["merge", "--adapter", str(tmp_path / "imported"), "--output_dir", str(tmp_path / "merged")])
    merged, base = stock(tmp_path / "merged"), stock(folders["sdxl"])
    for (part, name), delta in weights_with_lora(reference).items():
        before, after = (getattr(p, part).get_submodule(name).weight for p in (base, merged))
        torch.testing.assert_close(after - before, delta, atol=1e-6, rtol=1e-4)
    with pytest.raises(SystemExit, match="is an adapter of this library already"):
        main(["import", "--lora", str(tmp_path / "imported"), *flags, str(tmp_path / "again")])
