"""Base models are loaded one part at a time, the denoiser last, and only if the settings fit them."""

import importlib
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from delora_diffusers import InputError
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import OpenModel, open_model
from tests.helpers import map_flags, run_in_child, training_flags, write_map_folders

CPU = torch.device("cpu")
KINDS = ("sd1", "sdxl")


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
            result = original(cls, *arguments, **more)
            self._read.append(dtypes_of(result[0] if isinstance(result, tuple) else result))
            return result

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
    """The same events of a model with two text encoders, which are loaded one after another."""
    both = []
    for event, alive in events:
        both.append((event, alive))
        if event.startswith("load text_encoder "):
            loaded = (event.replace("encoder", "encoder_2"), alive)
        elif event == "drop text_encoder":
            both += [loaded, ("drop text_encoder_2", alive)]
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
