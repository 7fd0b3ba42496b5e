"""Several subjects trained at once on one frozen model: each as if alone."""

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
def test_each_sample_runs_through_the_weights_of_its_subject(unet, unet_inputs, method):
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
        for ours, parameter in zip(gradients, alone.parameters()):
            own = ours.view(3, *parameter.shape)[subject]
            torch.testing.assert_close(own, parameter.grad, atol=2e-5 * parameter.grad.abs().max().item(), rtol=1e-3)
        torch.testing.assert_close(alone.delta_weight(name), deltas[subject])
        torch.testing.assert_close(alone.all_distances()[0], distances[subject])
        detach(unet)


def test_starts_are_those_of_each_alone(unet):
    adapter = attach(unet, AdapterConfig(rank=4), generators(5, 6))
    together = [dict(adapter.named_tensors(subject)) for subject in range(2)]
    detach(unet)
    for seed, tensors in zip((5, 6), together):
        alone = dict(attach(unet, AdapterConfig(rank=4), generators(seed)[0]).named_tensors())
        assert all(torch.equal(alone[key], tensors[key]) for key in alone)
        detach(unet)


def test_only_attention_takes_several(unet):
    with pytest.raises(InputError, match=r"ff\.net\.0\.proj is no projection of an attention"):
        attach(unet, AdapterConfig(rank=4, targets=MAP_TARGETS), generators(0, 1))
    with pytest.raises(InputError, match="path is 'split'"):
        attach(unet, AdapterConfig(rank=4, path="split"), generators(0, 1))


@pytest.fixture(scope="module")
def two_subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [write_photos(folder / "a", 3), write_photos(folder / "b", 5)]


def test_trained_at_once_is_trained_alone(tiny_sd, tmp_path, two_subjects):
    """With prior preservation and clipping, in one process, in two, and killed between checkpoints and resumed."""
    prior = ["--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 2]
    prior += ["--validation_inference_steps", 2, "--max_grad_norm", 0.01, "--learning_rate", 1e-3]
    run_in_child(train, together_flags(tiny_sd, tmp_path / "whole", two_subjects, *prior, "--max_train_steps", 4))
    halves = ["--gradient_accumulation_steps", 2, *prior]
    run_in_child(train, together_flags(tiny_sd, tmp_path / "parts", two_subjects, *halves, "--max_train_steps", 3))
    resumed = together_flags(tiny_sd, tmp_path / "parts", two_subjects, *halves, "--resume_from_checkpoint", "latest")
    run_in_child(train, resumed)
    run_in_two_processes(
        "train_dreambooth_delora.py", *together_flags(tiny_sd, tmp_path / "processes", two_subjects, *prior)
    )
    for seed, place in enumerate(two_subjects):
        more = (*prior, "--instance_prompt", f"a sks {place.name}", "--seed", seed, "--train_batch_size", 2)
        for kind, own in {
            "whole": ("--max_train_steps", 4),
            "parts": ("--gradient_accumulation_steps", 2),
        }.items():
            out = tmp_path / f"alone-{kind}-{place.name}"
            run_in_child(train, training_flags(tiny_sd, place, out, *more, *own))
            alone = load_file(out / WEIGHTS_NAME)
            for others in [kind] if kind == "whole" else [kind, "processes"]:
                found = load_file(tmp_path / others / place.name / WEIGHTS_NAME)
                assert found.keys() == alone.keys()
                for name in found:
                    torch.testing.assert_close(found[name], alone[name], atol=1e-5, rtol=1e-4)
        said = json.loads((tmp_path / "whole" / place.name / "config.json").read_text())
        assert said["arguments"]["seed"] == seed and said["arguments"]["instance_data_dir"] == str(place)
        assert said["reached"]["distance"] > 0


def test_one_that_diverges_leaves_the_others(tiny_sd, tmp_path, two_subjects):
    """A subject whose photographs' latents are not finite is named; the other is saved as if alone."""
    gently = ("--learning_rate", 1e-3)  # where Adam does not make a step of rounding errors
    flags = together_flags(tiny_sd, tmp_path, two_subjects, "--checkpointing_steps", 3, *gently)
    with pytest.raises(AssertionError, match=r"the loss was not finite for .*/a at step 2; .* the others are saved"):
        run_in_child(train_with_a_broken_subject, flags)
    assert not (tmp_path / "a" / WEIGHTS_NAME).exists()
    found = load_file(tmp_path / "b" / WEIGHTS_NAME)
    out = tmp_path / "alone"
    more = ("--train_batch_size", 2, "--instance_prompt", "a sks b", "--seed", 1, *gently)
    run_in_child(train, training_flags(tiny_sd, two_subjects[1], out, *more))
    for name, tensor in load_file(out / WEIGHTS_NAME).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def train_with_a_broken_subject(flags: list[str]) -> None:
    import delora_diffusers.training.objective as objective

    original, calls = objective.noised, []

    def broken(noise_scheduler, latents, *arguments):
        calls.append(1)
        return original(noise_scheduler, latents * float("nan") if len(calls) == 3 else latents, *arguments)

    objective.noised = broken
    train(flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: ["--subjects_file", str(f / "none.jsonl")], "none.jsonl is not a file"),
        (lambda f: ["--instance_prompt", "a sks dog"], "--instance_prompt is of one subject"),
        (lambda f: ["--train_text_encoder"], "--train_text_encoder is of one subject"),
        (lambda f: ["--output_dir", str(f / "a")], "is also a subject's"),
        (lambda f: ["--mixed_precision", "fp16"], "use --mixed_precision bf16"),
        (lambda f: ["--targets", "to_q", "ff.net.2"], "is no projection of an attention"),
    ],
)
def test_refuses(tiny_sd, tmp_path, two_subjects, change, message):
    flags = together_flags(tiny_sd, tmp_path, two_subjects)
    with pytest.raises(AssertionError, match=message):
        run_in_child(train, [*flags, *change(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["subjects.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is not a record like"),
        ('{"instance_data_dir": "x", "instance_prompt": "", "output_dir": "y"}', "line 1 is not a record like"),
        ('{"instance_data_dir": "PLACE", "instance_prompt": "p", "output_dir": "y", "lr": 1}', "is not a record like"),
        ("", "holds no subject"),
        ('{"instance_data_dir": "PLACE", "instance_prompt": "p", "output_dir": "y"}\n' * 2, "for two subjects"),
    ],
)
def test_refuses_lines(tiny_sd, tmp_path, two_subjects, line, message):
    flags = together_flags(tiny_sd, tmp_path, two_subjects)
    (tmp_path / "subjects.jsonl").write_text(line.replace("PLACE", str(two_subjects[0])))
    with pytest.raises(AssertionError, match=message):
        run_in_child(train, flags)
