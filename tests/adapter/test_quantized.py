"""Adapters on models quantized by bitsandbytes (nf4) and torchao (int8, fp8), against the dequantized models."""

import functools
import importlib
import importlib.util
import re
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from delora_diffusers import AdapterConfig, attach, detach, load_adapter, merge, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.adapter.attach import attachment
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.errors import InputError
from delora_diffusers.families.quantization import quantization_config
from delora_diffusers.families.sd import FAMILY as SD
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.training.setup import run_checkpointed
from tests.helpers import randomize, run_in_child, together_flags, train, training_flags
from tests.training.test_training import train_and_die
from train_dreambooth_delora import check_arguments, parse_arguments

pytestmark = pytest.mark.integration

NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "time_emb_proj")
"""Attention, modules outside it, and ``time_emb_proj``, which is not quantized."""
Configuration = functools.partial(AdapterConfig, rank=4, targets=TARGETS)
PATHS: dict[str, dict[str, Any]] = {
    "float32": {"path": "split", "split_dtype": "float32"},
    "model": {"path": "split", "split_dtype": "model"},
    "lean": {"path": "lean"},
}
# fp8 takes the way of int8, through torchao, and is tried on the GPU too.
FP8 = pytest.param("fp8", marks=pytest.mark.slow)
every_precision = pytest.mark.parametrize("precision", [NF4, "int8", FP8])
every_path = pytest.mark.parametrize("path", list(PATHS))
both_paths = pytest.mark.parametrize("path", ["model", "lean"])


def load(folder, precision: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny UNet, quantized on the CPU; for nf4 diffusers refuses that, so its modules are put in here."""
    config = quantization_config(precision, dtype, SD.UNQUANTIZED)
    options: dict[str, Any] = {"subfolder": "unet", "torch_dtype": dtype}
    if precision in ("int8", "fp8"):
        options |= {"quantization_config": config, "device_map": {"": torch.device("cpu")}}
    unet: Any = UNet2DConditionModel.from_pretrained(folder, **options).eval()
    if precision == "nf4":
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
        linears = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
        replace_with_bnb_linear(unet, modules_to_not_convert=list(SD.UNQUANTIZED), quantization_config=config)
        for name, module in unet.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                dense = linears[name]
                weight = bitsandbytes.nn.Params4bit(
                    dense.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=module
                )
                module.weight, module.bias = weight.to("cpu"), dense.bias
                module.support_avx512bf16_for_cpu = False  # or the first forward stores the weight in another layout
    return unet


def multiplier(module: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight (out, in) that a module's own code multiplies by."""
    bias, module.bias = module.bias, None
    product = type(module).forward(module, torch.eye(module.in_features, dtype=dtype))
    module.bias = bias
    return product.detach().mT.contiguous()


def quantized_modules(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if is_quantized(module)}


def dequantized_copy(folder, unet: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """A dense float32 UNet with the weights of a quantized one."""
    dense = load(folder, None)
    states = {name: tensor for name, tensor in unet.state_dict().items() if ".weight." not in name}
    quantized = quantized_modules(unet)
    assert len(quantized) == 70
    for name, module in dense.named_modules():
        if name in quantized:
            module.weight.data.copy_(multiplier(quantized[name], dtype))
        for key, parameter in module.named_parameters(recurse=False):
            if name not in quantized or key == "bias":
                parameter.data.copy_(states[f"{name}.{key}"])
    return dense


def forward(unet, inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    sample, timestep, text = inputs
    return unet(sample.to(dtype), timestep, text.to(dtype)).sample


def outputs_and_gradients(
    unet, inputs, config, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of the UNet with a randomized adapter, and the gradients of all the adapter's parameters."""
    adapter = attach(unet, config, torch.Generator().manual_seed(0))
    randomize(adapter)
    output = forward(unet, inputs, dtype)
    output.float().square().sum().backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(adapter.parameters())) and all(g.count_nonzero() for g in gradients.values())
    return output.detach().float(), gradients


def far(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two tensors relative to the second."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@every_precision
@every_path
@pytest.mark.parametrize("method", ["delora", "lora"])
def test_outputs_and_gradients_are_those_of_the_dequantized_model(tiny_sd, unet_inputs, precision, path, method):
    unet = load(tiny_sd, precision)
    expected = outputs_and_gradients(
        dequantized_copy(tiny_sd, unet), unet_inputs, Configuration(method=method, path="fast")
    )
    output, gradients = outputs_and_gradients(unet, unet_inputs, Configuration(method=method, **PATHS[path]))
    assert far(output, expected[0]) < 1e-5
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert far(gradients[name], gradient) < 1e-4, name


@every_precision
@every_path
def test_bf16_is_within_its_rounding_of_the_dequantized_model(tiny_sd, unet_inputs, precision, path):
    """The bounds are those of the fast path in tests/adapter/test_lean.py."""
    unet = load(tiny_sd, precision, torch.bfloat16)
    expected = outputs_and_gradients(
        dequantized_copy(tiny_sd, unet, torch.bfloat16), unet_inputs, Configuration(path="fast")
    )
    output, gradients = outputs_and_gradients(unet, unet_inputs, Configuration(**PATHS[path]), torch.bfloat16)
    assert far(output, expected[0]) < 0.06
    for name, gradient in expected[1].items():
        assert gradients[name].dtype == torch.float32 and far(gradients[name], gradient) < 0.06, name


@every_precision
def test_the_dtype_of_the_factors(tiny_sd, unet_inputs, precision):
    def factors(unet, **options):
        adapter = attach(unet, Configuration(targets=ATTENTION, **options))
        forward(unet, unet_inputs, torch.bfloat16)
        detach(unet)
        return {p.a.dtype for stack in adapter.stacks for p in stack.projections if p.a is not None}

    unet = load(tiny_sd, precision, torch.bfloat16)
    assert factors(unet) == factors(unet, split_dtype="model") == factors(unet, path="lean") == {torch.bfloat16}
    assert factors(unet, split_dtype="float32") == {torch.float32}
    assert factors(load(tiny_sd, None, torch.bfloat16), path="split") == {torch.float32}


@every_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight_norm", "dim"), [("column", 0), ("frobenius", (0, 1))])
def test_the_scale_is_the_norm_of_the_dequantized_weight(tiny_sd, precision, dtype, weight_norm, dim):
    unet = load(tiny_sd, precision, dtype)
    tensors = dict(attach(unet, Configuration(weight_norm=weight_norm)).named_tensors())
    for name, module in quantized_modules(unet).items():
        if f"{name}.delora_w_norm" in tensors:
            norm = torch.linalg.vector_norm(multiplier(module, dtype).float(), dim=dim)
            torch.testing.assert_close(tensors.pop(f"{name}.delora_w_norm"), norm, rtol=1e-6, atol=0)
    left = [name for name in tensors if name.endswith("w_norm")]
    assert left and all("time_emb_proj" in name for name in left)


@every_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["frozen", "zero"])
def test_the_start_is_exactly_the_quantized_model(tiny_sd, unet_inputs, precision, dtype, start):
    unet = load(tiny_sd, precision, dtype)
    with torch.no_grad():
        base = forward(unet, unet_inputs, dtype)
        adapter = attach(unet, Configuration(start=start))
        assert adapter.path == "split"
        assert torch.equal(forward(unet, unet_inputs, dtype), base)
        randomize(adapter)
        assert far(forward(unet, unet_inputs, dtype), base) > 1e-2


@every_precision
@both_paths
def test_strength_zero_is_exactly_the_quantized_model(tiny_sd, unet_inputs, precision, path):
    unet = load(tiny_sd, precision)
    with torch.no_grad():
        base = forward(unet, unet_inputs)
        adapter = attach(unet, Configuration(**PATHS[path]))
        randomize(adapter)
        adapted = forward(unet, unet_inputs)
        adapter.strength = 0
        assert torch.equal(forward(unet, unet_inputs), base)
        adapter.strength = 0.5
        half = forward(unet, unet_inputs)
        assert 0.2 < far(half, base) / far(adapted, base) < 0.8


def test_auto_is_split_only_if_an_adapted_module_is_quantized(tiny_sd):
    unet = load(tiny_sd, "int8")
    assert attach(unet, Configuration()).path == "split"
    detach(unet)
    assert attach(unet, Configuration(targets=("time_emb_proj",))).path == "fast"
    detach(unet)
    assert attach(unet, Configuration(path="lean")).path == "lean"


def configurations_without_factors():
    for name, method in METHODS.items():
        if not method.has_factors:
            targets = ("*",) if name == "full" else ATTENTION
            yield pytest.param(AdapterConfig(method=name, rank=4, targets=targets), "cannot adapt", id=name)


@pytest.mark.parametrize(
    ("config", "message"),
    [pytest.param(Configuration(path="fast"), "path is 'fast'", id="fast"), *configurations_without_factors()],
)
def test_what_a_quantized_model_does_not_allow_is_refused(tiny_sd, unet_inputs, config, message):
    unet = load(tiny_sd, "int8")
    base = forward(unet, unet_inputs)
    before = [parameter.requires_grad for parameter in unet.parameters()]
    with pytest.raises(InputError, match=message) as raised:
        attach(unet, config)
    assert_is_a_sentence(str(raised.value))
    assert [parameter.requires_grad for parameter in unet.parameters()] == before
    assert torch.equal(forward(unet, unet_inputs), base)
    attach(unet, Configuration())


def assert_is_a_sentence(message: str) -> None:
    assert re.fullmatch(r"[^\n]+[^.]\.", message) and "Traceback" not in message


@every_precision
@both_paths
def test_detaching_leaves_the_quantized_model_as_it_was(tiny_sd, unet_inputs, precision, path):
    unet = load(tiny_sd, precision)

    def state():
        modules = [(name, type(module), set(module.__dict__)) for name, module in unet.named_modules()]
        parameters = [(name, id(p), type(p), p.requires_grad) for name, p in unet.named_parameters()]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules()]
        return modules, parameters, hooks, {type(processor) for processor in unet.attn_processors.values()}

    with torch.no_grad():
        base, weights = forward(unet, unet_inputs), {n: multiplier(m) for n, m in quantized_modules(unet).items()}
        before = state()
        adapter = attach(unet, Configuration(**PATHS[path]))
        randomize(adapter)
        forward(unet, unet_inputs)
        assert state() != before
        detach(unet)
        assert state() == before
        assert all(torch.equal(multiplier(m), weights[n]) for n, m in quantized_modules(unet).items())
        assert torch.equal(forward(unet, unet_inputs), base)


@every_precision
@both_paths
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_merging_makes_the_adapted_modules_dense(tiny_sd, unet_inputs, precision, path, dtype, bound):
    unet = load(tiny_sd, precision, dtype)
    targets = (*ATTENTION, "ff.net.2", "time_emb_proj")
    adapter = attach(unet, Configuration(targets=targets, **PATHS[path]))
    randomize(adapter)
    adapter.strength = 0.5
    adapted_names, quantized_before = set(adapter.names), set(quantized_modules(unet))
    with torch.no_grad():
        adapted = forward(unet, unet_inputs, dtype)
        weights = {name: adapter.weight(name) for name in adapter.names}
        sums = {
            name: multiplier(unet.get_submodule(name), dtype).float() + adapter.delta_weight(name)
            for name in adapted_names & quantized_before
        }
        merge(unet)
        assert far(forward(unet, unet_inputs, dtype), adapted) < bound
    assert set(quantized_modules(unet)) == {name for name in quantized_before if name.endswith("ff.net.0.proj")}
    for name, weight in weights.items():
        module = unet.get_submodule(name)
        assert type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.dtype == dtype
        assert torch.equal(module.weight, weight)
    for name, exact in sums.items():
        assert not unet.get_submodule(name).weight.requires_grad
        assert far(weights[name], exact) < (1e-6 if dtype == torch.float32 else 2**-8)
    randomize(attach(unet, Configuration(**PATHS[path])))
    forward(unet, unet_inputs, dtype).float().square().sum().backward()


@every_precision
@both_paths
def test_adapter_files_fit_quantized_and_dense_models(tiny_sd, unet_inputs, tmp_path, precision, path):
    config = Configuration(**PATHS[path])
    unet = load(tiny_sd, precision)
    adapter = attach(unet, config)
    randomize(adapter)
    file = save_adapter(adapter, tmp_path / "quantized", base_model=str(tiny_sd))
    again, dense, equal = load(tiny_sd, precision), load(tiny_sd, None), dequantized_copy(tiny_sd, unet)
    with torch.no_grad():
        adapted = forward(unet, unet_inputs)
        for other in (again, dense, equal):
            loaded = load_adapter(other, file)
            for name in adapter.names:
                assert torch.equal(loaded.delta_weight(name), adapter.delta_weight(name))
        assert torch.equal(forward(again, unet_inputs), adapted)
        assert far(forward(equal, unet_inputs), adapted) < 1e-5
        from_dense = save_adapter(attachment(dense).adapter, tmp_path / "dense", base_model=str(tiny_sd))
        assert from_dense.read_bytes() == file.read_bytes()


@every_precision
@both_paths
def test_gradient_checkpointing_changes_nothing(tiny_sd, unet_inputs, precision, path):
    config = Configuration(**PATHS[path])
    kept, checkpointed = load(tiny_sd, precision), load(tiny_sd, precision)
    checkpointed.enable_gradient_checkpointing(run_checkpointed)
    for unet in (kept, checkpointed):
        unet.train()
    expected = outputs_and_gradients(kept, unet_inputs, config)
    output, gradients = outputs_and_gradients(checkpointed, unet_inputs, config)
    assert torch.equal(output, expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(gradients[name], gradient), name


INT8 = ("--base_precision", "int8")


@pytest.fixture(scope="module")
def int8_run(tiny_sd, photographs, tmp_path_factory):
    """The output folder of a run on the int8 model, and a function that returns its flags for another folder."""

    def flags(out, *more: object) -> list[str]:
        return training_flags(tiny_sd, photographs, out, "--max_train_steps", 4, "--checkpointing_steps", 2, *more)

    out = tmp_path_factory.mktemp("int8") / "out"
    run_in_child(train, flags(out, *INT8))
    return out, flags


def test_a_killed_run_resumes_to_the_same_bytes(int8_run, tmp_path):
    expected, flags = int8_run
    assert run_in_child(train_and_die, flags(tmp_path / "out", *INT8), "backward", 4) == -signal.SIGKILL
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()
    run_in_child(train, flags(tmp_path / "out", *INT8, "--resume_from_checkpoint", "latest"))
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (expected / WEIGHTS_NAME).read_bytes()


def test_another_precision_is_another_run(int8_run, tmp_path):
    out, flags = int8_run
    copy = shutil.copytree(out, tmp_path / "out")
    with pytest.raises(AssertionError, match="trained with --base_precision int8, but --base_precision is now fp8"):
        run_in_child(
            train,
            flags(copy, "--resume_from_checkpoint", "latest", "--base_precision", "fp8", "--max_train_steps", 5),
        )


@pytest.fixture(scope="module")
def dequantized_sd(tiny_sd, tmp_path_factory):
    """The tiny pipeline with the int8 model's weights, in float32."""
    folder = shutil.copytree(tiny_sd, tmp_path_factory.mktemp("dequantized") / "sd")
    dequantized_copy(tiny_sd, load(tiny_sd, "int8")).save_pretrained(folder / "unet")
    return folder


def test_training_reaches_what_it_reaches_on_the_dequantized_model(int8_run, dequantized_sd, photographs, tmp_path):
    """After 4 steps the factors differ by at most 1e-3 of their norm.

    The two models round differently, by 1e-6, and Adam divides gradients by their size: small ones round coarsely.
    """
    out, flags = int8_run
    dense = ("--pretrained_model_name_or_path", dequantized_sd, "--path", "split")
    run_in_child(train, flags(tmp_path / "out", *dense))
    trained, expected = (load_file(folder / WEIGHTS_NAME) for folder in (out, tmp_path / "out"))
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert far(trained[name], tensor) < (1e-6 if name.endswith("w_norm") else 1e-3), name
        if name.endswith("delora_A"):
            assert far(tensor, expected[f"{name}0"]) > 2e-2


def generate(adapters, out, *more: object) -> list[np.ndarray]:
    """Generate two images with each strength; returns their pixels."""
    flags = ["--adapter", *adapters, "--output_dir", out, "--prompt", "a sks toy", "--num_inference_steps", 3]
    main(["generate", *map(str, flags), "--num_images", "2", *map(str, more)])
    files = sorted(file for file in out.glob("*.png") if file.name != "contact_sheet.png")
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]


@pytest.fixture(scope="module")
def strong_adapter(tiny_sd, tmp_path_factory):
    """Folder with an adapter of the int8 model that changes images visibly."""
    adapter = attach(load(tiny_sd, "int8"), AdapterConfig(rank=4))
    randomize(adapter, 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapter, folder, base_model=str(tiny_sd))
    return folder


def test_images_of_the_quantized_model_are_those_of_the_dequantized_one(strong_adapter, dequantized_sd, tmp_path):
    strengths = ("--strength", 0, 1, 0.5)
    images = generate([strong_adapter], tmp_path / "int8", *INT8, *strengths)
    dense = ("--pretrained_model_name_or_path", dequantized_sd)
    expected = generate([strong_adapter], tmp_path / "dense", *dense, *strengths)
    assert len(images) == 6
    for image, other in zip(images, expected):
        assert abs(image - other).max() <= 1
    assert min(abs(images[i] - images[j]).max() for i in range(6) for j in range(i)) > 5


def test_generate_with_a_trained_adapter(int8_run, tmp_path):
    images = generate([int8_run[0]], tmp_path / "images", *INT8)
    assert len(images) == 2 and images[0].std() > 1


def assert_generate_ends_with(message: str, *arguments) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(*arguments)
    assert_is_a_sentence(str(stop.value.code))
    assert message in str(stop.value.code)


def test_several_adapters_cannot_be_mixed_in_a_quantized_model(strong_adapter, int8_run, tmp_path):
    two = [strong_adapter, int8_run[0]]
    assert_generate_ends_with("several adapters cannot be mixed on a model in int8", two, tmp_path / "images", *INT8)
    assert not list(tmp_path.rglob("*.png"))
    generate(two, tmp_path / "images", "--num_inference_steps", 1)


def train_with_packages(flags: list[str], missing: str | None) -> None:
    """Run the script as a user does, with all packages or all but one."""
    from delora_diffusers.dispatch import exit_on_bad_input

    with pytest.MonkeyPatch.context() as patch, exit_on_bad_input():
        pretend_packages(patch, missing)
        train(flags)


def pretend_packages(patch: pytest.MonkeyPatch, missing: str | None) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, *arguments: Any) -> Any:
        if name in ("bitsandbytes", "torchao"):
            return None if name == missing else original("torch")
        return original(name, *arguments)

    patch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("precision", "missing", "message"),
    [
        ("nf4", None, "--base_precision nf4 needs a GPU; use int8"),
        ("nf4", "bitsandbytes", "needs bitsandbytes, which is not installed"),
        ("int8", "torchao", "needs torchao, which is not installed"),
        ("fp8", "torchao", "needs torchao, which is not installed"),
    ],
)
def test_what_a_precision_needs_is_named(
    tiny_sd, photographs, strong_adapter, tmp_path, monkeypatch, precision, missing, message
):
    flags = ("--base_precision", precision)
    with pytest.raises(AssertionError) as raised:
        run_in_child(train_with_packages, training_flags(tiny_sd, photographs, tmp_path / "run", *flags), missing)
    assert re.fullmatch(f"SystemExit: error: [^\n]*{message}[^\n]*\\.", str(raised.value))
    pretend_packages(monkeypatch, missing)
    assert_generate_ends_with(message, [strong_adapter], tmp_path / "images", *flags)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "dora"), "quantizes the model, which DoRA cannot adapt; use --method delora or lora"),
        (("--method", "oft"), "quantizes the model, which OFT cannot adapt"),
        (("--path", "fast"), "--base_precision int8 needs --path split or lean"),
    ],
)
def test_flags_that_exclude_a_quantized_model_are_refused_before_anything_is_loaded(
    tiny_sd, photographs, tmp_path, more, message
):
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", *INT8, *more)
    with pytest.raises(InputError, match=message) as raised:
        check_arguments(parse_arguments(flags))
    assert_is_a_sentence(str(raised.value))
    check_arguments(parse_arguments([flag for flag in flags if flag not in INT8]))


def test_bf16_weights_and_fp16_training_exclude_each_other(tiny_sd, photographs, tmp_path):
    for precision in ("no", "bf16"):
        check_arguments(parse_arguments(bf16_flags(tiny_sd, photographs, tmp_path, precision)))
    with pytest.raises(InputError, match="--base_precision bf16 and --mixed_precision fp16 exclude each other"):
        check_arguments(parse_arguments(bf16_flags(tiny_sd, photographs, tmp_path, "fp16")))


def bf16_flags(tiny_sd, photographs, folder, precision: str) -> list[str]:
    return training_flags(
        tiny_sd, photographs, folder / "out", "--base_precision", "bf16", "--mixed_precision", precision
    )


def test_an_adapter_that_was_trained_on_the_fast_path_loads_onto_a_quantized_model(tiny_sd, tmp_path):
    adapter = attach(load(tiny_sd, None), AdapterConfig(rank=2, path="fast"))
    file = save_adapter(adapter, tmp_path, base_model=str(tiny_sd))
    assert load_adapter(load(tiny_sd, "int8"), file).path == "split"
    assert load_adapter(load(tiny_sd, None), file).path == "fast"


@pytest.mark.parametrize("flags", [INT8, ("--offload",)], ids=["int8", "offload"])
def test_several_subjects_are_refused_before_anything_is_loaded(tiny_sd, photographs, tmp_path, flags):
    words = together_flags(tiny_sd, tmp_path, [photographs, photographs], *flags)
    with pytest.raises(InputError, match=f"^{flags[0]}.* trains a single subject at a time"):
        check_arguments(parse_arguments(words))


def test_nf4_on_a_cpu_leaves_no_folder(tiny_sd, photographs, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", "--base_precision", "nf4")
    with pytest.raises(AssertionError, match="nf4 needs a GPU"):
        run_in_child(train, flags)
    assert not (tmp_path / "out").exists()
