"""Several subjects trained at once on one frozen model: each result is the same as when trained alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from delora_diffusers import AdapterConfig, InputError, attach, detach
from delora_diffusers.methods.config import MAP_TARGETS
from delora_diffusers.names import WEIGHTS_NAME
from tests.helpers import (
    randomize,
    run_in_child,
    run_in_two_processes,
    together_flags,
    train,
    training_flags,
    write_photos,
)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("method", ["delora", "lora", "dora", "etherplus", "oft", "delora_multiplicative"])
def test_each_sample_uses_the_weights_of_its_subject(unet, unet_inputs, method):
    config = AdapterConfig(method=method, rank=4, blocks=2)
    sample, timestep, text = (tensor.repeat(3, *[1] * (tensor.ndim - 1)) for tensor in unet_inputs)
    together = attach(unet, config, generators(5, 6, 7))
    randomize(together)
    saved = [{name: t.clone() for name, t in together.named_tensors(subject)} for subject in range(3)]
    name = together.names[3]
    deltas = [together.delta_weight(name, subject) for subject in range(3)]
    assert not torch.equal(deltas[0], deltas[1])
    output = unet(sample, timestep, text).sample
    output.square().sum().backward()
    gradients = [p.grad for p in together.parameters()]
    distances = together.all_distances()
    detach(unet)
    for subject in range(3):
        alone = attach(unet, config, generators(0)[0])
        with torch.no_grad():
            for key, tensor in alone.named_tensors():
                tensor.copy_(saved[subject][key])
        expected = unet(*unet_inputs).sample
        expected.square().sum().backward()
        torch.testing.assert_close(output[2 * subject : 2 * subject + 2], expected, atol=1e-5, rtol=1e-5)
        for stacked, parameter in zip(gradients, alone.parameters()):
            gradient = stacked.view(3, *parameter.shape)[subject]
            torch.testing.assert_close(
                gradient, parameter.grad, atol=2e-5 * parameter.grad.abs().max().item(), rtol=1e-3
            )
        torch.testing.assert_close(alone.delta_weight(name), deltas[subject])
        torch.testing.assert_close(alone.all_distances()[0], distances[subject])
        detach(unet)


def test_initialization_is_the_same_as_alone(unet):
    adapter = attach(unet, AdapterConfig(rank=4), generators(5, 6))
    together = [dict(adapter.named_tensors(subject)) for subject in range(2)]
    detach(unet)
    for seed, tensors in zip((5, 6), together):
        alone = dict(attach(unet, AdapterConfig(rank=4), generators(seed)[0]).named_tensors())
        assert all(torch.equal(alone[key], tensors[key]) for key in alone)
        detach(unet)


def test_several_subjects_need_attention_targets_and_the_fast_path(unet):
    with pytest.raises(InputError, match=r"ff\.net\.0\.proj is not an attention projection"):
        attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), generators(0, 1))
    with pytest.raises(InputError, match="the path is split"):
        attach(unet, AdapterConfig(rank=4, path="split"), generators(0, 1))


@pytest.fixture(scope="module")
def two_subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [write_photos(folder / "a", 3), write_photos(folder / "b", 5)]


@pytest.mark.integration
def test_training_together_equals_training_alone(tiny_sd, tmp_path, two_subjects):
    """With prior preservation and clipping; in one process, in two processes, and stopped and resumed."""
    prior = ["--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 2]
    prior += ["--validation_inference_steps", 2, "--max_grad_norm", 0.01]
    # Adam divides by the gradient's size: without an epsilon above the rounding errors, it amplifies them where a
    # gradient is nearly zero, by as much as the CPU at hand rounds differently for other batch sizes.
    prior += ["--learning_rate", 1e-3, "--adam_epsilon", 1e-6]
    run_in_child(train, together_flags(tiny_sd, tmp_path / "complete", two_subjects, *prior, "--max_train_steps", 4))
    halves = ["--gradient_accumulation_steps", 2, *prior]
    run_in_child(train, together_flags(tiny_sd, tmp_path / "resumed", two_subjects, *halves, "--max_train_steps", 3))
    resumed = together_flags(tiny_sd, tmp_path / "resumed", two_subjects, *halves, "--resume_from_checkpoint", "latest")
    run_in_child(train, resumed)
    run_in_two_processes(train, together_flags(tiny_sd, tmp_path / "processes", two_subjects, *prior))
    for seed, photos in enumerate(two_subjects):
        more = (*prior, "--instance_prompt", f"a sks {photos.name}", "--seed", seed, "--train_batch_size", 2)
        for kind, kind_flags in {
            "complete": ("--max_train_steps", 4),
            "resumed": ("--gradient_accumulation_steps", 2),
        }.items():
            out = tmp_path / f"alone-{kind}-{photos.name}"
            run_in_child(train, training_flags(tiny_sd, photos, out, *more, *kind_flags))
            alone = load_file(out / WEIGHTS_NAME)
            for run in [kind] if kind == "complete" else [kind, "processes"]:
                together = load_file(tmp_path / run / photos.name / WEIGHTS_NAME)
                assert together.keys() == alone.keys()
                for name in together:
                    torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-4)
        config = json.loads((tmp_path / "complete" / photos.name / "config.json").read_text())
        assert config["arguments"]["seed"] == seed and config["arguments"]["instance_data_dir"] == str(photos)
        assert config["reached"]["distance"] > 0


@pytest.mark.integration
def test_a_diverging_subject_does_not_affect_the_others(tiny_sd, tmp_path, two_subjects):
    """The error gives the subject whose latents are not finite; the other is saved as if trained alone."""
    low_rate = ("--learning_rate", 1e-3)  # at which Adam does not amplify rounding errors
    flags = together_flags(tiny_sd, tmp_path, two_subjects, "--checkpointing_steps", 3, *low_rate)
    with pytest.raises(
        AssertionError, match=r"the loss was not finite for .*/a at step 2; .*the other adapters are saved"
    ):
        run_in_child(train_with_a_broken_subject, flags)
    assert not (tmp_path / "a" / WEIGHTS_NAME).exists()
    together = load_file(tmp_path / "b" / WEIGHTS_NAME)
    out = tmp_path / "alone"
    more = ("--train_batch_size", 2, "--instance_prompt", "a sks b", "--seed", 1, *low_rate)
    run_in_child(train, training_flags(tiny_sd, two_subjects[1], out, *more))
    for name, tensor in load_file(out / WEIGHTS_NAME).items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=1e-4)


def train_with_a_broken_subject(flags: list[str]) -> None:
    from delora_diffusers.training.noising import Diffusion

    original, calls = Diffusion.__call__, []

    def broken(self: Diffusion, latents, *arguments):
        calls.append(1)
        return original(self, latents * float("nan") if len(calls) == 3 else latents, *arguments)

    Diffusion.__call__ = broken
    train(flags)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: ["--subjects_file", str(f / "none.jsonl")], "none.jsonl is not a file"),
        (lambda f: ["--instance_prompt", "a sks dog"], "--instance_prompt applies to a single subject"),
        (lambda f: ["--train_text_encoder"], "--train_text_encoder applies to a single subject"),
        (lambda f: ["--output_dir", str(f / "a")], "is also a subject's output_dir"),
        (lambda f: ["--mixed_precision", "fp16"], "use bf16 or no"),
        (lambda f: ["--targets", "to_q", "ff.net.2"], "is not an attention projection"),
    ],
)
def test_rejects_flags(tiny_sd, tmp_path, two_subjects, change, message):
    flags = together_flags(tiny_sd, tmp_path, two_subjects)
    with pytest.raises(AssertionError, match=message):
        run_in_child(train, [*flags, *change(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["subjects.jsonl"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is not a record like"),
        ('{"instance_data_dir": "x", "instance_prompt": "", "output_dir": "y"}', "line 1 needs an instance_prompt"),
        ('{"instance_data_dir": "PHOTOS", "instance_prompt": "p", "output_dir": "y", "lr": 1}', "is not a record like"),
        ("", "is empty; write one line per subject"),
        (
            '{"instance_data_dir": "PHOTOS", "instance_prompt": "p", "output_dir": "y"}\n' * 2,
            "gives two subjects the output_dir",
        ),
    ],
)
def test_rejects_lines(tiny_sd, tmp_path, two_subjects, line, message):
    flags = together_flags(tiny_sd, tmp_path, two_subjects)
    (tmp_path / "subjects.jsonl").write_text(line.replace("PHOTOS", str(two_subjects[0])))
    with pytest.raises(AssertionError, match=message):
        run_in_child(train, flags)
