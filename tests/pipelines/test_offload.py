"""Offloaded blocks: nothing changes, one block at a time is on the device, and no other one is used.

On a CPU, offloading a block copies nothing. So here it overwrites the block's weights with NaN, and bringing the block
back gives it new tensors: whatever is computed with the weights of an offloaded block, or with an old reference to
those of any block, is NaN.
"""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks.group_offloading import ModuleGroup
from PIL import Image
from safetensors.torch import load_file
from torch.utils.checkpoint import set_checkpoint_early_stop

from data import tiny_sd as tiny_models
from delora_diffusers import AdapterConfig, attach, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.pipelines.offload import offload_blocks, repeated_blocks
from delora_diffusers.training.setup import run_checkpointed
from tests.adapter.test_quantized import assert_is_a_sentence, far
from tests.helpers import randomize, run_in_child, train, training_flags
from train_dreambooth_delora import check_arguments, parse_arguments

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
BLOCKS = 7
"""Of the tiny Stable Diffusion."""
PATHS = {
    "lean": {"path": "lean"},
    "split": {"path": "split"},
    "split in the model's dtype": {"path": "split", "split_dtype": "model"},
}
TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
    "sd3": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"),
    "flux": ("to_q", "to_k", "to_v", "proj_mlp"),
}


class Poison:
    """Overwrites the weights of offloaded groups with NaN.

    Attributes:
        resident: the groups that are on the device. order: of all that were brought there, by their first module.
        most: groups that were on the device at once.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.resident: set[ModuleGroup] = set()
        self.order: list[torch.nn.Module] = []
        self.most = 0
        self._kept: dict[torch.Tensor, torch.Tensor] = {}
        poison = self

        def onload_(group: ModuleGroup) -> None:
            for tensor in tensors(group):
                if tensor in poison._kept:
                    tensor.data = poison._kept.pop(tensor)
            poison.resident.add(group)
            poison.order.append(group.modules[0])
            poison.most = max(poison.most, len(poison.resident))

        def offload_(group: ModuleGroup) -> None:
            for tensor in tensors(group):
                if tensor not in poison._kept:
                    poison._kept[tensor] = tensor.data.clone()
                    tensor.data.fill_(float("nan"))  # for whoever has kept it
                    tensor.data = tensor.data.clone()
            poison.resident.discard(group)

        patch.setattr(ModuleGroup, "onload_", onload_)
        patch.setattr(ModuleGroup, "offload_", offload_)


def tensors(group: ModuleGroup) -> list[torch.Tensor]:
    return [parameter for module in group.modules for parameter in module.parameters()]


@pytest.fixture
def poison(monkeypatch) -> Poison:
    return Poison(monkeypatch)


def model_and_inputs(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A tiny denoiser with gradient checkpointing, and the inputs of a batch of two."""
    if kind in tiny_models.TRANSFORMERS:
        model, inputs = tiny_models.transformer(kind)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = tiny_models.KINDS[kind]["unet"]
            model: Any = UNet2DConditionModel(**shape)
            inputs: dict[str, Any] = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
            inputs["encoder_hidden_states"] = torch.randn(2, 7, shape["cross_attention_dim"])
            if kind == "sdxl":
                inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 48), "time_ids": torch.rand(2, 6)}
    model.enable_gradient_checkpointing(run_checkpointed)
    if dtype != torch.float32:
        inputs |= {key: inputs[key].to(dtype) for key in ("sample", "encoder_hidden_states")}
    return model.to(dtype).train(), inputs


def adapted(kind: str, path: dict[str, Any], compute_device: torch.device | None, dtype: torch.dtype = torch.float32):
    """A model with a randomized adapter, and its inputs."""
    model, inputs = model_and_inputs(kind, dtype)
    config = AdapterConfig(rank=4, targets=TARGETS.get(kind, TARGETS["unet"]), **path)
    adapter = attach(model, config, torch.Generator().manual_seed(0), compute_device)
    randomize(adapter)
    return model, adapter, inputs


def steps(model, adapter, inputs, count: int = 2):
    """Outputs and gradients of several forwards and backwards, then the output without gradients."""
    results = []
    for _ in range(count):
        adapter.zero_grad()
        output = model(**inputs)[0]
        output.float().square().sum().backward()
        results += [output.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())]
    with torch.no_grad():
        results += [model(**inputs)[0], model(**inputs)[0]]
    return results


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_and_no_offloaded_weight_is_used(poison, path, dtype):
    check_equal("sd1", PATHS[path], poison, dtype)


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("path", ["lean", "split"])
def test_nothing_changes_in_other_models(poison, kind, path):
    check_equal(kind, PATHS[path], poison)


def test_blocks_stay_for_their_backward_however_they_are_recomputed(poison):
    """Checkpointing usually stops before a recomputed block's forward ends, so before hooks at its end."""
    with set_checkpoint_early_stop(False):
        check_equal("sd1", PATHS["lean"], poison)


def check_equal(kind: str, path: dict[str, Any], poison: Poison, dtype: torch.dtype = torch.float32) -> None:
    resident = steps(*adapted(kind, path, None, dtype))
    expected = steps(*adapted(kind, path, CPU, dtype))
    model, adapter, inputs = adapted(kind, path, CPU, dtype)
    offload_blocks(model, CPU)
    assert adapter.path == path["path"]
    blocks = repeated_blocks(model)
    assert len(blocks) > 1 and not poison.order
    assert all(parameter.isnan().all() for block in blocks for parameter in block.parameters())
    for actual, other, joint in zip(steps(model, adapter, inputs), expected, resident, strict=True):
        assert torch.equal(actual, other) and actual.isfinite().all()
        if path["path"] == "lean":
            assert torch.equal(actual, joint)
        else:  # q, k and v are one product if the weights stay where they are, which sums in another order
            assert far(actual, joint) < (1e-5 if dtype == torch.float32 else 0.06)
    assert poison.most == 1 and set(poison.order) == set(blocks)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux"])
def test_the_order_of_the_copies(poison, kind):
    """Each block once in the forward, and once in the backward from the last one."""
    model, _, inputs = adapted(kind, {"path": "lean"}, CPU)
    offload_blocks(model, CPU)
    model(**inputs)[0].sum().backward()
    forwards = poison.order[: len(repeated_blocks(model))]
    assert len(set(forwards)) == len(forwards) == len(repeated_blocks(model))
    backwards = poison.order[len(forwards) :]
    assert [*dict.fromkeys(backwards)] == list(reversed(forwards))
    assert len(poison.order) == 2 * len(forwards)


def test_the_rest_of_the_model_is_moved_and_the_blocks_are_not(monkeypatch):
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)  # what diffusers looks up for a device
    model, _ = model_and_inputs("sdxl")
    blocks = repeated_blocks(model)
    offload_blocks(model, torch.device("meta"))
    inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    assert len(inside) > 10
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.is_meta != (id(tensor) in inside), name


def test_the_adapter_is_on_the_compute_device():
    model, _ = model_and_inputs("sd1")
    adapter = attach(model, AdapterConfig(rank=2), compute_device=torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*adapter.parameters(), *adapter.buffers()))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_auto_is_lean():
    model, _ = model_and_inputs("sd1")
    assert attach(model, AdapterConfig(rank=2), compute_device=CPU).path == "lean"


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=2, path="fast"),
        *(AdapterConfig(method=name) for name, method in METHODS.items() if not method.has_factors and name != "full"),
    ],
    ids=lambda config: config.method,
)
def test_what_cannot_adapt_offloaded_weights_is_refused(config):
    model, _ = model_and_inputs("sd1")
    with pytest.raises(InputError, match="weights are offloaded") as raised:
        attach(model, config, compute_device=CPU)
    assert_is_a_sentence(str(raised.value))
    assert any(parameter.requires_grad for parameter in model.parameters())


def train_poisoned(flags: list[str]) -> None:
    """Run the script, and fail if blocks were not offloaded or not one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch)
        train(flags)
    assert poison.most == 1 and len(set(poison.order)) == BLOCKS


AUTO = ("--path", "auto")
ALL = ("--path", "lean", "--train_text_encoder", "--mixed_precision", "bf16", "--gradient_accumulation_steps", 2)


@pytest.mark.parametrize("more", [AUTO, ALL], ids=["auto", "text encoder, bf16"])
def test_a_run_with_offloading_equals_one_without(tiny_sd, photographs, tmp_path, more):
    """Validation images in between included, which are made without gradients."""
    validated = ("--validation_prompt", "a sks toy", "--validation_steps", 1, "--validation_inference_steps", 2)

    def flags(out: str, *others: object) -> list[str]:
        steps = ("--max_train_steps", 2, "--num_validation_images", 1)
        return training_flags(tiny_sd, photographs, tmp_path / out, *steps, *validated, *more, *others)

    run_in_child(train_poisoned, flags("offloaded", "--offload"))
    run_in_child(train, flags("kept", "--gradient_checkpointing", "--path", "lean"))
    offloaded, kept = (load_file(tmp_path / out / WEIGHTS_NAME) for out in ("offloaded", "kept"))
    assert offloaded.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(offloaded[name], tensor), name
    for image in ("step-000001.png", "step-000002.png"):
        assert (tmp_path / "offloaded" / "validation" / image).read_bytes() == (
            tmp_path / "kept" / "validation" / image
        ).read_bytes()


@pytest.fixture(scope="module")
def adapters(tiny_sd, tmp_path_factory):
    """Files of two adapters that change images visibly, one of them with another method and targets."""
    files = []
    for number, config in enumerate((AdapterConfig(rank=4), AdapterConfig("oft", targets=("to_q", "ff.net.2")))):
        unet: Any = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
        adapter = attach(unet, config, torch.Generator().manual_seed(number))
        randomize(adapter, 0.5)
        files.append(save_adapter(adapter, tmp_path_factory.mktemp("adapter"), base_model=str(tiny_sd)))
    return files


def generate(adapters, out, *more: object) -> list[np.ndarray]:
    """Generate three images in two batches; returns their pixels."""
    flags = ["--output_dir", out, "--prompt", "a sks toy", "--num_inference_steps", 2, "--num_images", 3]
    flags += [*(["--adapter", *adapters] if adapters else []), "--batch_size", 2, *more]
    main(["generate", *map(str, flags)])
    files = sorted(file for file in out.glob("*.png") if file.name != "contact_sheet.png")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_generate_with_offloading_equals_generate_without(tiny_sd, adapters, tmp_path, poison, count):
    model = ["--pretrained_model_name_or_path", tiny_sd, *(["--strength", 0.7] if count else [])]
    expected = generate(adapters[:count], tmp_path / "kept", *model)
    assert not poison.order and len(expected) == 3
    offloaded = generate(adapters[:count], tmp_path / "offloaded", *model, "--offload")
    assert poison.most == 1 and len(set(poison.order)) == BLOCKS
    for image, other in zip(offloaded, expected, strict=True):
        assert np.array_equal(image, other)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--path", "fast"), "which --path fast does not allow; leave out --path"),
        (("--cuda_graph",), "which --cuda_graph does not allow; leave out one of them"),
        (("--base_precision", "int8"), "which --base_precision int8 does not allow; leave out one of them"),
        (("--method", "oft"), "--offload needs a low-rank method, which OFT is not; use --method delora or lora"),
    ],
)
def test_flags_that_exclude_offloading_are_refused_before_anything_is_loaded(
    tiny_sd, photographs, tmp_path, more, message
):
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", *more)
    check_arguments(parse_arguments(flags))
    with pytest.raises(InputError, match=message) as raised:
        check_arguments(parse_arguments([*flags, "--offload"]))
    assert_is_a_sentence(str(raised.value))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--strength", 1, 0.5), "--offload works with one set of adapters at one strength"),
        (("--base_precision", "int8"), "--offload and --base_precision int8 exclude each other"),
    ],
)
def test_what_generate_cannot_do_with_offloading_is_refused(adapters, tmp_path, more, message):
    with pytest.raises(SystemExit) as stop:
        generate(adapters[:1], tmp_path / "images", "--offload", *more)
    assert_is_a_sentence(str(stop.value.code))
    assert message in str(stop.value.code) and not list(tmp_path.rglob("*.png"))
