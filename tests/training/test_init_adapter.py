"""Training that starts from an adapter: the first forward is the base model with that adapter, and learning goes on."""

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import train_controlnet_map2img
import train_dreambooth_delora
from data.tiny_pipelines import write as write_transformer
from data.tiny_sd import write
from delora_diffusers import AdapterConfig, InputError, attach, detach, load_adapter, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import OpenModel, open_model
from delora_diffusers.files.reading import read_header
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import CONFIG_NAME, WEIGHTS_NAME
from delora_diffusers.training.init_adapter import read_initial_adapter
from tests.helpers import map_flags, randomize, run_in_child, train, training_flags, write_map_folders, write_photos

pytestmark = pytest.mark.integration  # seconds a test

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def models(tiny_sd, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"sd1": tiny_sd, "sdxl": write(root / "xl", kind="sdxl"), "flux": write_transformer(root / "flux", "flux")}


def inputs_of(kind: str, denoiser: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if kind == "flux":
        tokens = {
            "hidden_states": noise(2, 16, 64),
            "encoder_hidden_states": noise(2, 5, 32),
            "guidance": torch.ones(2),
        }
        tokens |= {"pooled_projections": noise(2, 24), "timestep": torch.tensor([0.1, 0.7])}
        return tokens | {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    width = denoiser.config.cross_attention_dim
    shared = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    shared["encoder_hidden_states"] = noise(2, 7, width)
    if kind == "sdxl":
        shared["added_cond_kwargs"] = {"text_embeds": noise(2, 48), "time_ids": noise(2, 6)}
    return shared


@pytest.fixture(scope="module", params=["sd1", "sdxl", "flux"])
def foreign(request, models, tmp_path_factory) -> tuple[str, Path, Path, torch.Tensor]:
    """A kind of model, its folder, a LoRA that diffusers wrote, and the denoiser's output with it, by diffusers."""
    kind, folder = request.param, tmp_path_factory.mktemp("lora")
    pipeline: Any = DiffusionPipeline.from_pretrained(models[kind], safety_checker=None)
    name = "transformer" if kind == "flux" else "unet"
    denoiser = getattr(pipeline, name)
    denoiser.add_adapter(LoraConfig(r=3, lora_alpha=3, rank_pattern={"to_k": 2}, target_modules=TARGETS[:3]))
    g = torch.Generator().manual_seed(0)
    for parameter_name, parameter in denoiser.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    type(pipeline).save_lora_weights(folder, **{f"{name}_lora_layers": get_peft_model_state_dict(denoiser)})
    reloaded: Any = DiffusionPipeline.from_pretrained(models[kind], safety_checker=None)
    reloaded.load_lora_weights(folder)
    with torch.no_grad():
        output = getattr(reloaded, name)(**inputs_of(kind, denoiser), return_dict=False)[0]
    return kind, models[kind], folder, output


def started(model: OpenModel, path: Path, config: AdapterConfig, seed: int = 0) -> tuple[Any, Any]:
    """The denoiser and its adapter as the training scripts start them, after their rehearsal."""
    args = argparse.Namespace(init_adapter=path, seed=seed)
    start = read_initial_adapter(args, model)
    assert start is not None
    name = model.family.DENOISER
    skeleton = copy.deepcopy(model.skeletons[name])
    start.copy_into({name: attach(skeleton, config)}, {name: skeleton})
    denoiser = model.load(name, torch.float32)
    adapter = attach(denoiser, config, torch.Generator().manual_seed(seed))
    start.copy_into({name: adapter}, {name: denoiser})
    return denoiser, adapter


CONFIGS = {
    "lora": AdapterConfig("lora", 3),
    "lora of higher rank": AdapterConfig("lora", 8, alpha=5),
    "delora": AdapterConfig(rank=3, start="zero"),
    "delora of higher rank": AdapterConfig(rank=8, start="zero", path="split"),
    "delora with the Frobenius scale": AdapterConfig(rank=3, start="zero", weight_norm="frobenius", path="lean"),
    "delora without a scale": AdapterConfig(rank=4, start="zero", weight_norm="none"),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_the_first_forward_is_that_of_diffusers_with_the_lora(foreign, case):
    kind, folder, path, expected = foreign
    if kind != "sd1" and case not in ("lora", "delora of higher rank"):
        pytest.skip("the other conversions do not depend on the model")
    denoiser, adapter = started(open_model(str(folder)), path, CONFIGS[case])
    output = denoiser(**inputs_of(kind, denoiser), return_dict=False)[0]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    distances = adapter.distances()
    assert all((distances[n] == 0) == n.endswith("to_out.0") for n in distances), "to_out is not in the LoRA"
    output.square().mean().backward()
    for stack in adapter.stacks:
        for index, name in enumerate(stack.names):
            for key, parameter in stack.trainable.items():
                gradient = parameter.grad[index]
                assert torch.isfinite(gradient).all()
                # Attention over a single direction of text may not reach every module; B reaches all that LoRA has.
                if key == "B" or distances[name] > 0:
                    assert gradient.abs().max() > 0, (name, key)


@pytest.fixture(scope="module")
def model(models) -> OpenModel:
    return open_model(str(models["sd1"]))


def saved(model: OpenModel, folder: Path, config: AdapterConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    """One of our adapters, and its updates."""
    unet = model.load("unet", torch.float32)
    adapter = attach(unet, config, torch.Generator().manual_seed(7))
    randomize(adapter, 0.2)
    deltas = {name: adapter.delta_weight(name) for name in adapter.names}
    path = save_adapter(adapter, folder, base_model=model.name, pipeline="StableDiffusionPipeline")
    detach(unet)
    return path, deltas


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_an_adapter_of_the_same_method_is_copied(model, tmp_path, method):
    config = AdapterConfig(method, rank=2, targets=("attn1.to_q",))
    path, _ = saved(model, tmp_path, config)
    _, adapter = started(model, path, config, seed=5)
    file = load_file(path)
    tensors = {f"unet.{name}": tensor for name, tensor in adapter.named_tensors()}
    assert tensors.keys() == file.keys() and all(tensors[name].equal(file[name]) for name in file)


CONVERSIONS = {
    "frozen to zero": (AdapterConfig(rank=2), AdapterConfig(rank=4, start="zero")),
    "frozen to LoRA": (AdapterConfig(rank=2), AdapterConfig("lora", rank=5)),
    "LoRA with another alpha": (AdapterConfig("lora", rank=2, alpha=7), AdapterConfig("lora", rank=2, alpha=4)),
    "LoRA to DeLoRA": (AdapterConfig("lora", rank=2), AdapterConfig(rank=2, start="zero")),
    "another scale": (AdapterConfig(rank=2, start="zero"), AdapterConfig(rank=2, start="zero", weight_norm="none")),
    "a higher rank": (AdapterConfig(rank=2, start="zero"), AdapterConfig(rank=4, start="zero")),
}


@pytest.mark.parametrize("case", list(CONVERSIONS))
def test_our_adapters_are_converted_without_loss(model, tmp_path, case):
    before, after = CONVERSIONS[case]
    path, deltas = saved(model, tmp_path, before)
    _, adapter = started(model, path, after)
    for name, delta in deltas.items():
        torch.testing.assert_close(adapter.delta_weight(name), delta, atol=1e-6, rtol=1e-4)


REFUSED = {
    "a smaller rank": (AdapterConfig("lora", rank=3), AdapterConfig("lora", rank=2), "of rank 3 .* give --rank 3"),
    "a frozen start's rank": (AdapterConfig(rank=3), AdapterConfig(rank=3, start="zero"), "of rank 6 .* give --rank 6"),
    "a frozen start": (AdapterConfig("lora", rank=2), AdapterConfig(rank=2), "without an update; give --start zero."),
    "another frozen start": (
        AdapterConfig(rank=2),
        AdapterConfig(rank=4),
        "its rank is 2, not 4, and --start frozen begins without an update; give --start zero, or --rank 2",
    ),
    "another method": (
        AdapterConfig("oft", targets=("to_q",)),
        AdapterConfig(rank=2),
        "its method is oft, not delora, and OFT cannot be converted; give --method oft",
    ),
    "other blocks": (
        AdapterConfig("oft", blocks=4),
        AdapterConfig("oft", blocks=2),
        "its blocks is 4, not 2, and OFT cannot be converted; give --blocks 4",
    ),
    "into another method": (AdapterConfig(rank=2), AdapterConfig("dora", rank=4), "cannot be converted to DoRA; use"),
    "other targets": (
        AdapterConfig(rank=2, targets=("to_q", "ff.net.2", "attn2.to_out.0")),
        AdapterConfig(rank=2, targets=("to_q",)),
        r"14 modules that are not among the targets, .*; give --targets to_q attn2.to_out.0 net.2\.",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_continued_is_refused_before_weights_are_read(model, tmp_path, case):
    before, after, message = REFUSED[case]
    path, _ = saved(model, tmp_path, before)
    start = read_initial_adapter(argparse.Namespace(init_adapter=path, seed=0), model)
    skeleton = copy.deepcopy(model.skeletons["unet"])
    assert start is not None
    with pytest.raises(InputError, match=message):
        start.copy_into({"unet": attach(skeleton, after)}, {"unet": skeleton})


def test_an_adapter_of_another_model_is_refused(model, models, tmp_path):
    path, _ = saved(open_model(str(models["sdxl"])), tmp_path, AdapterConfig(rank=2))
    start = read_initial_adapter(argparse.Namespace(init_adapter=path, seed=0), model)
    skeleton = copy.deepcopy(model.skeletons["unet"])
    assert start is not None
    with pytest.raises(InputError, match=r"was trained for another architecture: this UNet2DConditionModel has no"):
        start.copy_into({"unet": attach(skeleton, AdapterConfig(rank=2))}, {"unet": skeleton})


def test_settings_that_are_not_given_come_from_the_adapter(model, tmp_path, foreign):
    def parsed(path: Path, *flags: str) -> tuple:
        args = train_dreambooth_delora.parse_arguments(["--init_adapter", str(path), *flags])
        return args.method, args.rank, args.start, args.weight_norm, args.alpha, args.targets

    delora, _ = saved(model, tmp_path / "a", AdapterConfig(rank=2, weight_norm="none", targets=("to_q",)))
    assert parsed(delora) == ("delora", 2, "frozen", "none", None, ["to_q"])
    assert parsed(delora, "--start", "zero")[1:3] == (4, "zero")
    assert parsed(delora, "--rank", "16", "--targets", "to_k") == ("delora", 16, "frozen", "none", None, ["to_k"])
    assert parsed(delora, "--method", "lora")[:2] == ("lora", 4)
    lora, _ = saved(model, tmp_path / "b", AdapterConfig("lora", rank=3, alpha=5))
    assert parsed(lora)[:5] == ("lora", 3, "frozen", "column", 5)
    assert parsed(lora, "--method", "delora")[:3] == ("delora", 3, "zero")
    assert parsed(lora, "--rank", "3", "--alpha", "9")[4] == 9
    assert parsed(foreign[2])[:3] == ("delora", 3, "zero")
    config = tmp_path / "flags.yaml"
    config.write_text(f"init_adapter: {delora}\nrank: 8\n")
    assert train_dreambooth_delora.parse_arguments(["--config", str(config)]).rank == 8


def test_text_encoders(models, tmp_path):
    """Those of the file need --train_text_encoder, with all of their modules; others start at the base model."""
    pipeline: Any = DiffusionPipeline.from_pretrained(models["sdxl"])
    encoder = pipeline.text_encoder_2
    encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "fc1"]))
    layers = {"text_encoder_2_lora_layers": get_peft_model_state_dict(encoder)}
    type(pipeline).save_lora_weights(tmp_path, **layers)
    model = open_model(str(models["sdxl"]))
    flags = ["--init_adapter", str(tmp_path), "--pretrained_model_name_or_path", str(models["sdxl"])]
    args = train_dreambooth_delora.parse_arguments(flags)
    start = read_initial_adapter(args, model)
    subject = argparse.Namespace(seed=0)
    skeletons = copy.deepcopy({"unet": model.skeletons["unet"]})
    with pytest.raises(InputError, match="adapts text_encoder_2, which is not trained; give --train_text_encoder"):
        train_dreambooth_delora.attach_adapters(skeletons, [subject], args, start=start)
    loaded = {name: model.load(name, torch.float32) for name in ("unet", "text_encoder", "text_encoder_2")}
    adapters = train_dreambooth_delora.attach_adapters(loaded, [subject], args, start=start)
    assert all(distance == 0 for name in ("unet", "text_encoder") for distance in adapters[name].distances().values())
    assert adapters["text_encoder"].config.targets == TEXT_ENCODER_TARGETS
    ours = adapters["text_encoder_2"]
    for name in ours.names:
        layer = encoder.get_submodule(name)
        expected = layer.get_delta_weight("default") if name.endswith(("q_proj", "fc1")) else torch.zeros(())
        delta = ours.delta_weight(name)
        torch.testing.assert_close(delta, expected.detach().expand_as(delta), atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def run(tiny_sd, tmp_path_factory) -> tuple[Path, Path]:
    """A finished run with a checkpoint, and its photos."""
    folder = tmp_path_factory.mktemp("run")
    photos = write_photos(folder / "photos", 2)
    more = ("--max_train_steps", 2, "--checkpointing_steps", 1)
    run_in_child(train, training_flags(tiny_sd, photos, folder / "out", *more))
    return folder / "out", photos


def test_a_run_starts_from_a_checkpoint_and_resumes_only_with_the_same(run, tiny_sd, tmp_path):
    out, photos = run
    start = shutil.copytree(out / "checkpoint-1", tmp_path / "start")
    flags = training_flags(tiny_sd, photos, tmp_path / "new", "--init_adapter", start, "--learning_rate", 0)
    flags += ["--lambda_learning_rate", "0", "--max_train_steps", "2", "--checkpointing_steps", "1"]
    run_in_child(train, flags)
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (start, tmp_path / "new"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert read_header(tmp_path / "new")["training"]["init_adapter"] == str(start)
    assert f"starting from the adapter `{start.name}`" in (tmp_path / "new" / "README.md").read_text()
    config = json.loads((tmp_path / "new" / CONFIG_NAME).read_text())
    assert config["arguments"]["init_adapter"] == str(start) and len(config["data"]["--init_adapter"]) == 16
    # The same contents elsewhere are the same adapter; other contents in the same place are not.
    flags += ["--max_train_steps", "3", "--resume_from_checkpoint", "latest"]
    moved = shutil.move(start, tmp_path / "moved")
    run_in_child(train, [str(moved) if word == str(start) else word for word in flags])
    shutil.copytree(out / "checkpoint-2", start)
    with pytest.raises(AssertionError, match="--init_adapter has changed since .* was trained"):
        run_in_child(train, flags)
    index = flags.index("--init_adapter")
    with pytest.raises(AssertionError, match="--init_adapter is gone since"):
        run_in_child(train, [*flags[:index], *flags[index + 2 :]])


def test_adapters_along_the_way(run, tmp_path, capsys):
    """Checkpoints are adapters for every command; an unfinished run names them."""
    out, _ = run
    folder = shutil.copytree(out, tmp_path / "unfinished")
    (folder / WEIGHTS_NAME).unlink()
    checkpoint = folder / "checkpoint-1"
    export = ["export", "--format", "diffusers", "--output", str(tmp_path / "x.safetensors"), "--adapter"]
    for words in (export, ["merge", "--output_dir", str(tmp_path / "m"), "--adapter"], ["info"]):
        message = "unfinished is not finished; give one of its checkpoints, .*checkpoint-2 .checkpoint-1, checkpoint-2."
        with pytest.raises(SystemExit, match=message):
            main([*words, str(folder)])
        main([*words, str(checkpoint)])
    assert "step 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unfinished is not finished"):
        main(
            [
                "import",
                "--lora",
                str(folder),
                "--pretrained_model_name_or_path",
                "x",
                "--output_dir",
                str(tmp_path / "i"),
            ]
        )
    with pytest.raises(InputError, match="unfinished is not finished"):
        train_dreambooth_delora.parse_arguments(["--init_adapter", str(folder)])


def test_refused_flags(run, tiny_sd, tmp_path):
    out, photos = run
    base = training_flags(tiny_sd, photos, tmp_path / "new", "--init_adapter")
    for more, message in (
        ([str(tmp_path / "missing")], "no adapter at .*missing"),
        ([str(out), "--delora_lambda", "3"], "--delora_lambda is that of a new adapter"),
        ([str(out), "--subjects_file", "x"], "--init_adapter applies to a single subject"),
    ):
        words = (
            base
            if "--subjects_file" not in more
            else [w for w in base if w not in ("--instance_data_dir", str(photos))]
        )
        with pytest.raises(InputError, match=message):
            args = train_dreambooth_delora.parse_arguments([*words, *more])
            args.instance_prompt = None
            train_dreambooth_delora.check_arguments(args)
    assert not (tmp_path / "new").exists()


def train_maps(flags: list[str]) -> None:
    train_controlnet_map2img.main(flags)


def test_maps_continue_the_control_encoder(tiny_sd, run, tmp_path):
    pairs = write_map_folders(tmp_path / "pairs")
    run_in_child(train_maps, map_flags(tiny_sd, pairs, tmp_path / "first", "--max_train_steps", 2))
    frozen = ["--learning_rate", 0, "--lambda_learning_rate", 0, "--control_learning_rate", 0, "--max_train_steps", 1]
    run_in_child(
        train_maps, map_flags(tiny_sd, pairs, tmp_path / "second", "--init_adapter", tmp_path / "first", *frozen)
    )
    before, after = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("first", "second"))
    assert any(name.startswith("control_encoder.") for name in before)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    with pytest.raises(AssertionError, match="freezes a new encoder"):
        run_in_child(train_maps, map_flags(tiny_sd, pairs, tmp_path / "third", "--init_adapter", run[0], *frozen))
    with pytest.raises(AssertionError, match="was trained on maps; continue it with train_controlnet_map2img.py"):
        run_in_child(train, training_flags(tiny_sd, run[1], tmp_path / "third", "--init_adapter", tmp_path / "first"))
    with pytest.raises(AssertionError, match="trained on maps of other colours; give the --palette"):
        more = ("--init_adapter", tmp_path / "first", "--palette", "ade20k")
        run_in_child(train_maps, map_flags(tiny_sd, pairs, tmp_path / "third", *more))
    assert not (tmp_path / "third").exists()
    unet = open_model(str(tiny_sd)).load("unet", torch.float32)
    load_adapter(unet, tmp_path / "second")
