"""What a run will need of the GPU's memory: the estimate's parts, the refusal, and the table of ``info --memory``."""

import argparse
import dataclasses

import pytest
import torch

from data.tiny_sd import write
from delora_diffusers import AdapterConfig, InputError, attach
from delora_diffusers.__main__ import main
from delora_diffusers.families.loading import open_model
from delora_diffusers.families.quantization import BYTES
from delora_diffusers.families.sd import FAMILY as SD
from delora_diffusers.training import memory_report
from delora_diffusers.training.memory_report import GIB, Plan, plan_of, report_memory, step_memory
from tests.helpers import training_flags
from train_dreambooth_delora import parse_arguments

pytestmark = pytest.mark.integration  # seconds a test

PLAN = Plan(2, 64, torch.bfloat16, AdapterConfig(rank=2))
ON_A_GPU = argparse.Namespace(device=torch.device("cuda"), is_local_main_process=True)


@pytest.fixture(scope="module", params=["sdxl"])
def model(request, tmp_path_factory):
    return open_model(str(write(tmp_path_factory.mktemp("models") / request.param, kind=request.param)))


def test_the_parts_against_the_model_itself(model):
    memory = step_memory(model, PLAN)
    unet = model.load("unet", torch.bfloat16)
    assert memory.weights == sum(p.numel() * 2 for p in unet.parameters())
    adapter = attach(unet, PLAN.adapter)
    trainable = sum(p.numel() for p in adapter.parameters())
    fixed = sum(tensor.numel() for tensor in adapter.buffers())
    assert memory.adapter == 4 * (trainable + fixed) + 4 * trainable + 2 * 4 * trainable
    assert memory.activations > 0


def test_what_each_flag_saves(model):
    plain = step_memory(model, PLAN)
    half = step_memory(model, dataclasses.replace(PLAN, batch_size=1))
    assert half.activations < 0.7 * plain.activations and half.weights == plain.weights
    assert step_memory(model, dataclasses.replace(PLAN, checkpointing=True)).activations < plain.activations
    assert step_memory(model, dataclasses.replace(PLAN, dtype=torch.float32)).weights == 2 * plain.weights
    linears = [(n, m) for n, m in model.skeletons["unet"].named_modules() if isinstance(m, torch.nn.Linear)]
    count = sum(m.weight.numel() for n, m in linears if not set(n.split(".")) & set(SD.UNQUANTIZED))
    for precision, size in BYTES.items():
        quantized = step_memory(model, dataclasses.replace(PLAN, base_precision=precision))
        assert plain.weights - quantized.weights == pytest.approx(count * (2 - size), abs=1)
    offloaded = step_memory(model, dataclasses.replace(PLAN, offload=True, checkpointing=True))
    assert offloaded.weights < plain.weights
    trained = step_memory(model, dataclasses.replace(PLAN, text_encoder=True))
    assert trained.weights > plain.weights and trained.adapter > plain.adapter
    for before in (plain, trained):
        longer = step_memory(model, dataclasses.replace(PLAN, text_encoder=before is trained, prompt_chunks=3))
        assert longer.activations > before.activations and longer.weights == before.weights


def test_the_plan_of_the_flags(tiny_sd, photographs, tmp_path):
    more = ("--with_prior_preservation", "--class_prompt", "x", "--train_batch_size", 3, "--offload", "--use_8bit_adam")
    args = parse_arguments(training_flags(tiny_sd, photographs, tmp_path, *more, "--train_text_encoder"))
    plan = plan_of(args, AdapterConfig(rank=4), "fp16", subjects=1)
    assert (plan.batch_size, plan.dtype, plan.checkpointing, plan.offload) == (6, torch.float16, True, True)
    assert (
        plan.optimizer == "adamw8bit" and not plan.use_ema and plan.text_encoder and plan.resolution == args.resolution
    )


def test_a_run_that_does_not_fit_is_refused_with_what_helps(model, monkeypatch, capsys):
    monkeypatch.setattr(memory_report, "TOO_SMALL_TO_MATTER", 0)
    monkeypatch.setattr(memory_report, "free_bytes", lambda: 8 * GIB)
    report_memory(ON_A_GPU, model, PLAN)
    assert "a training step needs about 0.0 GiB (weights 0.0" in capsys.readouterr().out
    monkeypatch.setattr(memory_report, "free_bytes", lambda: 0)
    with pytest.raises(InputError, match=r"needs about .* but 0\.0 GiB are free; use ") as raised:
        report_memory(ON_A_GPU, model, PLAN)
    message = str(raised.value)
    assert "--gradient_checkpointing (saves" in message and "--train_batch_size 1 (saves" in message
    assert "--base_precision int8" in message or "--base_precision nf4" in message
    used = dataclasses.replace(PLAN, batch_size=1, checkpointing=True, base_precision="int8")
    with pytest.raises(InputError) as raised:
        report_memory(ON_A_GPU, model, used)
    assert not any(flag in str(raised.value) for flag in ("checkpointing", "batch_size", "base_precision", "offload"))


def test_nothing_is_estimated_without_a_gpu_or_for_small_models(model, monkeypatch):
    monkeypatch.setattr(memory_report, "step_memory", lambda *_: pytest.fail("estimated"))
    report_memory(ON_A_GPU, model, PLAN)
    monkeypatch.setattr(memory_report, "TOO_SMALL_TO_MATTER", 0)
    report_memory(argparse.Namespace(device=torch.device("cpu")), model, PLAN)


def test_info_prints_the_table_of_a_model(tiny_sd, capsys):
    main(["info", "--memory", str(tiny_sd), "--resolution", "64"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| 64 pixels, rank 16") and len(lines) == 8
    for words, message in (
        (["info"], "give either an adapter to describe, or a base model with --memory"),
        (["info", "x", "--memory", "y"], "give either an adapter"),
        (["info", "--memory", str(tiny_sd), "--resolution", "63"], "--resolution 63 is not a multiple of 8"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(words)
