"""Likelihood by the probability flow, against a model whose density is known and against the bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model import likelihood, noise
from model.denoiser import Denoiser, to_pixels
from model.evaluation import flow
from model.evaluation.anomaly import measure
from model.noise import NoiseStream
from model.schedule import NoiseSchedule, linear_betas
from tests.model.conftest import tiny_checkpoint
from tests.model.gaussian import GaussianRuntime, flow_log_density

SCHEDULE = NoiseSchedule(linear_betas(1000), clip=math.inf)
RUNTIME = GaussianRuntime(SCHEDULE)
SHAPE = (1, 8, 8)
DIMS = 64
BIN = 2 / 255


def drawn(count: int, seed: int = 0) -> Tensor:
    """Data of the Gaussian model."""
    random = torch.Generator().manual_seed(seed)
    data: Tensor = torch.randn(count, *SHAPE, generator=random).double() * GaussianRuntime.variance**0.5
    return data


@pytest.mark.parametrize(("steps", "within"), [(32, 0.02), (128, 0.0015)])
def test_the_density_of_a_gaussian(steps: int, within: float) -> None:
    z = drawn(5) + float(SCHEDULE.snr[0]) ** -0.5
    found = flow.log_density(RUNTIME.predict_x0, SCHEDULE, z, range(5), steps)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found / DIMS, flow_log_density(SCHEDULE, z.numpy()) / DIMS, atol=within)


def test_heun_is_of_second_order() -> None:
    z = drawn(3)
    exact = flow_log_density(SCHEDULE, z.numpy())
    off = [
        np.abs(flow.log_density(RUNTIME.predict_x0, SCHEDULE, z, range(3), steps).numpy() - exact).mean()
        for steps in (25, 50, 100)
    ]
    assert off[0] > 3 * off[1] > 9 * off[2]


def mixing(x: Tensor, t: Tensor) -> Tensor:
    """A guess whose pixels depend on one another and not linearly."""
    return torch.tanh(x + 0.5 * x.roll(1, -1) * x.roll(2, -2))


def test_hutchinsons_estimate_is_unbiased() -> None:
    z = drawn(1)[..., :3, :3]
    jacobian = torch.autograd.functional.jacobian(lambda x: flow._slope(mixing, SCHEDULE, x, 300), z)
    level = float(SCHEDULE.snr[300]) ** -0.5
    trace = float(level * jacobian.reshape(9, 9).trace())
    many = z.expand(4000, 1, 3, 3)
    bits = noise.normals(range(4000), [0] * 4000, (1, 3, 3), NoiseStream.PROBABILITY_FLOW)
    signs = torch.from_numpy(bits).sign().double()
    slope, found = flow._slope_and_divergence(mixing, SCHEDULE, many, 300, signs)
    torch.testing.assert_close(slope[:1], flow._slope(mixing, SCHEDULE, z, 300))
    assert float(found.std()) > 0.01
    assert float(found.mean()) == pytest.approx(trace, abs=4 * float(found.std()) / math.sqrt(4000))


def test_bits_of_dequantised_levels() -> None:
    x0 = torch.from_numpy(to_pixels(drawn(40))).double() / 127.5 - 1
    found = flow.uniform_bits(RUNTIME.predict_x0, SCHEDULE, x0, range(40), 100)
    # −log₂ of the density times the width of a level, with the level's own spread about its middle.
    variance = GaussianRuntime.variance
    density = flow_log_density(SCHEDULE, x0.numpy()) - DIMS * BIN**2 / 24 / variance
    expected = -(density / DIMS + math.log(BIN)) / math.log(2)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=0.005)


def test_the_noise_of_an_image_is_its_seeds() -> None:
    x0 = drawn(3)
    for bits in (flow.uniform_bits, flow.noised_bits):
        together = bits(RUNTIME.predict_x0, SCHEDULE, x0, [5, 6, 7], 10)
        torch.testing.assert_close(bits(RUNTIME.predict_x0, SCHEDULE, x0[1:2], [6], 10), together[1:2])
        assert not torch.allclose(bits(RUNTIME.predict_x0, SCHEDULE, x0[1:2], [9], 10), together[1:2])


def test_the_bound_lies_above_the_flow_by_what_its_steps_cost() -> None:
    """What x at timestep 0 costs, in four ways: by the flow, exactly, in ever finer steps, in these."""
    schedule = NoiseSchedule(linear_betas(200, 5e-4, 0.1), clip=math.inf)
    runtime, shape, count = GaussianRuntime(schedule), (1, 16, 16), 16
    denoiser = Denoiser(runtime, shape, conditional=False, null_class=None, schedule=schedule)
    random = torch.Generator().manual_seed(1)
    images = to_pixels(torch.randn(count, *shape, generator=random) * GaussianRuntime.variance**0.5)
    x0 = torch.from_numpy(images).double() / 127.5 - 1

    by_flow = flow.noised_bits(runtime.predict_x0, schedule, x0, range(count), 150).numpy()
    level, highest = 1 / schedule.snr[0], 1 / schedule.snr[-1]
    scale = schedule.alphas_cumprod[-1] * (GaussianRuntime.variance + highest)
    variance = (GaussianRuntime.variance + level) / scale
    square = np.square(x0.numpy()).reshape(count, -1).mean(1)
    nats = 0.5 * (np.log(variance / level) + (level + square) / variance - 1)
    exact = (nats / math.log(2)).mean()
    # From one draw of the noise: 256 pixels of 16 images leave about 1 % of a bit.
    assert by_flow.mean() == pytest.approx(exact, abs=0.03)

    found = measure(denoiser, images, 200, seed=3, batch=16, tick=int)
    rows = zip(found.prior, found.timesteps.tolist(), found.mse.tolist(), strict=True)
    finer = np.mean([likelihood.continuous_rate(schedule, *row) for row in rows])
    assert finer == pytest.approx(exact, rel=0.04)

    rate = found.bits_per_dim - found.decoder
    assert (rate > by_flow).all()
    assert rate.mean() > 1.1 * exact


def test_the_x0_predictor_a_checkpoint_is_the_one_that_sampling_clips() -> None:
    model = tiny_checkpoint()
    guess = flow.x0_predictor(model)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 10])
    out = model.unet(x, t, torch.tensor([3, 3]))
    ac = torch.from_numpy(model.schedule.alphas_cumprod)[t].view(2, 1, 1, 1)
    expected = ((x - (1 - ac).sqrt() * out) / ac.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(guess(x.double(), t), expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(flow.log_density(guess, model.schedule, drawn(2), [0, 1], 5)).all()
