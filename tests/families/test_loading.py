"""Base models are loaded one part at a time, straight in their dtype; prompts are encoded before the denoiser loads."""

import hashlib
import importlib
import inspect
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from data.tiny_sd import write
from delora_diffusers import AdapterConfig, InputError, attach, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.families.checks import COMPONENTS
from delora_diffusers.families.loading import OpenModel, load_pipeline, open_model
from delora_diffusers.families.table import FAMILIES, Family, family_of
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from delora_diffusers.pipelines import encoded_prompts
from delora_diffusers.pipelines.adapted_pipeline import AdaptedPipeline, Weighted
from delora_diffusers.pipelines.conditions import encode_prompts, text_encoders
from delora_diffusers.pipelines.encoded_prompts import EncodedPrompts
from tests.helpers import map_flags, randomize, run_in_child, training_flags, write_map_folders
from tests.hub_server import serve_hub

CPU = torch.device("cpu")
KINDS = ("sd1", "sdxl")


@pytest.fixture(scope="module")
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


def short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes_of(model: torch.nn.Module) -> str:
    return "+".join(sorted({short(p.dtype) for p in model.parameters() if not p.is_meta and p.is_floating_point()}))


class Record:
    """What a run loads and drops, and which of the models that it loaded still have values at that time.

    Attributes:
        events: (what happens, the models that exist then, with the dtype of their first weight).
    """

    def __init__(self):
        self.events: list[tuple[str, str]] = []
        self._loaded: list[tuple[str, weakref.ref, list[StorageWeakRef]]] = []
        self._read: list[str] = []

    def add(self, event: str) -> None:
        """Record an event. Garbage is not collected here: that is the library's part."""
        live = [(name, model) for name, ref, _ in self._loaded if (model := ref()) is not None]
        named = [f"{name} {short(next(model.parameters()).dtype)}" for name, model in live]
        in_use = {p.untyped_storage()._cdata for _, model in live for p in model.parameters()}
        # The values of a model can outlive it, in tensors that share its memory, and the values before a cast too.
        for name, _, storages in self._loaded:
            if any(storage.cdata not in in_use and not storage.expired() for storage in storages):
                named.append(f"old values of {name}")
        self.events.append((event, ", ".join(sorted(named))))

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Record the calls of ``OpenModel.load`` and ``drop``, sampling, and the start of training."""
        from delora_diffusers.pipelines import sampling
        from delora_diffusers.training import class_images, loop, validation

        load, drop, sample, train = OpenModel.load, OpenModel.drop, sampling.sample_images, loop.train

        def loading(model: OpenModel, component: str, dtype: torch.dtype, *arguments: Any, **more: Any):
            self.add(f"load {component} {short(dtype)}")
            self._read.clear()
            loaded = load(model, component, dtype, *arguments, **more)
            assert self._read == [short(dtype)], f"{component} was read as {self._read}, and not as {dtype}"
            assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.parameters())
            storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in loaded.parameters()]
            self._loaded.append((component, weakref.ref(loaded), storages))
            return loaded

        def dropping(model: OpenModel, *components: str) -> None:
            drop(model, *components)
            self.add(f"drop {' '.join(components)}")

        def sampling_images(*arguments: Any, **more: Any):
            self.add("sample")
            return sample(*arguments, **more)

        def training(*arguments: Any, **more: Any):
            self.add("train")
            return train(*arguments, **more)

        patch.setattr(OpenModel, "load", loading)
        patch.setattr(OpenModel, "drop", dropping)
        for module in (sampling, class_images, validation):
            patch.setattr(module, "sample_images", sampling_images)
        patch.setattr(loop, "train", training)
        for library in (ModelMixin, PreTrainedModel):
            self._watch_reading(patch, library)

    def _watch_reading(self, patch: pytest.MonkeyPatch, library: type) -> None:
        """Record the dtypes that a model has when its library has read it, before anything casts it."""
        original = library.from_pretrained.__func__

        def reading(cls: type, *arguments: Any, **more: Any):
            model = original(cls, *arguments, **more)
            self._read.append(dtypes_of(model))
            return model

        patch.setattr(library, "from_pretrained", classmethod(reading))


def record_script(script: str, flags: list[str], file: Path) -> None:
    """Run a training script and write what it loads."""
    record = Record()
    with pytest.MonkeyPatch.context() as patch:
        record.watch(patch)
        importlib.import_module(script).main(flags)
    file.write_text(json.dumps(record.events))


def recorded(script: str, flags: list[str], file: Path) -> list[tuple[str, str]]:
    assert run_in_child(record_script, script, flags, file) == 0
    return [tuple(event) for event in json.loads(file.read_text())]


def of_xl(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same events of a model with two text encoders."""
    both = []
    for event, alive in events:
        if event.startswith("load text_encoder "):
            both += [(event, alive), (event.replace("encoder", "encoder_2"), event.removeprefix("load "))]
        else:
            both.append((event.replace("drop text_encoder", "drop text_encoder text_encoder_2"), alive))
    return both


PROMPTS = [("load text_encoder bfloat16", ""), ("drop text_encoder", "")]
PHOTOS = [("load vae float32", ""), ("drop vae", "")]
CLASS = [
    ("load unet bfloat16", ""),
    ("load vae bfloat16", "unet bfloat16"),
    ("sample", "unet bfloat16, vae bfloat16"),
    ("drop unet vae", ""),
]
DENOISER = [("load unet bfloat16", ""), ("train", "unet bfloat16")]
TRAINED_TEXT = [
    ("load text_encoder bfloat16", ""),
    ("load unet bfloat16", "text_encoder bfloat16"),
    ("train", "text_encoder bfloat16, unet bfloat16"),
]
VALIDATED = [
    ("load vae float32", ""),
    ("load unet bfloat16", "vae bfloat16"),
    ("train", "unet bfloat16, vae bfloat16"),
    ("sample", "unet bfloat16, vae bfloat16"),
]
PRIOR = ("--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 1)
VALIDATION = ("--validation_prompt", "a toy", "--num_validation_images", 1, "--validation_steps", 9)
RUNS = {
    "plain": ("sd1", (), [*PROMPTS, *PHOTOS, *DENOISER]),
    "SDXL": ("sdxl", (), of_xl([*PROMPTS, *PHOTOS, *DENOISER])),
    "validation": ("sd1", VALIDATION, [*PROMPTS, *VALIDATED]),
    "prior preservation": ("sd1", PRIOR, [*PROMPTS, *CLASS, *PHOTOS, *DENOISER]),
    "trained text encoder": ("sd1", ("--train_text_encoder",), [*PHOTOS, *TRAINED_TEXT]),
    "trained text encoder and prior preservation": (
        "sd1",
        ("--train_text_encoder", *PRIOR),
        [*PROMPTS, *CLASS, *PHOTOS, *TRAINED_TEXT],
    ),
}


@pytest.mark.integration
@pytest.mark.parametrize("case", list(RUNS))
def test_dreambooth_has_one_part_of_the_base_model_at_a_time(models, photographs, tmp_path, case):
    kind, flags, expected = RUNS[case]
    more = ("--mixed_precision", "bf16", "--max_train_steps", 1, "--validation_inference_steps", 1, *flags)
    argv = training_flags(models[kind], photographs, tmp_path / "out", *more)
    assert recorded("train_dreambooth_delora", argv, tmp_path / "events") == expected
    if case == "prior preservation":  # those images are there now, and nothing is loaded to generate them
        argv += ["--output_dir", str(tmp_path / "b"), "--class_data_dir", str(tmp_path / "out" / "class_images")]
        assert recorded("train_dreambooth_delora", argv, tmp_path / "events") == [*PROMPTS, *PHOTOS, *DENOISER]


@pytest.mark.integration
def test_training_on_maps_drops_the_text_encoders_before_the_denoiser_is_loaded(tiny_sd, tmp_path):
    flags = map_flags(tiny_sd, write_map_folders(tmp_path / "pairs"), tmp_path / "out", "--mixed_precision", "bf16")
    flags += ["--max_train_steps", "1", "--validation_inference_steps", "1"]
    assert recorded("train_controlnet_map2img", flags, tmp_path / "events") == [
        ("load text_encoder bfloat16", ""),
        ("load vae float32", "text_encoder bfloat16"),
        ("drop text_encoder", "vae float32"),
        ("load unet bfloat16", "vae bfloat16"),
        ("train", "unet bfloat16, vae bfloat16"),
        ("sample", "unet bfloat16, vae bfloat16"),
    ]


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


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> dict[tuple[str, bool], list[Path]]:
    """Two adapters by the kind of the model and whether they adapt the text encoders."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        (kind, text): [
            save_random_adapter(models[kind], folder / f"{kind}-{text}-{seed}", seed, text) for seed in (0, 5)
        ]
        for kind in KINDS
        for text in (False, True)
    }


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
def test_generate_drops_the_text_encoders_before_the_denoiser_is_loaded(
    models, adapters, tmp_path, monkeypatch, kind, with_text, sets
):
    record = Record()
    record.watch(monkeypatch)
    requests = [
        {"adapter": str(adapter), "prompts": ["a toy", "a cup"], "output_dir": str(tmp_path / adapter.name)}
        for adapter in adapters[kind, with_text][:sets]
    ]
    (tmp_path / "requests").write_text("".join(json.dumps(request) + "\n" for request in requests))
    flags = ["--requests_file", str(tmp_path / "requests"), "--num_inference_steps", "1", "--num_images", "1"]
    main(["generate", *flags, "--mixed_precision", "bf16", "--resolution", "32"])
    denoiser = [("load unet bfloat16", ""), ("load vae bfloat16", "unet bfloat16")]
    denoiser += [("sample", "unet bfloat16, vae bfloat16")] * sets
    prompts = [*PROMPTS, *denoiser]
    assert record.events == (of_xl(prompts) if kind == "sdxl" else prompts)


BAD = {
    "target": (["--targets", "to_q", "to_z"], "target to_z matches no module"),
    "rank": (["--rank", "500"], "rank is 500"),
    "blocks": (["--method", "oft", "--blocks", "7"], "blocks is 7, which does not divide"),
}


@pytest.fixture
def loading_fails(monkeypatch):
    """Loading any part of a base model fails the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a part of the base model is loaded")

    monkeypatch.setattr(OpenModel, "load", refuse)
    for library in (ModelMixin, PreTrainedModel):
        monkeypatch.setattr(library, "from_pretrained", refuse)


@pytest.mark.parametrize("script", ["train_dreambooth_delora", "train_controlnet_map2img"])
@pytest.mark.parametrize("case", list(BAD))
@pytest.mark.usefixtures("loading_fails")
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(tiny_sd, photographs, tmp_path, script, case):
    flags, message = BAD[case]
    if script == "train_dreambooth_delora":
        flags = training_flags(tiny_sd, photographs, tmp_path / "out", *flags)
    else:
        flags = map_flags(tiny_sd, write_map_folders(tmp_path / "pairs"), tmp_path / "out", *flags)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        importlib.import_module(script).main(flags)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("loading_fails")
def test_what_does_not_fit_the_text_encoder_is_refused_before_anything_is_loaded(tiny_sd, photographs, tmp_path):
    """16 blocks divide the widths of the UNet, but not that of this text encoder."""
    import train_dreambooth_delora as script

    model = shutil.copytree(tiny_sd, tmp_path / "narrow")
    file = model / "text_encoder" / "config.json"
    narrow = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | narrow))
    flags = ["--method", "oft", "--blocks", "16", "--train_text_encoder"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="blocks is 16, which does not divide a projection of width 24"):
        script.main(training_flags(model, photographs, tmp_path / "out", *flags))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
def test_each_part_is_read_in_its_dtype(models, monkeypatch, dtype):
    record = Record()
    record.watch(monkeypatch)
    model = open_model(str(models["sdxl"]))
    for component in model.skeletons:
        loaded = model.load(component, dtype)  # the record compares what was read
        assert dtypes_of(loaded) == short(dtype) and getattr(model.pipeline, component) is loaded
        assert {short(tensor.dtype) for tensor in loaded.buffers() if tensor.is_floating_point()} <= {short(dtype)}
        assert not loaded.training
        loaded.__dict__["itself"] = loaded  # a reference cycle, as hooks make them
        del loaded
        model.drop(component)
        assert record.events[-1] == (f"drop {component}", "")
    assert {event for event, _ in record.events} == {
        f"{verb} {component}{suffix}"
        for component in model.skeletons
        for verb, suffix in (("load", f" {short(dtype)}"), ("drop", ""))
    }


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


def encoded(
    model: Path, adapters: list[Path], sets: list[list[Weighted]], prompts: list[str], negative: str = ""
) -> EncodedPrompts:
    """Prompts encoded with each set of adapters, the sets in turn."""
    result = EncodedPrompts(open_model(str(model)), adapters, negative, CPU, torch.float32)
    for prompt in prompts:
        for weighted in sets:
            result.encode(prompt, weighted)
    result.finish()
    return result


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts that the text encoders read."""
    original, read = encoded_prompts.encode_prompts, []

    def counting(pipeline: Any, prompts: Any, device: Any):
        read.extend(prompts)
        return original(pipeline, prompts, device)

    patch.setattr(encoded_prompts, "encode_prompts", counting)
    yield read


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_with_each_set_of_adapters(models, adapters, monkeypatch, kind):
    first, second = adapters[kind, True]
    sets: list[list[Weighted]] = [
        [],
        [(first, 1.0)],
        [(first, 0.5)],
        [(second, 1.0)],
        [(first, 1.0), (second, 0.5)],
    ]
    prompts, negative = ["a dog", "a cat in the snow"], "blue"
    with counted(monkeypatch) as read:
        result = encoded(models[kind], [first, second], sets, prompts, negative)
    assert sorted(read) == sorted(["a dog", "a cat in the snow", "blue"] * len(sets))
    adapted = AdaptedPipeline(load_pipeline(str(models[kind])), [first, second])
    seen: list[torch.Tensor] = []
    for weighted in sets:
        adapted.use(weighted)
        arguments = result.arguments(prompts, weighted, CPU)
        for text, row in zip((*prompts, negative), (0, 1, 0)):
            prefix = "negative_" if text == negative else ""
            conditions = encode_prompts(adapted.pipeline, [text], CPU)
            assert torch.equal(arguments[f"{prefix}prompt_embeds"][row], conditions["encoder_hidden_states"][0])
            if kind == "sdxl":
                assert torch.equal(arguments[f"{prefix}pooled_prompt_embeds"][row], conditions["text_embeds"][0])
        embedding = arguments["prompt_embeds"]
        assert all((embedding - other).abs().max() > 1e-3 for other in seen)
        seen.append(embedding)


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_once_if_no_text_encoder_is_adapted(models, adapters, monkeypatch, kind):
    first, second = adapters[kind, False]
    sets: list[list[Weighted]] = [[(first, 1.0)], [(second, 1.0)]]
    with counted(monkeypatch) as read:
        result = encoded(models[kind], [first, second], sets, ["a dog", "a cat"])
    assert sorted(read) == ["", "a cat", "a dog"]
    one, other = (result.arguments(["a dog", "a cat"], weighted, CPU) for weighted in sets)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.model.pipeline.text_encoder is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "blue"])
@pytest.mark.parametrize("zeros", [True, False])
def test_negative_prompts_are_those_of_the_stock_pipeline(models, tmp_path, kind, negative, zeros):
    from diffusers import DiffusionPipeline

    folder = shutil.copytree(models[kind], tmp_path / "model")
    if kind == "sdxl":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    stock = DiffusionPipeline.from_pretrained(folder)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    theirs = stock.encode_prompt(
        "a dog", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative or None
    )
    ours = encoded(folder, [], [[]], ["a dog"], negative).arguments(["a dog"], [], CPU)
    assert list(ours) == names[: len(theirs)]
    for name, expected in zip(names, theirs):
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-5)
    is_zero = kind == "sdxl" and zeros and not negative
    assert all((tensor.abs().max() == 0) == is_zero for name, tensor in ours.items() if name.startswith("negative"))


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_does_not_depend_on_its_batch(models, kind):
    prompts = ["a dog", "a cat in the snow", "", "very " * 30]
    together = encoded(models[kind], [], [[]], prompts, "blue")
    batch = together.arguments(prompts, [], CPU)
    reverse = together.arguments(prompts[::-1], [], CPU)
    for row, prompt in enumerate(prompts):
        alone = encoded(models[kind], [], [[]], [prompt], "blue").arguments([prompt], [], CPU)
        for name, tensor in batch.items():
            assert torch.equal(tensor[row], alone[name][0]), name
            assert torch.equal(reverse[name][-1 - row], alone[name][0]), name


def test_encoded_prompts_have_the_dtype_of_the_denoiser(models):
    prompts = EncodedPrompts(open_model(str(models["sdxl"])), [], "", CPU, torch.bfloat16)
    prompts.encode("a dog", [])
    held = [weakref.ref(encoder) for encoder in text_encoders(prompts.model.pipeline).values()]
    assert len(held) == 2
    prompts.finish()
    assert [ref() for ref in held] == [None, None]
    arguments = prompts.arguments(["a dog"], [], CPU)
    assert {tensor.dtype for tensor in arguments.values()} == {torch.bfloat16}


def interface() -> dict[str, inspect.Signature]:
    methods = {name: value for name, value in vars(Family).items() if inspect.isfunction(value) and name[0] != "_"}
    signatures = {}
    for name, method in methods.items():
        signature = inspect.signature(method, eval_str=True)
        signatures[name] = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
    return signatures


@pytest.mark.parametrize("pipeline_class", list(FAMILIES))
def test_a_family_implements_the_interface(pipeline_class):
    module: Any = family_of(pipeline_class)
    functions = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    expected = interface()
    assert set(functions) == set(expected) == {"unsupported", "encode_tokens", "guided", "predict"}
    for name, function in functions.items():
        actual = inspect.signature(function, eval_str=True)
        if name == "predict":  # takes its conditions by name
            assert actual.return_annotation == expected[name].return_annotation
            *_, conditions = expected[name].parameters.values()
            positional = [p for p in actual.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
            keywords = [p for p in actual.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
            assert positional == list(expected[name].parameters.values())[:-1]
            assert {p.annotation for p in keywords} == {conditions.annotation}
            assert all(p.default is inspect.Parameter.empty for p in keywords)
        else:
            assert actual == expected[name], name
    constants = {name for name in vars(module) if name.isupper()}
    assert constants == set(Family.__annotations__) == {"TEXT_ENCODERS", "HAS_SIZES"}
    assert isinstance(module.HAS_SIZES, bool) and isinstance(module.TEXT_ENCODERS, tuple)
    assert set(module.TEXT_ENCODERS) <= set(COMPONENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_family_encodes_is_what_its_denoiser_takes(models, kind):
    pipeline = load_pipeline(str(models[kind]))
    family: Any = family_of(type(pipeline).__name__)
    assert list(text_encoders(pipeline)) == list(family.TEXT_ENCODERS)
    with torch.no_grad():
        conditions = encode_prompts(pipeline, ["a dog", "a cat"], CPU)
        if family.HAS_SIZES:
            conditions["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        parameters = inspect.signature(family.predict).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(conditions)
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        prediction = family.predict(pipeline.unet, noisy, torch.tensor([3, 700]), **conditions)
    assert prediction.shape == noisy.shape and prediction.isfinite().all()
