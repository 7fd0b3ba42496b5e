"""Tests that need a CUDA device: precisions, compilation, recorded steps. Run with ``pytest -m gpu``."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train_controlnet_map2img as map_script
from delora_diffusers import AdapterConfig, attach, load_adapter, merge
from delora_diffusers.__main__ import main
from delora_diffusers.adapter.base_weights import dense_weight
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.families.loading import open_model
from delora_diffusers.families.quantization import quantization_config
from delora_diffusers.families.sd import FAMILY as SD
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.pipelines.offload import offload_blocks
from delora_diffusers.training.setup import run_checkpointed
from tests.helpers import (
    fixed_loss,
    map_flags,
    outputs_and_gradients,
    randomize,
    run_in_child,
    train,
    training_flags,
    write_map_folders,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(inputs):
    return tuple(tensor.cuda() for tensor in inputs)


@pytest.mark.parametrize("path", ["fast", "lean", "split"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.06), (torch.float16, 0.02)])
def test_precisions_against_float32_on_the_cpu(unet, unet_inputs, path, dtype, bound):
    exact = outputs_and_gradients(unet, unet_inputs, AdapterConfig(rank=4))
    actual = outputs_and_gradients(unet.cuda(), on_gpu(unet_inputs), AdapterConfig(rank=4, path=path), dtype)
    assert (actual[0].cpu() - exact[0]).norm() / exact[0].norm() < bound
    for name, gradient in exact[1].items():
        assert (actual[1][name].cpu() - gradient).norm() / gradient.norm() < bound, name


def test_start_and_strength_zero_are_the_base_model(unet, unet_inputs):
    unet, inputs = unet.cuda().to(torch.bfloat16), on_gpu(unet_inputs)
    inputs = (inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
    with torch.no_grad():
        base = unet(*inputs).sample
        adapter = attach(unet, AdapterConfig(rank=4))
        for name in adapter.names:
            assert torch.equal(adapter.weight(name), unet.get_submodule(name).weight)
        assert (unet(*inputs).sample - base).norm() / base.norm() < 0.02  # the fused product sums in a different order
        randomize(adapter)
        adapter.strength = 0
        assert torch.equal(unet(*inputs).sample, base)


def test_adapter_follows_the_model_to_the_gpu(unet, unet_inputs):
    adapter = attach(unet, AdapterConfig(rank=4))
    randomize(adapter)
    with torch.no_grad():
        expected = unet(*unet_inputs).sample
        output = unet.cuda()(*on_gpu(unet_inputs)).sample
        torch.testing.assert_close(output.cpu(), expected, atol=1e-3, rtol=1e-3)
        merge(unet)
        torch.testing.assert_close(unet(*on_gpu(unet_inputs)).sample, output, atol=1e-4, rtol=1e-3)


def test_compiled_training_equals_eager(unet, unet_inputs):
    inputs = on_gpu(unet_inputs)
    results = []
    for compiled in (False, True):
        model = copy.deepcopy(unet).cuda()
        adapter = attach(model, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, fused=True)
        run = torch.compile(model) if compiled else model
        for _ in range(4):
            run(*inputs).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(run(*inputs).sample.detach())
    torch.testing.assert_close(results[0], results[1], atol=2e-3, rtol=1e-2)


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_in_each_precision(tiny_sd, photographs, tmp_path, precision):
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", "--resolution", 64, "--max_train_steps", 200)
    flags += ["--mixed_precision", precision, "--validation_prompt", "a sks toy", "--validation_inference_steps", "2"]
    run_in_child(train, [*flags, "--train_batch_size", "2", "--gradient_checkpointing"])
    before, after = fixed_loss(tiny_sd, photographs, tmp_path / "out")
    assert after < 0.9 * before


@pytest.mark.integration
@pytest.mark.parametrize("case", ["one micro-batch", "lean", "accumulated", "text encoder", "maps"])
def test_recorded_step_trains_like_an_eager_step(tiny_sd, photographs, tmp_path, case):
    """The weights agree after a few steps, well past the micro-batches before the recording, up to Adam's noise.

    A micro-batch that is lost, counted twice or replayed with the tensors of another would change the distance from the
    start by tenths of its length.
    """
    common = ["--seed", "1", "--path", "lean" if case == "lean" else "fast"]
    if case not in ("one micro-batch", "lean"):
        common += ["--gradient_accumulation_steps", "2"]
    pairs = write_map_folders(tmp_path / "data", ["a", "b", "c", "d", "e"])
    trained = []
    for name in ("cuda_graph", "no-cuda_graph"):
        out = tmp_path / name
        if case == "maps":
            run_in_child(map_script.main, map_flags(tiny_sd, pairs, out, *common, f"--{name}"))
        else:
            more = ["--train_text_encoder"] if case == "text encoder" else []
            run_in_child(train, training_flags(tiny_sd, photographs, out, *common, *more, f"--{name}"))
        trained.append(load_file(out / WEIGHTS_NAME))
    recorded, eager = trained
    starts = {key: eager[f"{key}0"] for key in eager if key.endswith(("delora_A", "delora_B"))}
    distance = torch.stack([(eager[key] - start).norm() for key, start in starts.items()]).norm()
    difference = torch.stack([(eager[key] - recorded[key]).norm() for key in starts]).norm()
    assert distance > 0 and difference < 0.02 * distance, f"they differ by {difference / distance:.4f} of the distance"


@pytest.mark.integration
def test_resumes_on_the_gpu(tiny_sd, photographs, tmp_path, unet):
    def flags(out, *more):
        return training_flags(tiny_sd, photographs, out, "--checkpointing_steps", 3, "--mixed_precision", "fp16", *more)

    run_in_child(train, flags(tmp_path / "complete"))
    run_in_child(train, flags(tmp_path / "resumed", "--max_train_steps", 3))
    run_in_child(train, flags(tmp_path / "resumed", "--resume_from_checkpoint", "latest"))
    complete = dict(load_adapter(unet, tmp_path / "complete").named_tensors())
    from delora_diffusers import detach

    detach(unet)
    resumed = dict(load_adapter(unet, tmp_path / "resumed").named_tensors())
    for name, tensor in complete.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.integration
@pytest.mark.parametrize("base_precision", ["nf4", "int8", "fp8"])
def test_training_and_generating_on_a_quantized_model(tiny_sd, photographs, tmp_path, base_precision):
    pytest.importorskip({"nf4": "bitsandbytes"}.get(base_precision, "torchao"))
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", "--resolution", 64, "--max_train_steps", 200)
    run_in_child(train, [*flags, "--mixed_precision", "bf16", "--base_precision", base_precision])
    before, after = fixed_loss(tiny_sd, photographs, tmp_path / "out")  # on the model that is not quantized
    assert after < 0.9 * before
    words = ["generate", "--adapter", str(tmp_path / "out"), "--prompt", "a sks toy", "--num_images", "2"]
    words += ["--num_inference_steps", "2", "--resolution", "64", "--base_precision", base_precision]
    run_in_child(main, [*words, "--mixed_precision", "bf16", "--output_dir", str(tmp_path / "images")])
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2


@pytest.mark.parametrize("base_precision", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("path", ["lean", "split"])
def test_a_quantized_model_trains_like_the_dequantized_one(tiny_sd, unet_inputs, base_precision, path):
    pytest.importorskip({"nf4": "bitsandbytes"}.get(base_precision, "torchao"))
    inputs = on_gpu(unet_inputs)
    config = AdapterConfig(rank=4, path=path, targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"))
    results = []
    for dequantized in (False, True):
        quantization = quantization_config(base_precision, torch.float32, SD.UNQUANTIZED)
        model = open_model(str(tiny_sd)).load("unet", torch.float32, "cuda", quantization)
        if dequantized:
            for name, module in list(model.named_modules()):
                if is_quantized(module):
                    parent, _, child = name.rpartition(".")
                    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="cuda")
                    dense.weight.data = dense_weight(module)
                    if module.bias is not None:
                        dense.bias.data = module.bias.data
                    setattr(model.get_submodule(parent), child, dense)
        adapter = attach(model, config, torch.Generator().manual_seed(0))
        randomize(adapter)
        sample = model(*inputs).sample
        sample.square().sum().backward()
        results.append((sample.detach(), {name: p.grad for name, p in adapter.named_parameters()}))
    (sample, gradients), (expected, expected_gradients) = results
    assert (sample - expected).norm() / expected.norm() < 1e-3
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() / gradient.norm() < 1e-3, name


@pytest.mark.integration
@pytest.mark.parametrize("flag", ["--offload", "--use_8bit_adam"])
def test_training_with_less_memory(tiny_sd, photographs, tmp_path, flag):
    if flag == "--use_8bit_adam":
        pytest.importorskip("bitsandbytes")
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", "--resolution", 64, "--max_train_steps", 200)
    run_in_child(train, [*flags, "--mixed_precision", "bf16", flag])
    before, after = fixed_loss(tiny_sd, photographs, tmp_path / "out")
    assert after < 0.9 * before


def test_offloaded_blocks_give_the_same_gradients(unet, unet_inputs):
    unet.enable_gradient_checkpointing(run_checkpointed)
    unet.train()
    inputs, device = on_gpu(unet_inputs), torch.device("cuda")
    results = []
    for offload in (False, True):
        model = copy.deepcopy(unet)
        model = model if offload else model.cuda()
        config = AdapterConfig(rank=4, path="lean")
        adapter = attach(model, config, torch.Generator().manual_seed(0), device if offload else None)
        randomize(adapter)
        if offload:
            offload_blocks(model, device)
        for _ in range(2):
            sample = model(*inputs).sample
            sample.square().sum().backward()
        results.append((sample.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)


def test_out_of_memory_is_one_sentence():
    with pytest.raises(SystemExit) as raised, exit_on_bad_input():
        torch.empty(2**50, device="cuda")
    assert "the GPU's memory ran out" in str(raised.value) and "--mixed_precision" in str(raised.value)
