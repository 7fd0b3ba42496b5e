"""Output preservation: the target of its rows is the base model's prediction, their loss the distance from it."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth_delora as script
from data.tiny_sd import write
from delora_diffusers import AdapterConfig, attach
from delora_diffusers.families.latents import LatentScale
from delora_diffusers.families.table import family_of
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.training import objective
from delora_diffusers.training.batches import Bucket, Sample, SubjectBatches, SubjectData
from delora_diffusers.training.encoding import LatentCache, PromptTable
from delora_diffusers.training.objective import PRESERVED, Losses
from delora_diffusers.training.setup import checkpoint_denoiser
from tests.helpers import randomize, together_flags, training_flags, write_photos

CPU = torch.device("cpu")
FAMILY = family_of("StableDiffusionPipeline")
PROMPTS = ("dog", "cat", "animal", "pet", "")


def noising(latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise and weights that differ between samples."""
    noise = torch.randn(latents.shape, generator=generator)
    weights = torch.linspace(0.5, 1.5, len(latents))
    timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
    return {"noisy": latents + noise, "timesteps": timesteps, "target": noise, "weights": weights}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches_of(
    prior: bool = False, masks: bool = False, subjects: int = 1, weight: float | None = 0.7, batch_size: int = 2
) -> SubjectBatches:
    """Two photos of two concepts, of the tiny UNet's latents and conditions."""

    def cache(seed: int) -> LatentCache:
        latents = random(2, 4, 8, 8, seed=seed)
        pixels = random(2, 1, 8, 8, seed=seed).abs() if masks else None
        return LatentCache(latents, torch.zeros_like(latents), [0, 1, 2], LatentScale(), weights=pixels)

    texts = [(("dog",), "animal", 1.0), (("cat",), "pet", 0.5)]
    samples = [Sample(n, prompts, of_class, w, (n, 1)) for n, (prompts, of_class, w) in enumerate(texts)]
    bucket = [Bucket(samples, cache(s), cache(10 + s) if prior else None) for s in range(subjects)]
    data = [SubjectData(seed, [bucket[seed]]) for seed in range(subjects)]
    table = PromptTable(PROMPTS, {"encoder_hidden_states": random(len(PROMPTS), 7, 32, seed=5)})
    return SubjectBatches(noising, data, table, batch_size, 0.3, CPU, weight)


def adapted(unet: Any, path: str = "fast", subjects: int = 1, scale: float = 0.1) -> Any:
    model = copy.deepcopy(unet)
    generators = [torch.Generator().manual_seed(seed) for seed in range(subjects)]
    adapter = attach(model, AdapterConfig(rank=4, path=path), generators)
    if scale:
        randomize(adapter, scale)
    return adapter, model


def targets(losses: Losses, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The target that the loss is computed with."""
    recorded: list[Tensor] = []
    with monkeypatch.context() as patch:
        original = objective.denoising_losses

        def recording(*arguments: Any, **inputs: Any) -> Tensor:
            recorded.append(inputs["target"].clone())
            return original(*arguments, **inputs)

        patch.setattr(objective, "denoising_losses", recording)
        losses(**batch)
    return recorded[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("path", ["fast", "lean", "split"])
def test_the_target_is_the_untouched_models_prediction(unet, path, checkpointing, monkeypatch):
    _, model = adapted(unet, path)
    if checkpointing:
        checkpoint_denoiser(model)
    for masks, prior in ((False, False), (True, True)):
        batches = batches_of(prior, masks)
        batch, plain = batches(3), batches_of(prior, masks, weight=None)(3)
        count = 4 if prior else 2
        assert batch[PRESERVED].tolist() == [count, count + 1]
        for name in ("noisy", "timesteps"):
            assert torch.equal(batch[name], torch.cat([plain[name], plain[name][:2]]))
        target = targets(Losses(FAMILY, model), batch, monkeypatch)
        assert torch.equal(target[:count], plain["target"])
        rows = [PROMPTS.index("animal" if torch.equal(c, embedding("dog")) else "pet") for c in plain_conditions(plain)]
        with torch.no_grad():
            expected = unet(batch["noisy"][count:], batch["timesteps"][count:], table()[rows]).sample
        assert torch.equal(target[count:], expected)
        if masks:
            assert torch.equal(batch["pixel_weights"][:count], plain["pixel_weights"])
            assert torch.equal(batch["pixel_weights"][count:], torch.ones(2, 1, 8, 8))


def table() -> Tensor:
    return batches_of().table.tensors["encoder_hidden_states"]


def embedding(prompt: str) -> Tensor:
    return table()[PROMPTS.index(prompt)]


def plain_conditions(batch: dict[str, Tensor]) -> Sequence[Tensor]:
    """Those of the photos."""
    return batch["encoder_hidden_states"][:2]


def hand_written(batch: dict[str, Tensor], plain: dict[str, Tensor], model: Any, base: Any, prior: bool) -> Tensor:
    """The sum of three mean losses, from the batch without output preservation."""
    photos, rest = slice(0, 2), slice(2, None)
    dtype = model.dtype

    def prediction(unet: Any, rows: slice, text: Tensor) -> Tensor:
        return unet(plain["noisy"][rows].to(dtype), plain["timesteps"][rows], text.to(dtype)).sample

    def mean_loss(error: Tensor, rows: slice, weights: Tensor, pixels: bool = True) -> Tensor:
        squared = error.square() * (plain["pixel_weights"][rows].to(dtype) if pixels else 1)
        return (squared.mean((1, 2, 3)) * weights.to(dtype)).mean()

    texts = plain["encoder_hidden_states"]
    classes = torch.stack([embedding("animal" if torch.equal(t, embedding("dog")) else "pet") for t in texts[photos]])
    of_concept = torch.tensor([1.0 if torch.equal(t, embedding("dog")) else 0.5 for t in texts[photos]])
    noise_weights = torch.linspace(0.5, 1.5, len(plain["noisy"]))
    error = prediction(model, photos, texts[photos]) - plain["target"][photos].to(dtype)
    loss = mean_loss(error, photos, noise_weights[photos] * of_concept)
    if prior:
        error = prediction(model, rest, texts[rest]) - plain["target"][rest].to(dtype)
        loss = loss + 0.3 * mean_loss(error, rest, noise_weights[rest])
    with torch.no_grad():
        kept = prediction(base, photos, classes)
    error = prediction(model, photos, classes) - kept
    return loss + 0.7 * mean_loss(error, photos, noise_weights[photos], pixels=False)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(unet, prior, checkpointing):
    """With prior preservation as well, each part contributes its mean: masks weight only the photos, and the concept's
    weight only their own loss."""
    adapter, model = adapted(unet)
    reference, written = adapted(unet)
    if checkpointing:
        checkpoint_denoiser(model)
    batches = batches_of(prior, masks=True)
    plain = batches_of(prior, masks=True, weight=None)(1)
    loss = Losses(FAMILY, model)(**batches(1)).sum()
    expected = hand_written(batches(1), plain, written, unet, prior)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, list(adapter.parameters()))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, list(reference.parameters()))):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("path", ["fast", "lean", "split"])
def test_without_an_update_nothing_is_lost(unet, path):
    """The rows' own loss and its gradients are exactly zero; beside other rows they are rounded otherwise."""
    adapter, model = adapted(unet, path, scale=0)
    batch, plain = batches_of(weight=100.0)(0), batches_of(weight=None)(0)
    rows = {name: tensor[2:] for name, tensor in batch.items() if name != PRESERVED}
    kept = Losses(FAMILY, model)(**rows, **{PRESERVED: torch.tensor([0, 1])})
    assert kept.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(kept.sum(), list(adapter.parameters())))
    loss, alone = Losses(FAMILY, model)(**batch), Losses(FAMILY, model)(**plain)
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)


def test_the_adapted_weights_are_computed_once(unet, monkeypatch):
    """The forward of the base model does not make them anew."""
    adapter, model = adapted(unet)
    calls: list[Any] = []
    compute = adapter._refresh
    monkeypatch.setattr(adapter, "_refresh", lambda bases, stack: calls.append(stack) or compute(bases, stack))
    adapter.refresh()
    Losses(FAMILY, model)(**batches_of()(0)).sum().backward()
    assert len(calls) == len(list(adapter.stacks))


def test_several_subjects_keep_their_rows(unet, monkeypatch):
    """The losses of subjects that are trained together are those that each has alone, with its own adapter."""
    adapter, model = adapted(unet, subjects=2)
    batch = batches_of(subjects=2)(5)
    assert batch[PRESERVED].tolist() == [2, 3, 6, 7]
    target = targets(Losses(FAMILY, model, 2), dict(batch), monkeypatch)
    with torch.no_grad():
        rows = batch[PRESERVED]
        expected = unet(batch["noisy"][rows], batch["timesteps"][rows], batch["encoder_hidden_states"][rows]).sample
    torch.testing.assert_close(target[rows], expected, rtol=1e-5, atol=1e-6)
    losses = Losses(FAMILY, model, 2)(**batch)
    saved = [dict(adapter.named_tensors(subject)) for subject in range(2)]
    for subject in range(2):
        alone, single = adapted(unet)
        with torch.no_grad():
            for key, tensor in alone.named_tensors():
                tensor.copy_(saved[subject][key])
        half = {name: tensor.chunk(2)[subject] for name, tensor in batch.items()}
        half[PRESERVED] = torch.tensor([2, 3])
        torch.testing.assert_close(Losses(FAMILY, single)(**half)[0], losses[subject], rtol=1e-5, atol=1e-7)


def recorded_run(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Losses, dict[str, Tensor], Tensor]]:
    """The losses, inputs and targets of the micro-batches of a run."""
    records: list[Any] = []
    call, loss = Losses.__call__, objective.denoising_losses

    def recording_call(self: Losses, **batch: Tensor) -> Tensor:
        records.append([self, dict(batch)])
        return call(self, **batch)

    def recording_loss(*arguments: Any, **inputs: Any) -> Tensor:
        records[-1].append({name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)})
        return loss(*arguments, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Losses, "__call__", recording_call)
        patch.setattr(objective, "denoising_losses", recording_loss)
        script.main(flags)
    return records


PRESERVE = ("--with_output_preservation", "--class_prompt", "a photo of a toy", "--max_train_steps", 3)
LARGE = ("--learning_rate", 0.1, "--train_batch_size", 2)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux"])
def test_runs_of_other_families_and_trained_text_encoders(kind, photographs, tmp_path, monkeypatch):
    """After large steps, the target is still the prediction of a model that is loaded anew."""
    from data.tiny_pipelines import write as write_transformer
    from delora_diffusers.families.loading import open_model
    from delora_diffusers.pipelines.conditions import encode_prompts

    folder = write_transformer(tmp_path / kind, kind) if kind == "flux" else write(tmp_path / kind, kind=kind)
    encoder = ["--train_text_encoder", "--max_grad_norm", 0.0] if kind != "flux" else []
    flags = training_flags(folder, photographs, tmp_path / "out", *PRESERVE, *LARGE, *encoder, "--square")
    _, _, (losses, batch, inputs) = recorded_run(flags, monkeypatch)
    model = open_model(str(folder))
    for component in model.skeletons:
        model.load(component, torch.float32)
    prompts = encode_prompts(model.pipeline, ["a photo of a toy"] * 2, CPU)
    rows = batch[PRESERVED]
    assert rows.tolist() == [2, 3]
    denoiser = getattr(model.pipeline, model.family.DENOISER)
    sizes = {name: inputs[name][2:] for name in ("time_ids",) if name in inputs}
    with torch.no_grad():
        arguments = (denoiser, inputs["noisy"][2:], inputs["timesteps"][2:])
        expected = objective.predict(model.family, *arguments, prompts | sizes)
    torch.testing.assert_close(inputs["target"][2:], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(inputs["noisy"][:2], inputs["noisy"][2:])
    if encoder:  # the rows themselves have the conditions of the encoder as it is trained
        trained = inputs["encoder_hidden_states"][2:]
        assert (trained - prompts["encoder_hidden_states"]).abs().max() > 1e-3
    with torch.no_grad():
        adapted_prediction = objective.predict(
            model.family, losses.denoiser, *arguments[1:], {k: v[2:] for k, v in inputs.items() if k in prompts} | sizes
        )
    assert (adapted_prediction - expected).abs().max() > 1e-2


@pytest.mark.integration
def test_subjects_of_a_file_keep_the_output_of_their_class(tiny_sd, tmp_path):
    """Each gets the adapter that it gets alone, and class prompts of its own."""
    photos = [write_photos(tmp_path / name, count) for name, count in (("a", 3), ("b", 2))]
    more = ("--with_output_preservation", "--max_train_steps", 3, "--learning_rate", 0.01)
    flags = together_flags(tiny_sd, tmp_path / "together", photos, *more)
    file = Path(flags[flags.index("--subjects_file") + 1])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line | {"class_prompt": f"an {number}"} for number, line in enumerate(lines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script.main(flags)
    for number, (folder, line) in enumerate(zip(photos, lines)):
        settings = ("--class_prompt", line["class_prompt"], "--instance_prompt", line["instance_prompt"])
        alone = (*more, *settings, "--train_batch_size", 2, "--square", "--path", "fast", "--seed", number)
        script.main(training_flags(tiny_sd, folder, tmp_path / f"alone {number}", *alone))
        expected = load_file(tmp_path / f"alone {number}" / WEIGHTS_NAME)
        together = load_file(Path(line["output_dir"]) / WEIGHTS_NAME)
        assert expected.keys() == together.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(together[name], tensor, atol=1e-4, rtol=1e-3)
