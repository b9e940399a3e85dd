from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from model.schedule import SPACINGS, NoiseSchedule, ScheduleError, Spacing, linear_betas

CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.03},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"beta_schedule": "linear", "num_train_timesteps": 50},
    "trained": {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    "defaults": {},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_betas_and_alphas_are_those_of_diffusers(name: str) -> None:
    ours, theirs = NoiseSchedule.from_diffusers(CONFIGS[name]), DDPMScheduler(**CONFIGS[name])
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-3, atol=1e-6)
    # Theirs is in float32: compare with the product of their betas in float64.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=5e-3, atol=1e-6)


def test_the_schedule_of_the_paper() -> None:
    schedule = NoiseSchedule.from_diffusers({})
    assert (schedule.timesteps, schedule.betas[0], schedule.betas[-1]) == (1000, 1e-4, 0.02)
    assert schedule.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert schedule.alphas_cumprod_prev[0] == 1
    assert schedule.alphas_cumprod_prev[1] == schedule.alphas_cumprod[0] == 1 - 1e-4
    assert schedule.snr[0] == pytest.approx(0.9999 / 0.0001)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_posterior_variance_is_that_of_diffusers(kind: Any) -> None:
    ours, theirs = NoiseSchedule.from_diffusers({}), DDPMScheduler(variance_type=kind)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.alphas_cumprod[:] = torch.from_numpy(ours.alphas_cumprod)
    expected = [float(theirs._get_variance(t)) for t in range(1000)]
    np.testing.assert_allclose(ours.posterior_variance(kind), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_those_of_diffusers(spacing: Spacing, offset: int) -> None:
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    schedule = NoiseSchedule.from_diffusers(options)
    for scheduler in (DDPMScheduler(**options), DDIMScheduler(**options)):
        for steps in range(1, 1000):
            scheduler.set_timesteps(steps)
            # With some counts diffusers' `trailing` runs one timestep over, to −1, by a rounding error.
            expected = [t for t in scheduler.timesteps.tolist() if t >= 0]
            assert schedule.spaced_timesteps(steps).tolist() == expected, steps


@given(total=st.integers(1, 400), data=st.data(), spacing=st.sampled_from(SPACINGS))
def test_timesteps_fall_strictly_within_range(total: int, data: st.DataObject, spacing: Spacing) -> None:
    steps, offset = data.draw(st.integers(1, total)), data.draw(st.integers(0, 5))
    schedule = NoiseSchedule(linear_betas(total), steps_offset=offset, timestep_spacing=spacing)
    chosen = schedule.spaced_timesteps(steps)
    assert len(chosen) == steps
    assert (np.diff(chosen) < 0).all()
    assert 0 <= chosen[-1] <= chosen[0] < total


def test_quadratic_and_logsnr_are_even_in_their_own_measure() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    quadratic = schedule.spaced_timesteps(10, "quadratic")
    assert quadratic.tolist() == [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]
    logsnr = schedule.spaced_timesteps(10, "logsnr")
    gaps = np.diff(np.log(schedule.snr[logsnr]))
    assert (logsnr[0], logsnr[-1]) == (999, 0)
    assert gaps[:-1] == pytest.approx(np.full(8, gaps[:-1].mean()), rel=0.2)
    assert schedule.spaced_timesteps(1, "logsnr").tolist() == [0]
    assert schedule.spaced_timesteps(1000, "logsnr").tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ScheduleError, match=f"from 1 to 1000, got {steps}"):
        NoiseSchedule.from_diffusers({}).spaced_timesteps(steps)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta_schedule": "spline"}, "beta_schedule='spline'"),
        ({"variance_type": "guessed"}, "variance_type='guessed'"),
        ({"prediction_type": "flow"}, "prediction_type='flow'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"clip_sample_range": -1.0}, "clip=-1.0"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "betas"),
        ({"trained_betas": [1.0, 0.5], "num_train_timesteps": 2}, "betas must be below 1 but for the last"),
        ({"trained_betas": [0.1, math.nan], "num_train_timesteps": 2}, "betas"),
        ({"trained_betas": []}, "betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ScheduleError, match=named):
        NoiseSchedule.from_diffusers(options)


def test_the_checkpoints_own_choices_are_read() -> None:
    schedule = NoiseSchedule.from_diffusers(
        {
            "prediction_type": "v_prediction",
            "clip_sample_range": 2.5,
            "variance_type": "fixed_large",
            "timestep_spacing": "linspace",
        }
    )
    assert (schedule.prediction_type, schedule.clip) == ("v_prediction", 2.5)
    assert (schedule.variance_type, schedule.timestep_spacing) == ("fixed_large", "linspace")
    assert NoiseSchedule.from_diffusers({"clip_sample": False}).clip == math.inf
    assert NoiseSchedule.from_diffusers({}).clip == 1


def test_the_old_word_for_the_parametrisation_is_read() -> None:
    assert NoiseSchedule.from_diffusers({"predict_epsilon": False}).prediction_type == "sample"
    assert NoiseSchedule.from_diffusers({"predict_epsilon": True}).prediction_type == "epsilon"


ZERO_SNR = NoiseSchedule.from_diffusers(
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
)


def test_a_last_timestep_of_pure_noise() -> None:
    """ᾱ_T = 0 (Lin et al. 2024): finite wherever it is used."""
    assert ZERO_SNR.alphas_cumprod[-1] == ZERO_SNR.snr[-1] == 0
    assert (np.diff(ZERO_SNR.alphas_cumprod) < 0).all()
    assert ZERO_SNR.alphas_cumprod[0] == pytest.approx(NoiseSchedule.from_diffusers({}).alphas_cumprod[0])
    for kind in ("v_prediction", "sample", "posterior_mean"):
        schedule = replace(ZERO_SNR, prediction_type=kind)
        assert np.isfinite(schedule.x0_coefficients).all()
    for spacing in SPACINGS:
        for steps in (1, 2, 20, 1000):
            chosen = ZERO_SNR.spaced_timesteps(steps, spacing)
            assert (np.diff(chosen) < 0).all()
    assert ZERO_SNR.spaced_timesteps(20, "logsnr")[0] == 999


def test_a_single_timestep_has_a_decoder() -> None:
    schedule = NoiseSchedule(linear_betas(1))
    assert schedule.decoder_variance == schedule.betas[0]
    longer = NoiseSchedule(linear_betas(1000))
    assert longer.decoder_variance == longer.posterior_variance("fixed_small")[1]


def test_a_spare_timestep_is_the_lowest() -> None:
    """As diffusers' multistep solvers, whose `leading` and `linspace` do not visit timestep 0."""
    schedule = NoiseSchedule(linear_betas(1000), spare_timestep=True)
    assert schedule.spaced_timesteps(4, "leading").tolist() == [800, 600, 400, 200]
    assert schedule.spaced_timesteps(3, "linspace").tolist() == [999, 666, 333]
    assert schedule.spaced_timesteps(4, "trailing").tolist() == [999, 749, 499, 249]
    assert len(schedule.spaced_timesteps(1000, "leading")) == 1000
