"""The losses and their weights against formulas in float64."""

import argparse
import math
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from delora_diffusers import InputError
from delora_diffusers.families.loading import open_model
from delora_diffusers.families.table import family_of
from delora_diffusers.training.argument_checks import check_training_arguments
from delora_diffusers.training.defaults import with_family_defaults
from delora_diffusers.training.noising import Density, Diffusion, Flow, Huber, loss_weights, noising_of
from delora_diffusers.training.objective import denoising_losses, errors

TIMESTEPS = torch.tensor([0, 10, 500, 999])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["huber", "smooth_l1"]), st.floats(1e-3, 10), st.floats(-100, 100), st.integers(0, 2**16))
def test_pseudo_huber(kind, c, offset, seed):
    prediction, target = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).unbind()
    target = target + offset
    thresholds = torch.tensor([c, 2 * c])
    error = (prediction.double() - target.double()).numpy()
    wide = thresholds.double().numpy()[:, None, None, None]
    expected = 2 * (np.sqrt(error**2 + wide**2) - wide) * (wide if kind == "huber" else 1)
    actual = errors(prediction, target, kind, thresholds)
    assert actual.shape == prediction.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-4, atol=1e-6)
    bound = error**2 if kind == "huber" else 2 * np.abs(error)
    assert (actual.numpy() <= bound * (1 + 1e-4) + 1e-9).all()


def test_small_errors_are_not_lost_to_rounding():
    prediction, target, c = torch.full((1, 1, 1, 1), 1e-5), torch.zeros(1, 1, 1, 1), torch.ones(1)
    assert errors(prediction, target, "huber", c).item() == pytest.approx(1e-10)


class Zero:
    dtype = torch.bfloat16


class Predicts:
    """A family whose denoiser predicts the noisy latents."""

    @staticmethod
    def predict(denoiser, noisy, timesteps):
        return noisy


def test_the_losses_are_weighted_means_of_the_errors():
    noisy, target = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float().unbind()
    weights, c = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.full((4,), 0.1)
    for kind, thresholds in (("l2", None), ("huber", c), ("smooth_l1", c)):
        losses = denoising_losses(
            Predicts, Zero(), noisy, TIMESTEPS, target, weights, 2, loss_type=kind, huber_c=thresholds
        )
        elements = errors(noisy, target, kind, thresholds).double()
        expected = (elements.mean(dim=(1, 2, 3)) * weights).view(2, 2).mean(dim=1)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    l2 = denoising_losses(Predicts, Zero(), noisy, TIMESTEPS, target, torch.ones(4))
    torch.testing.assert_close(l2[0], torch.nn.functional.mse_loss(noisy, target))


def test_the_schedules_of_the_threshold():
    scheduler = DDPMScheduler()
    alpha = scheduler.alphas_cumprod.double().numpy()[TIMESTEPS]
    snr, times = torch.from_numpy(alpha / (1 - alpha)).float(), TIMESTEPS / 1000
    sigma = np.sqrt((1 - alpha) / alpha)
    expected = {
        "constant": np.full(4, 0.1),
        "exponential": np.exp(np.log(0.1) * TIMESTEPS.numpy() / 1000),
        "snr": 0.9 / (1 + sigma) ** 2 + 0.1,
    }
    for schedule, values in expected.items():
        thresholds = Huber(0.1, schedule).thresholds(times, snr)
        np.testing.assert_allclose(thresholds.numpy(), values, rtol=1e-5)
        assert (thresholds >= 0.1 - 1e-6).all() and (thresholds <= 1).all()


def test_only_a_loss_with_a_threshold_adds_it_to_the_batch():
    latents, generator = torch.randn(3, 4, 8, 8), torch.Generator().manual_seed(0)
    scheduler, huber = DDPMScheduler(), Huber(0.2, "exponential")
    assert "huber_c" not in Diffusion(scheduler)(latents, generator)
    batch = Diffusion(scheduler, huber=huber)(latents, generator)
    torch.testing.assert_close(batch["huber_c"], 0.2 ** (batch["timesteps"] / 1000))
    assert batch["huber_c"].dtype == torch.float32
    flow = Flow(Density(), 1.0, 2, [], huber=huber)(latents, generator)
    torch.testing.assert_close(flow["huber_c"], 0.2 ** flow["timesteps"])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_debiased_estimation(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction)
    alpha = scheduler.alphas_cumprod.double().numpy()[TIMESTEPS]
    snr = np.minimum(alpha / (1 - alpha), 1000)
    expected = 1 / np.sqrt(snr) if prediction == "epsilon" else 1 / (snr + 1)
    np.testing.assert_allclose(loss_weights(scheduler, TIMESTEPS, None, True).numpy(), expected, rtol=1e-3)
    batch = Diffusion(scheduler, debiased=True)(torch.zeros(2, 4, 8, 8), torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch["weights"], loss_weights(scheduler, batch["timesteps"], None, True))


def parsed(*flags: object) -> argparse.Namespace:
    import train_dreambooth_delora as script

    return script.parse_arguments(["--pretrained_model_name_or_path", "x/y", *map(str, flags)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--snr_gamma", 5), "--snr_gamma does not apply to x/y, which is a flow model"),
        (("--debiased_estimation_loss",), "--debiased_estimation_loss does not apply to x/y, which is a flow model"),
        (("--loss_type", "huber", "--huber_schedule", "snr"), "--huber_schedule snr does not apply to x/y"),
    ],
)
def test_what_flow_models_do_not_have(flags, message):
    args = parsed(*flags)
    with pytest.raises(InputError, match=message):
        with_family_defaults(args, family_of("FluxPipeline"))
    with_family_defaults(args, family_of("StableDiffusionPipeline"))


def test_the_default_schedule_depends_on_the_family():
    for pipeline, schedule in (("StableDiffusionPipeline", "snr"), ("FluxPipeline", "exponential")):
        args = with_family_defaults(parsed("--loss_type", "smooth_l1"), family_of(pipeline))
        assert (args.huber_c, args.huber_schedule) == (0.1, schedule)
        args = with_family_defaults(parsed(), family_of(pipeline))
        assert args.huber_c is None and args.huber_schedule is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--huber_c", 0.2), "--huber_c belongs to --loss_type huber and smooth_l1"),
        (("--huber_schedule", "snr"), "--huber_schedule belongs to"),
        (("--loss_type", "huber", "--huber_c", 0), "--huber_c 0.0 is not between"),
        (("--snr_gamma", 5, "--debiased_estimation_loss"), "both weight the loss by the SNR; choose one"),
    ],
)
def test_flags_of_the_loss_that_exclude_each_other(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        check_training_arguments(parsed("--output_dir", tmp_path / "out", *flags))


def test_timesteps_of_a_ddpm_are_uniform_unless_a_density_is_given(tiny_sd):
    model = open_model(str(tiny_sd))
    for more, expected in (
        ((), Density()),
        (("--weighting_scheme", "logit_normal", "--logit_mean", 1), Density("logit_normal", 1)),
        (("--weighting_scheme", "mode", "--mode_scale", 0.5), Density("mode", mode_scale=0.5)),
    ):
        args = with_family_defaults(parsed(*more), model.family)
        assert cast(Any, noising_of(model, args)).density == expected


def test_timesteps_of_a_ddpm_follow_a_logit_normal_density(tiny_sd):
    """Quantiles of t / T against those of the logistic function of a normal variable; positive means less noise."""
    schedule = cast(Any, noising_of(open_model(str(tiny_sd)), parsed())).scheduler
    latents = torch.zeros(20_000, 1, 2, 2)
    noising = Diffusion(schedule, density=Density("logit_normal", 0.7, 0.5))
    timesteps = noising(latents, torch.Generator().manual_seed(0))["timesteps"]
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    for share in (0.05, 0.5, 0.95):
        normal = -0.7 + 0.5 * NormalDist().inv_cdf(share)
        expected = 1000 / (1 + math.exp(-normal))
        assert timesteps.double().quantile(share).item() == pytest.approx(expected, abs=8)
