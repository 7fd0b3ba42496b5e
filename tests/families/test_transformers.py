"""The transformer families against diffusers and against formulas: latents, noise, prompts, the loss and its start."""

import copy
import dataclasses
import math
from argparse import Namespace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delora_diffusers import AdapterConfig, InputError, attach, detach
from delora_diffusers.adapter.attach import find_targets
from delora_diffusers.families.family import Family
from delora_diffusers.families.latents import LatentScale, configured_scale, from_tokens, grid_positions, to_tokens
from delora_diffusers.families.loading import OpenModel
from delora_diffusers.pipelines.autoencoder import decode, encode
from delora_diffusers.pipelines.conditions import conditions, encode_prompts, joined, read_prompts, warn_of_truncation
from delora_diffusers.pipelines.sampling import default_resolution, latent_size
from delora_diffusers.training.encoding import PromptTable
from delora_diffusers.training.noising import Density, Flow, noising_of
from delora_diffusers.training.objective import denoising_losses
from delora_diffusers.training.setup import checkpoint_denoiser
from tests.families.reference_losses import reference_latents, reference_loss
from tests.families.tiny import KINDS, TinyModels
from tests.helpers import randomize

CPU = torch.device("cpu")
PROMPTS = ["a photo of sks dog", "a cat in the snow at night"]
RAGGED = ("zimage", "qwenimage")
"""The models that compute each prompt at its own length."""
UNUSED = {
    "sd3": {"transformer_blocks.2.attn.add_q_proj"},
    "qwenimage": {"transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"},
}
"""Modules of the last block that compute what no later block reads."""
NUMBER_OF_MODULES = {"sd3": 27, "flux": 22, "flux2": 20, "zimage": 24, "qwenimage": 16}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@dataclasses.dataclass(frozen=True)
class Example:
    """Two images with prompts of different lengths, encoded by the library."""

    kind: str
    model: OpenModel
    stock: Any
    pixels: Tensor
    latents: Tensor
    std: Tensor
    conditions: dict[str, Tensor]

    @property
    def family(self) -> Family:
        return self.model.family

    @property
    def transformer(self) -> Any:
        return self.model.pipeline.transformer

    def batch(self) -> dict[str, Any]:
        """The arguments of ``denoising_losses``."""
        noising = Flow(Density("cosmap"), 2.0, self.family.PATCH, [])
        return noising(self.latents, torch.Generator().manual_seed(3)) | self.conditions


@pytest.fixture(scope="session", params=KINDS)
def example(request, tiny) -> Example:
    kind = request.param
    model, generator = tiny.opened(kind), torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        mean, std = encode(model.family, model.pipeline.vae, pixels)
        rows = [prompt_outputs(model, [prompt]) for prompt in PROMPTS]
        of_prompts = conditions(model.pipeline, joined(rows), model.skeletons["transformer"].config)
    latents = model.family.scale(model.pipeline.vae).scaled(mean)
    return Example(kind, model, tiny.stock(kind), pixels, latents, std, of_prompts)


def prompt_outputs(model: OpenModel, prompts: list[str]) -> dict[str, Tensor]:
    """The outputs of all text encoders."""
    outputs: dict[str, Tensor] = {}
    for name in model.text_encoders:
        outputs |= read_prompts(model.pipeline, name, prompts, CPU)
    return outputs


@torch.no_grad()
def test_latents_are_those_of_diffusers_training_scripts(example):
    expected = reference_latents(example.kind, example.stock, example.pixels)
    torch.testing.assert_close(example.latents, expected, atol=1e-6, rtol=1e-6)
    assert example.latents.std() > 0.1
    channels, factor = example.family.latent_shape(example.stock.vae.config)
    height, width = latent_size(example.model.pipeline, 32, 64)
    assert example.latents.shape == example.std.shape == (2, channels, height, width)
    assert (height * factor, width * factor) == (32, 64)

    vae, is_video = example.stock.vae, example.kind == "qwenimage"
    posterior = vae.encode(example.pixels.unsqueeze(2) if is_video else example.pixels).latent_dist
    decoded = vae.decode(posterior.mode()).sample
    std, decoded = (posterior.std.squeeze(2), decoded.squeeze(2)) if is_video else (posterior.std, decoded)
    if example.kind.startswith("flux2"):
        std = Flux2Pipeline._patchify_latents(std)
    torch.testing.assert_close(example.std, std, atol=1e-6, rtol=1e-6)
    ours = decode(example.family, example.model.pipeline.vae, example.latents)
    torch.testing.assert_close(ours, decoded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_loss_is_that_of_diffusers_training_scripts(example):
    batch = example.batch()
    noise = torch.randn(example.latents.shape, generator=torch.Generator().manual_seed(3))
    errors = reference_loss(example.kind, example.stock, example.pixels, noise, batch["timesteps"], PROMPTS)
    expected = errors * batch["weights"]
    torch.testing.assert_close(losses(example, **batch, subjects=2), expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(losses(example, **batch)[0], expected.mean(), atol=0, rtol=1e-6)


@torch.no_grad()
def test_a_prompt_is_encoded_alike_in_every_batch(example):
    assert ("mask" in example.conditions) == (example.kind in RAGGED)
    pipeline, config = example.model.pipeline, example.model.skeletons["transformer"].config
    prompts = [*PROMPTS, example.family.NO_PROMPT]
    table = PromptTable(prompts, conditions(pipeline, prompt_outputs(example.model, prompts), config))
    alone = [encode_prompts(pipeline, [prompt], CPU) for prompt in PROMPTS]
    assert not any("mask" in of_prompt for of_prompt in alone), "a single prompt has no padding"
    assert table.have_same_length(PROMPTS) == (example.kind not in RAGGED)
    for prompt, of_prompt in zip(PROMPTS, alone):
        row = table.lookup([prompt])
        assert row.keys() == of_prompt.keys()
        for name, tensor in row.items():
            torch.testing.assert_close(tensor, of_prompt[name], atol=1e-5, rtol=1e-4)
    batch = example.batch()
    together = losses(example, **batch | table.lookup(PROMPTS), subjects=2)
    for row in range(2):
        one = {name: batch[name][row : row + 1] for name in ("noisy", "timesteps", "target", "weights")}
        torch.testing.assert_close(together[row : row + 1], losses(example, **one, **alone[row]), atol=0, rtol=1e-5)
        assert abs(together[row] / losses(example, **one, **alone[1 - row]) - 1) > 1e-3, "prompts matter"


@torch.no_grad()
def test_the_order_of_sd3s_text_encoders(example):
    """Its transformer gives text no positions, so that the loss does not depend on the order of the tokens."""
    if example.kind.startswith("sd3"):
        embeddings, _, pooled, _ = example.stock.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        torch.testing.assert_close(example.conditions["encoder_hidden_states"], embeddings, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(example.conditions["pooled_projections"], pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_that_is_too_long_is_cut_where_diffusers_cuts_it(example, caplog):
    long = "a photo of sks dog " + "with a very long red collar " * 30
    outputs = joined([prompt_outputs(example.model, [prompt]) for prompt in (long, PROMPTS[1])])
    cut = conditions(example.model.pipeline, outputs, example.model.skeletons["transformer"].config)
    batch = example.batch() | cut
    noise = batch["target"] + example.latents
    expected = reference_loss(
        example.kind, example.stock, example.pixels, noise, batch["timesteps"], [long, PROMPTS[1]]
    )
    actual = losses(example, **batch, subjects=2)
    torch.testing.assert_close(actual, expected * batch["weights"], atol=0, rtol=2e-6)

    limit = {"sd3": 256, "sd3-no-t5": 77}.get(example.kind, 512)
    warn_of_truncation(example.model.pipeline, [long, *PROMPTS])
    (record,) = [record for record in caplog.records if record.name.startswith("delora_diffusers")]
    assert f"tokens, of which {limit} are read" in record.message and "red collar" in record.message


def losses(example: Example, **batch: Any) -> Tensor:
    return denoising_losses(example.family, example.transformer, **batch)


def test_the_default_targets_are_the_attention(example):
    linears = {n for n, m in example.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = find_targets(example.transformer, example.family.TARGETS)
    assert set(targets) == {name for name in linears if ".attn" in name or ".attention." in name}
    assert len(targets) == NUMBER_OF_MODULES[example.kind.split("-")[0]]


@torch.no_grad()
def predict(example: Example) -> Tensor:
    batch = example.batch()
    return example.family.predict(example.transformer, batch["noisy"], batch["timesteps"], **example.conditions)


def attached(example: Example, path: str) -> Any:
    config = AdapterConfig(rank=4, targets=example.family.TARGETS, path=path)
    return attach(example.transformer, config, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", ["fast", "lean", "split"])
def test_training_starts_exactly_at_the_base_model(example, path):
    base = predict(example)
    adapter = attached(example, path)
    try:
        assert torch.equal(predict(example), base)
        randomize(adapter, 0.5)
        assert (predict(example) - base).abs().max() > 1e-2
        adapter.strength = 0
        assert torch.equal(predict(example), base)
    finally:
        detach(example.transformer)
    assert torch.equal(predict(example), base)


def test_the_loss_of_a_fixed_batch_falls(example):
    path = ("fast", "lean", "split")[KINDS.index(example.kind) % 3]
    adapter, batch = attached(example, path), example.batch()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=2e-2)
    values = []
    try:
        for _ in range(8):
            optimizer.zero_grad()
            loss = losses(example, **batch)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        still = {name for name, distance in adapter.distances().items() if not distance > 0}
    finally:
        detach(example.transformer)
    print(example.kind, path, values[-1] / values[0])
    assert still == UNUSED.get(example.kind.split("-")[0], set())
    assert values[-1] < 0.95 * values[0]


def gradients(example: Example, transformer: Any, path: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a fixed batch and the gradients of an adapter that is not at its start."""
    config = AdapterConfig(rank=4, targets=example.family.TARGETS, path=path)
    adapter = attach(transformer, config, torch.Generator().manual_seed(0))
    randomize(adapter)
    try:
        loss = denoising_losses(example.family, transformer, **example.batch())
        loss.backward()
    finally:
        detach(transformer)
    return loss.detach(), {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient(example):
    loss, expected = gradients(example, example.transformer, "lean")
    checkpointed = copy.deepcopy(example.transformer)
    checkpoint_denoiser(checkpointed)
    again, actual = gradients(example, checkpointed, "lean")
    assert torch.equal(again, loss) and actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4)


def test_training_in_bf16(example):
    exact, _ = gradients(example, example.transformer, "fast")
    loss, of_parameters = gradients(example, copy.deepcopy(example.transformer).to(torch.bfloat16), "fast")
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.1
    assert all(gradient.isfinite().all() and gradient.any() for gradient in of_parameters.values())


SCHEMES = {
    "none": ("none", 0.0, 1.0, 1.29),
    "logit_normal": ("logit_normal", 0.0, 1.0, 1.29),
    "more_noise": ("logit_normal", -0.7, 0.6, 1.29),
    "mode": ("mode", 0.0, 1.0, 1.29),
    "flatter_mode": ("mode", 0.0, 1.0, -0.5),
    "cosmap": ("cosmap", 0.0, 1.0, 1.29),
    "sigma_sqrt": ("sigma_sqrt", 0.0, 1.0, 1.29),
}
"""Weighting schemes with logit_mean, logit_std and mode_scale."""


def time_at(probability: float, scheme: str, mean: float, std: float, scale: float, shift: float) -> float:
    """The time that is exceeded with probability ``1 - probability``."""
    t = probability
    if scheme == "logit_normal":  # of the time counted from the noise, so its mean is negative here
        t = 1 / (1 + math.exp(-NormalDist(-mean, std).inv_cdf(probability)))
    elif scheme == "mode":
        t = probability - scale * (1 - probability - math.cos(math.pi / 2 * probability) ** 2)
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", SCHEMES)
def test_times_have_the_density_of_their_scheme(name, shift):
    count = 10_000
    flow = Flow(Density(*SCHEMES[name]), shift, 2, [])
    times = flow.times(torch.zeros(count, 1, 2, 2), torch.Generator().manual_seed(0)).sort().values
    assert times[0] >= 0 and times[-1] <= 1
    expected = torch.tensor([time_at((i + 0.5) / count, *SCHEMES[name], shift) for i in range(count)])
    between = slice(count // 100, -count // 100)  # the extremes vary more
    assert (times - expected)[between].abs().max() < 0.02
    if name in ("none", "logit_normal", "mode"):  # symmetric without the shift
        assert times.median() == pytest.approx(shift / (1 + shift), abs=0.015)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_noised_and_predicted(name):
    latents = torch.randn(64, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    flow = Flow(Density(*SCHEMES[name]), 2.0, 2, [])
    batch = flow(latents, torch.Generator().manual_seed(5))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    times = batch["timesteps"]
    t = times[:, None, None, None]
    assert torch.equal(batch["noisy"], (1 - t) * latents + t * noise)
    assert torch.equal(batch["target"], noise - latents)
    formulas = {"sigma_sqrt": times**-2, "cosmap": 2 / (math.pi * (1 - 2 * times + 2 * times**2))}
    weights = formulas.get(name, torch.ones(64))
    torch.testing.assert_close(batch["weights"], weights)


def test_the_weight_of_a_vanishing_time_is_bounded():
    flow = Flow(Density("sigma_sqrt"), 1e-3, 2, [])  # shifts every time to nearly 0
    weights = flow(torch.zeros(64, 1, 2, 2), torch.Generator())["weights"]
    assert weights.max() == pytest.approx(1e6, rel=1e-3)


def test_the_noise_offset_is_one_number_per_channel():
    latents = torch.zeros(2, 3, 4, 4)
    plain, offset = (
        Flow(Density(), 1.0, 2, [], value)(latents, torch.Generator().manual_seed(0))["target"] for value in (0.0, 0.5)
    )
    difference = offset - plain
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert difference.unique().numel() > 3


def flags(model: OpenModel, *more: object) -> Namespace:
    from train_dreambooth_delora import parse_arguments

    return parse_arguments(["--pretrained_model_name_or_path", str(model.name), *map(str, more)])


def flow_of(model: OpenModel, *more: object) -> Flow:
    noising = noising_of(model, flags(model, *more))
    assert isinstance(noising, Flow)
    return noising


def median_time(flow: Flow, side: int, channels: int = 1) -> float:
    latents = torch.zeros(1, channels, side, side).expand(4000, -1, -1, -1)
    return flow.times(latents, torch.Generator().manual_seed(0)).median().item()


def test_the_flags_of_a_flow_and_their_defaults(example):
    static = {"sd3": 3.0, "sd3-no-t5": 3.0, "zimage": 3.0}
    scheme = "logit_normal" if example.kind.startswith("sd3") else "none"
    flow = flow_of(example.model)
    assert (flow.density.scheme, flow.shift) == (scheme, static.get(example.kind, 1.0))
    assert (flow.density, flow.noise_offset) == (Density(scheme, 0, 1, 1.29), 0)
    given = ("--weighting_scheme", "mode", "--logit_mean", 0.5, "--logit_std", 2, "--mode_scale", 0.3)
    flow = flow_of(example.model, *given, "--timestep_shift", 2.5, "--noise_offset", 0.1)
    assert flow == Flow(Density("mode", 0.5, 2.0, 0.3), 2.5, example.family.PATCH, flow.shifts_by_size, 0.1)


def test_times_shift_with_the_resolution_as_when_sampling(example):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = example.stock.scheduler.config
    (first, last), (low, high) = (
        (config[f"base_{name}"], config[f"max_{name}"]) for name in ("image_seq_len", "shift")
    )
    flow = flow_of(example.model, "--weighting_scheme", "none", "--timestep_shift", "resolution")
    for pixels in (512, 1024):
        tokens = (pixels // 16) ** 2  # of 16 x 16 pixels, in every family
        mu = low + (high - low) * (tokens - first) / (last - first)
        assert mu == pytest.approx(calculate_shift(tokens, first, last, low, high))
        factor = example.family.latent_shape(example.stock.vae.config)[1]
        shift = math.exp(mu)
        assert median_time(flow, pixels // factor) == pytest.approx(shift / (1 + shift), abs=0.02)


def test_the_default_resolution_is_the_stock_pipelines(example):
    expected = 64 if example.kind.startswith("sd3") else 1024  # from the size of SD3's positional embedding
    assert default_resolution(example.model.pipeline, example.transformer) == expected


def test_a_target_that_matches_containers_only(example):
    transformer = example.transformer
    if example.kind == "flux":
        with pytest.raises(InputError, match=r"target to_out matches transformer_blocks.0.attn.to_out .*give to_out.0"):
            find_targets(transformer, ("to_q", "to_out"))
    if example.kind.startswith("flux2"):  # a container in the double blocks, a linear module in the single blocks
        names = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(2)]
        assert list(find_targets(transformer, ("to_out",))) == names


SIZES = {"batch": st.integers(1, 3), "channels": st.integers(1, 5)}
SIZES |= {"height": st.integers(1, 6), "width": st.integers(1, 6)}


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_tokens_are_flux_packed_latents(batch, channels, height, width):
    latents = torch.randn(batch, channels, 2 * height, 2 * width)
    tokens = to_tokens(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, batch, channels, 2 * height, 2 * width))
    assert torch.equal(from_tokens(tokens, 2 * height, 2 * width), latents)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 16 * height, 16 * width, 8), latents)


@settings(deadline=None, max_examples=40)
@given(height=SIZES["height"], width=SIZES["width"])
def test_positions_are_those_of_the_stock_pipelines(height, width):
    expected: Any = FluxPipeline._prepare_latent_image_ids(1, height, width, CPU, torch.float32)
    assert torch.equal(grid_positions(height, width, 3, CPU), expected)
    expected = Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 8, height, width))[0]
    assert torch.equal(grid_positions(height, width, 4, CPU), expected.float())


NUMBERS = st.floats(-3, 3, width=32)
FACTORS = st.floats(0.125, 4, width=32)


@settings(deadline=None, max_examples=60)
@given(factor=FACTORS, mean=st.lists(NUMBERS, min_size=3, max_size=3), std=st.lists(FACTORS, min_size=3, max_size=3))
def test_scaled_latents_are_unscaled_again(factor, mean, std):
    latents = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    column = (1, 3, 1, 1)
    scale = LatentScale(factor, torch.tensor(mean).view(column), torch.tensor(std).view(column))
    torch.testing.assert_close(scale.unscaled(scale.scaled(latents)), latents, atol=1e-5, rtol=1e-5)
    shifted = configured_scale(Namespace(scaling_factor=factor, shift_factor=mean[0]))
    torch.testing.assert_close(shifted.scaled(latents), (latents - mean[0]) * factor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shifted.unscaled(shifted.scaled(latents)), latents, atol=1e-5, rtol=1e-5)
