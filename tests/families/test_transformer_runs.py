"""The transformer families from the command line, in this process: a run, its continuation, and what it is good for.

Images are compared with those of stock diffusers, which loads the exported adapter. All pipelines are tiny.
"""

import dataclasses
import gc
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth_delora
from delora_diffusers import AdapterConfig, InputError, attach, load_adapter, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import open_model
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.pipelines import sampling
from delora_diffusers.training.batches import SubjectBatches
from tests.families.tiny import KINDS, TinyModels, stock_pipeline
from tests.helpers import randomize, training_flags, write_map_folders, write_photos, write_subjects

pytestmark = pytest.mark.integration

FAMILIES = ("sd3", "flux", "flux2-klein", "zimage", "qwenimage")
"""One kind of each family."""
STEPS, SIDE = 2, 32
"""Denoising steps, and the resolution."""
PROMPTS = ["a sks toy", "a sks toy in the deep snow at night"]
CLASS_PROMPT = "a toy on a table"
PRIOR = ("--with_prior_preservation", "--class_prompt", CLASS_PROMPT, "--num_class_images", 2, "--guidance_scale", 1.5)
SETTINGS: dict[str, tuple[object, ...]] = {
    "sd3": ("--train_text_encoder",),
    "flux": ("--train_text_encoder",),
    "flux2-klein": PRIOR,
    "zimage": ("--timestep_shift", "resolution", "--weighting_scheme", "cosmap"),
    "qwenimage": ("--path", "lean", "--gradient_checkpointing"),
}
WITHOUT_NEGATIVE_PROMPT = ("flux", "flux-schnell", "flux2-dev")


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection():
    """Dropping a model collects garbage, which takes half a second if all the libraries' objects are searched."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Two photos whose captions differ in length."""
    folder = write_photos(tmp_path_factory.mktemp("photos"), 2)
    (folder / "01.txt").write_text("a sks toy on a meadow in the sun")
    return folder


@contextmanager
def sampled() -> Iterator[list[Tensor]]:
    """The batches of images that are sampled inside, (batch, 3, height, width), 0 to 1, before they are rounded."""
    batches: list[Tensor] = []
    original = sampling.decode

    def recording(*arguments: Any) -> Tensor:
        images = original(*arguments)
        batches.append((images / 2 + 0.5).clamp(0, 1))
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "decode", recording)
        yield batches


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        model: folder of the base model. out: of the run.
        images: batches that were sampled during the run: class images, then the validation image.
    """

    kind: str
    model: Path
    out: Path
    photos: Path
    images: list[Tensor]

    def flags(self, out: Path, *more: object) -> list[str]:
        steps = ("--max_train_steps", 3, "--checkpointing_steps", 2, "--learning_rate", 0.1, "--train_batch_size", 2)
        images = ("--num_validation_images", 1, "--validation_inference_steps", STEPS, "--validation_prompt")
        settings = (*steps, *images, PROMPTS[1], "--resolution", SIDE, *SETTINGS.get(self.kind, ()))
        return training_flags(self.model, self.photos, out, *settings, *more)

    def stock(self) -> Any:
        return stock_pipeline(self.model, self.kind)


@pytest.fixture(scope="session")
def runs(tiny, photos, tmp_path_factory) -> Any:
    """Trains on a kind of pipeline when that is first asked for."""
    finished: dict[str, Run] = {}
    folder = tmp_path_factory.mktemp("runs")

    def run_of(kind: str) -> Run:
        if kind not in finished:
            run = Run(kind, tiny.folder(kind), folder / kind, photos, [])
            with sampled() as images:
                train_dreambooth_delora.main(run.flags(run.out))
            run.images.extend(images)
            finished[kind] = run
        return finished[kind]

    return run_of


@pytest.fixture(scope="session", params=KINDS)
def run(request, runs) -> Run:
    return runs(request.param)


of_each_family = pytest.mark.parametrize("run", FAMILIES, indirect=True)


def command(*words: object) -> None:
    main([str(word) for word in words])


def generate(out: Path, *more: object) -> Tensor:
    """The images that the command generates, before they are rounded."""
    words = ("--num_images", 1, "--num_inference_steps", STEPS, "--resolution", SIDE, "--output_dir", out, *more)
    with sampled() as batches:
        command("generate", *words)
    return torch.cat(batches)


@torch.no_grad()
def stock_images(pipeline: Any, prompts: list[str], seeds: list[int], negative: str = "", **more: Any) -> Tensor:
    """What stock diffusers samples, (batch, 3, height, width), 0 to 1."""
    kind = type(pipeline).__name__
    if kind == "QwenImagePipeline":
        more["negative_prompt"] = [negative or " "] * len(prompts)
    elif negative and kind == "Flux2KleinPipeline":
        more["negative_prompt_embeds"] = pipeline.encode_prompt([negative] * len(prompts))[0]
    elif negative:
        more["negative_prompt"] = [negative] * len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "pt"}
    prompts = list(prompts)  # which Z-Image's pipeline changes
    return pipeline(prompt=prompts, generator=generators, **size, **more).images


def assert_same(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_images_are_those_of_stock_diffusers(run, tmp_path):
    negative = "" if run.kind in WITHOUT_NEGATIVE_PROMPT else "a blue sky"
    scale = {"true_cfg_scale" if run.kind == "qwenimage" else "guidance_scale": 2.5}
    more = ("--prompt", *PROMPTS, "--seed", 5, "--guidance_scale", 2.5, "--negative_prompt", negative)
    ours = generate(tmp_path / "g", "--adapter", run.out, *more, "--strength", 0, 0.5, 1)
    command("export", "--adapter", run.out, "--format", "diffusers", "--output", tmp_path / "lora")
    stock = run.stock()
    of_prior = run.images[:-1]
    in_training: dict[str, Any] = {"guidance_scale": 1.5} if run.kind == "flux2-klein" else {}
    theirs = [stock_images(stock, PROMPTS, [5, 5], negative, **scale)]
    if "--with_prior_preservation" in SETTINGS.get(run.kind, ()):
        assert_same(torch.cat(of_prior), stock_images(stock, [CLASS_PROMPT] * 2, [0, 1], **in_training))
    else:
        assert not of_prior
    stock.load_lora_weights(tmp_path / "lora", adapter_name="a")
    for strength in (0.5, 1.0):
        stock.set_adapters("a", strength)
        theirs.append(stock_images(stock, PROMPTS, [5, 5], negative, **scale))
    assert_same(ours, torch.cat(theirs))
    assert min((theirs[i] - theirs[i - 1]).abs().max() for i in range(3)) > 0.01, "the adapter matters"

    validated = stock_images(stock, PROMPTS[1:], [0], **in_training)
    assert_same(run.images[-1], validated)
    with Image.open(run.out / "samples" / "00.png") as image:
        written = np.asarray(image).transpose(2, 0, 1) / 255
    assert np.abs(written - validated[0].numpy()).max() < 1.1 / 255
    records = [json.loads(line) for line in (tmp_path / "g" / "metadata.jsonl").read_text().splitlines()]
    sheet = [(record["prompt"], record["strength"]) for record in records]
    assert sorted(sheet) == sorted((prompt, strength) for prompt in PROMPTS for strength in (0, 0.5, 1))
    assert (tmp_path / "g" / "contact_sheet.png").is_file()


@contextmanager
def trained_batches() -> Iterator[list[tuple[int, Any]]]:
    """The micro-batches that are trained on inside, with their indices."""
    original, batches = SubjectBatches.__call__, []

    def recording(of_subjects: SubjectBatches, microbatch: int) -> Any:
        batches.append((microbatch, original(of_subjects, microbatch)))
        return batches[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubjectBatches, "__call__", recording)
        yield batches


@of_each_family
def test_a_run_continues_to_the_same_bytes(run, tmp_path):
    out = shutil.copytree(run.out, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-3")
    (out / WEIGHTS_NAME).unlink()
    with trained_batches() as batches:
        train_dreambooth_delora.main(run.flags(out, "--resume_from_checkpoint", "latest"))
    assert [microbatch for microbatch, _ in batches] == [2]
    assert (out / WEIGHTS_NAME).read_bytes() == (run.out / WEIGHTS_NAME).read_bytes()
    earlier, last = (run.out / f"checkpoint-{step}" / WEIGHTS_NAME for step in (2, 3))
    assert earlier.read_bytes() != last.read_bytes()
    components = {key.partition(".")[0] for key in load_file(run.out / WEIGHTS_NAME)}
    encoders = {"sd3": {"text_encoder", "text_encoder_2"}, "flux": {"text_encoder"}}
    assert components == {"transformer"} | encoders.get(run.kind, set())


@of_each_family
def test_a_merged_pipeline_samples_the_same_images(run, tmp_path):
    command("merge", "--adapter", run.out, "--output_dir", tmp_path / "merged")
    words = ("--prompt", *PROMPTS)
    adapted = generate(tmp_path / "adapted", "--adapter", run.out, *words)
    merged = generate(tmp_path / "g", "--pretrained_model_name_or_path", tmp_path / "merged", *words)
    assert_same(merged, adapted, 1e-3)
    assert_same(merged, stock_images(stock_pipeline(tmp_path / "merged", run.kind), PROMPTS, [0, 0]))


@of_each_family
def test_what_info_says(run, capsys):
    command("info", run.out)
    lines = capsys.readouterr().out.splitlines()
    modules = {"sd3": 27, "flux": 22, "flux2-klein": 20, "zimage": 24, "qwenimage": 16}[run.kind]
    assert f"transformer: {modules} modules" in lines
    assert ("text_encoder: 8 modules" in lines) == (run.kind in ("sd3", "flux"))
    assert f"base model: {run.model}" in lines


@pytest.mark.parametrize("run", ["qwenimage"], indirect=True)
def test_the_memory_that_info_estimates(run, capsys):
    command("info", "--memory", run.model, "--resolution", SIDE)
    out = capsys.readouterr().out
    assert f"| {SIDE} pixels, rank 16 | weights |" in out and out.count("GB |") == 6


def delta_weights(run: Run, adapter: Path) -> dict[str, Tensor]:
    """The updates of the transformer's modules."""
    transformer = open_model(str(run.model)).load("transformer", torch.float32)
    attached = load_adapter(transformer, adapter, "transformer")
    return {name: attached.delta_weight(name) for name in attached.names}


@pytest.mark.parametrize("run", ["sd3", "zimage"], indirect=True)
def test_peft_loads_the_exported_folder(run, tmp_path):
    from peft import PeftModel

    command("export", "--adapter", run.out, "--format", "peft", "--output", tmp_path / "peft")
    transformer, folder = open_model(str(run.model)).load("transformer", torch.float32), tmp_path / "peft"
    if run.kind == "sd3":
        assert {path.name for path in folder.iterdir()} == {"transformer", "text_encoder", "text_encoder_2"}
        folder = folder / "transformer"
    before = {name: module.weight.clone() for name, module in linears(transformer).items()}
    merged: Any = PeftModel.from_pretrained(transformer, str(folder)).merge_and_unload()
    after, expected = linears(merged), delta_weights(run, run.out)
    for name, weight in before.items():
        change = after[name].weight - weight
        torch.testing.assert_close(change, expected.get(name, torch.zeros_like(change)), atol=1e-5, rtol=1e-4)


def linears(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("run", ["flux2-klein", "zimage", "qwenimage"], indirect=True)
def test_an_adapter_goes_to_peft_and_back(run, tmp_path):
    command("export", "--adapter", run.out, "--format", "peft-delora", "--output", tmp_path / "peft")
    base = ("--pretrained_model_name_or_path", run.model)
    command("import", "--peft_dir", tmp_path / "peft", *base, "--output_dir", tmp_path / "back")
    expected, actual = (delta_weights(run, folder) for folder in (run.out, tmp_path / "back"))
    assert actual.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(actual[name], update, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("run", ["flux2-klein", "zimage", "qwenimage"], indirect=True)
def test_diffusers_reads_the_kohya_file(run, tmp_path):
    products = []
    for name in ("diffusers", "kohya"):
        file = tmp_path / f"{name}.safetensors"
        command("export", "--adapter", run.out, "--format", name, "--output", file)
        state: Any = run_loader(run)(str(tmp_path), weight_name=file.name)
        names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
        products.append({n: state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names})
    stock, kohya = products
    assert stock.keys() <= kohya.keys() and len(stock) > 10
    for name, product in kohya.items():
        torch.testing.assert_close(product, stock.get(name, torch.zeros_like(product)), atol=1e-5, rtol=1e-4)


def run_loader(run: Run) -> Any:
    return getattr(diffusers, json.loads((run.model / "model_index.json").read_text())["_class_name"]).lora_state_dict


def random_adapter(run: Run, folder: Path) -> Path:
    transformer, kind = open_model(str(run.model)).load("transformer", torch.float32), type(run.stock()).__name__
    adapter = attach(transformer, AdapterConfig(rank=2), torch.Generator().manual_seed(9))
    randomize(adapter, 0.5)
    return save_adapter(adapter, folder, component="transformer", base_model=str(run.model), pipeline=kind)


@pytest.mark.parametrize("run", ["flux", "zimage"], indirect=True)
def test_two_adapters_are_mixed(run, tmp_path):
    adapters, weights = (run.out, random_adapter(run, tmp_path / "second")), (0.7, -0.4)
    words = ("--adapter", *adapters, "--adapter_weights", *weights, "--prompt", *PROMPTS)
    ours = generate(tmp_path / "g", *words)
    stock = run.stock()
    for number, adapter in enumerate(adapters):
        command("export", "--adapter", adapter, "--format", "diffusers", "--output", tmp_path / f"lora{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of several adapters
            stock.load_lora_weights(tmp_path / f"lora{number}", adapter_name=str(number))
    stock.set_adapters(["0", "1"], list(weights))
    assert_same(ours, stock_images(stock, PROMPTS, [0, 0]))


def refused(message: str, *words: object) -> None:
    with pytest.raises((InputError, SystemExit), match=message) as raised:
        command(*words)
    assert_is_a_sentence(raised.value)


def refused_training(out: Path, message: str, flags: list[str], script: Any = train_dreambooth_delora) -> None:
    with pytest.raises(InputError, match=message) as raised:
        script.main(flags)
    assert_is_a_sentence(raised.value)
    assert not out.exists(), "something was written"


def assert_is_a_sentence(error: BaseException) -> None:
    text = str(error).removeprefix("error: ")
    assert text.endswith(".") and "\n" not in text and len(text) < 500, text


TRAINING_FLAGS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "no CLIP in Z-Image": ("zimage", ("--train_text_encoder",), "--train_text_encoder .*CLIP.*leave it out"),
    "no CLIP in FLUX.2": ("flux2-klein", ("--train_text_encoder",), "--train_text_encoder .*CLIP.*leave it out"),
    "snr_gamma": ("flux", ("--snr_gamma", 5), "--snr_gamma .*does not apply to .* flow.*leave it out"),
    "weighting_scheme": ("sd", ("--weighting_scheme", "cosmap"), "--weighting_scheme cosmap does not apply to .* DDPM"),
    "timestep_shift": ("sd", ("--timestep_shift", 3), "--timestep_shift .*does not apply to .* DDPM.*leave it out"),
    "mode_scale": ("sd3", ("--mode_scale", 1), "--mode_scale belongs to --weighting_scheme mode, .*leave out"),
    "patches": ("flux", ("--resolution", 72), "--resolution 72 is not a multiple of 16.*use (64|80)"),
    "patched latents": ("flux2-klein", ("--resolution", 72), "--resolution 72 is not a multiple of 16.*use (64|80)"),
    "a container": ("flux", ("--targets", "to_out"), "target to_out matches .*attn.to_out of .*give to_out.0"),
}


@pytest.mark.parametrize("case", TRAINING_FLAGS)
def test_flags_that_do_not_fit_the_model(tiny, tiny_sd, photos, tmp_path, case):
    kind, more, message = TRAINING_FLAGS[case]
    model = tiny_sd if kind == "sd" else tiny.folder(kind)
    refused_training(tmp_path / "out", message, training_flags(model, photos, tmp_path / "out", *more))


@pytest.mark.parametrize("kind", ["zimage", "qwenimage"])
def test_prompts_of_the_same_length_need_no_mask(tiny, tmp_path, kind):
    """With one prompt all batches have the same shape, so that a CUDA graph of the step can be recorded."""
    photos, out = write_photos(tmp_path / "photos", 2), tmp_path / "out"
    with trained_batches() as batches:
        train_dreambooth_delora.main(training_flags(tiny.folder(kind), photos, out, "--max_train_steps", 1))
    assert batches and not any("mask" in batch for _, batch in batches)


def test_no_cuda_graph_of_prompts_of_different_lengths(tiny, photos, tmp_path):
    message = "--cuda_graph needs batches of the same shape.*; leave it out"
    flags = training_flags(tiny.folder("zimage"), photos, tmp_path / "out", "--cuda_graph")
    refused_training(tmp_path / "out", message, flags)


def test_to_out_adapts_the_linear_modules_of_that_name_only(tiny, photos, tmp_path):
    model, out = tiny.folder("flux2-klein"), tmp_path / "out"
    train_dreambooth_delora.main(
        training_flags(model, photos, out, "--targets", "to_out", "--max_train_steps", 1, "--rank", 2)
    )
    modules = {key.rpartition(".")[0] for key in load_file(out / WEIGHTS_NAME)}
    assert modules == {f"transformer.single_transformer_blocks.{i}.attn.to_out" for i in range(2)}


def test_several_subjects_are_trained_on_a_unet_only(tiny, tmp_path):
    photos = [write_photos(tmp_path / name, 1) for name in ("dog", "mug")]
    flags = training_flags(tiny.folder("sd3"), photos[0], tmp_path / "run")
    first = flags.index("--instance_data_dir")
    flags = [*flags[:first], *flags[first + 4 :], "--subjects_file", write_subjects(tmp_path / "s", photos)]
    refused_training(tmp_path / "run", "several subjects .* only", flags)
    assert not (tmp_path / "s" / "dog").exists()


def test_maps_need_a_unet(tiny, tmp_path):
    import train_controlnet_map2img

    flags = ["--pretrained_model_name_or_path", tiny.folder("flux"), "--output_dir", tmp_path / "out"]
    flags += ["--train_data_dir", write_map_folders(tmp_path / "pairs")]
    message = "is not Stable Diffusion 1.x or 2.x; training on maps needs one of these"
    refused_training(tmp_path / "out", message, [str(flag) for flag in flags], train_controlnet_map2img)


def with_json(model: Path, folder: Path, file: str, **values: Any) -> Path:
    """A copy of a pipeline with other values in one of its JSON files."""
    path = shutil.copytree(model, folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_models_of_no_family(tiny, photos, tmp_path):
    other = with_json(tiny.folder("zimage"), tmp_path / "other", "model_index.json", _class_name="LuminaPipeline")
    message = "is a LuminaPipeline; choose .*FluxPipeline.*QwenImagePipeline"
    refused_training(tmp_path / "out", message, training_flags(other, photos, tmp_path / "out"))
    base = ("--pretrained_model_name_or_path", other)
    refused(message, "generate", *base, "--prompt", "a dog", "--output_dir", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_scheduler_that_is_not_a_flows(tiny, photos, tmp_path):
    scheduler = ["diffusers", "DDIMScheduler"]
    model = with_json(tiny.folder("zimage"), tmp_path / "model", "model_index.json", scheduler=scheduler)
    message = "has a DDIMScheduler, whose noise schedule is not that of a flow; choose a base model"
    refused_training(tmp_path / "out", message, training_flags(model, photos, tmp_path / "out"))
    base = ("--pretrained_model_name_or_path", model)
    refused(message, "generate", *base, "--prompt", "a dog", "--output_dir", tmp_path / "out", "--resolution", SIDE)
    assert not list((tmp_path / "out").rglob("*.png"))


NO_NEGATIVE = "--negative_prompt has no effect on this model.*; leave it out"
GENERATING_FLAGS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "flux": ("flux", ("--negative_prompt", "blue"), NO_NEGATIVE),
    "dev": ("flux2-dev", ("--negative_prompt", "blue"), NO_NEGATIVE),
    "distilled klein": ("flux2-klein", ("--negative_prompt", "blue"), NO_NEGATIVE),
    "ddim": ("zimage", ("--scheduler", "ddim"), "--scheduler ddim is not for flow models such as this.*; leave it out"),
    "one step": ("qwenimage", ("--num_inference_steps", 1), "--num_inference_steps 1 "),  # stock diffusers: NaN
    "patches of flux": ("flux", ("--resolution", 72), "--resolution 72 is not a multiple of 16"),
    "patches of sd3": ("sd3", ("--resolution", 72), "--resolution 72 is not a multiple of 16"),
    "patches of Z-Image": ("zimage", ("--resolution", 72), "--resolution 72 is not a multiple of 16"),
}


@pytest.mark.parametrize("case", GENERATING_FLAGS)
def test_flags_of_generate_that_do_not_fit_the_model(tiny, tmp_path, case):
    kind, more, message = GENERATING_FLAGS[case]
    model = tiny.folder(kind)
    if case == "distilled klein":
        model = with_json(model, tmp_path / "distilled", "model_index.json", is_distilled=True)
    words = ("--pretrained_model_name_or_path", model, "--num_inference_steps", 2, "--num_images", 1)
    words = (*words, "--resolution", SIDE, "--prompt", "a dog", "--output_dir", tmp_path / "out")
    refused(message, "generate", *words, *more)
    assert not list((tmp_path / "out").rglob("*.png"))
