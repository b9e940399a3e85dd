from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.diffusion import predict_x0, training_target
from model.samplers import A_O, A_X, C_0, C_N, C_P, C_X, SAMPLERS, Plan, T, build_plan
from model.schedule import NoiseSchedule, VarianceType, linear_betas

SHAPE = (2, 1, 4, 4)
Network = Callable[[Tensor, int], Tensor]
Step = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def noise(row: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(row + 1), dtype=torch.float64)


def network(schedule: NoiseSchedule) -> Network:
    """An ε that depends on x and t everywhere, whose x₀ is bounded yet leaves [−1, 1] at times."""
    picture = 1.2 * torch.sin(torch.arange(math.prod(SHAPE), dtype=torch.float64)).view(SHAPE)

    def eps(x: Tensor, t: int) -> Tensor:
        ac = float(schedule.alphas_cumprod[t])
        x0 = torch.tanh(picture + 0.3 * torch.sin(3 * x)) * 1.3
        return (x - math.sqrt(ac) * x0) / math.sqrt(1 - ac)

    return eps


def follow(plan: Plan, eps: Network) -> list[Tensor]:
    """x after every row, in float64, as the module's docstring says."""
    x, previous, xs = noise(-1), torch.zeros(SHAPE, dtype=torch.float64), []
    for row, (t, a_x, a_o, c_x, c_0, c_p, c_n) in enumerate(plan.table):
        x0 = (a_x * x + a_o * eps(x, int(t))).clamp(-plan.clip, plan.clip)
        x = c_x * x + c_0 * x0 + c_p * previous + c_n * noise(row)
        previous = x0
        xs.append(x)
    return xs


def drive(timesteps: Tensor, eps: Network, step: Step) -> list[Tensor]:
    """x after every step of a diffusers scheduler."""
    x, xs = noise(-1), []
    for row, t in enumerate(timesteps.tolist()):
        x = step(eps(x, t), t, x, noise(row))
        xs.append(x)
    return xs


def assert_same_way(ours: list[Tensor], theirs: list[Tensor], within: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for row, (x, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert (x - expected).abs().max() <= within, f"row {row}"
    assert ours[-1].std() > 0.1


@pytest.mark.parametrize(
    ("steps", "within"),
    [(1000, 1e-4), (50, 1e-4), (37, 1e-4), (1000, 1e-9), (37, 1e-9), (2, 1e-9), (1, 1e-9)],
)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_follows_diffusers(
    steps: int, variance: VarianceType, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(variance_type=variance)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config))
    if within < 1e-4:
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)  # theirs are in float32
    drawn: list[Tensor] = []
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: drawn[-1])

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        drawn.append(z)
        result: Tensor = scheduler.step(out, t, x).prev_sample
        return result

    plan = build_plan(schedule, "ddpm", steps, timesteps=scheduler.timesteps.tolist())
    eps = network(schedule)
    assert_same_way(follow(plan, eps), drive(scheduler.timesteps, eps, step), within)


@pytest.mark.parametrize("within", [1e-4, 1e-9])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (50, {}),
        (50, {"clip_sample": False}),
        (8, {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}),
        (1000, {"clip_sample_range": 0.9}),
    ],
)
def test_ddim_follows_diffusers(steps: int, options: dict[str, Any], eta: float, within: float) -> None:
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config))
    if within < 1e-4:
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)  # theirs are in float32

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        result: Tensor = scheduler.step(
            out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z
        ).prev_sample
        return result

    plan = build_plan(schedule, "ddim", steps, eta=eta, timesteps=scheduler.timesteps.tolist())
    eps = network(schedule)
    assert_same_way(follow(plan, eps), drive(scheduler.timesteps, eps, step), within)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning:diffusers"
)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("sampler", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("sde_dpmpp_2m", "sde-dpmsolver++")]
)
def test_dpm_solvers_follow_diffusers(
    sampler: str, algorithm: str, steps: int, spacing: str, betas: str
) -> None:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm,
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing=spacing,
        beta_schedule=betas,
        # Their λ(t) of the cosine schedule's last timestep loses its digits in float32.
        lambda_min_clipped=-5.1,
    )
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers({"beta_schedule": betas, "clip_sample": False})

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        result: Tensor = scheduler.step(out, t, x, variance_noise=z).prev_sample
        return result

    plan = build_plan(schedule, sampler, steps, timesteps=scheduler.timesteps.tolist())
    eps = network(schedule)
    assert_same_way(follow(plan, eps), drive(scheduler.timesteps, eps, step))


def test_ddim_at_eta_one_is_ddpm_with_the_small_variance() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    for steps in (1, 2, 33, 250):
        ddim = build_plan(schedule, "ddim", steps, eta=1.0).table
        ddpm = build_plan(schedule, "ddpm", steps, variance="fixed_small").table
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-9)
    assert not np.allclose(ddpm, build_plan(schedule, "ddpm", 250, variance="fixed_large").table, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_plan_of_one_row_is_the_x0_guess(sampler: str) -> None:
    schedule = NoiseSchedule(linear_betas(1000), clip=math.inf)
    plan = build_plan(schedule, sampler, 1, eta=1.0, timesteps=[700])
    assert plan.timesteps == (700,)
    x, out = noise(0), noise(1)
    _, a_x, a_o, c_x, c_0, c_p, c_n = plan.table[0]
    guess = predict_x0(schedule, x, torch.tensor([700, 700]), out)
    torch.testing.assert_close(c_x * x + c_0 * (a_x * x + a_o * out), guess)
    assert (c_x, c_0, c_p, c_n) == (0, 1, 0, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_network_arrives_from_any_noise(sampler: str) -> None:
    # With x₀ known, every row must keep x on its way: √ᾱ' x₀ + √(1 − ᾱ') ε.
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_plan(schedule, sampler, 25)
    x0 = 0.5
    following = np.append(schedule.alphas_cumprod[list(plan.timesteps[1:])], 1.0)
    for t, row, ac in zip(plan.timesteps, plan.table, following, strict=True):
        mean = schedule.alphas_cumprod[t] ** 0.5 * x0
        assert row[C_X] * mean + (row[C_0] + row[C_P]) * x0 == pytest.approx(ac**0.5 * x0, abs=1e-12)
        variance = row[C_X] ** 2 * (1 - schedule.alphas_cumprod[t]) + row[C_N] ** 2
        assert variance == pytest.approx(1 - ac, abs=1e-12)


@st.composite
def plans(draw: st.DrawFn) -> tuple[NoiseSchedule, Plan]:
    schedule = NoiseSchedule.from_diffusers(
        {
            "num_train_timesteps": draw(st.sampled_from([10, 1000])),
            "beta_schedule": draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
            "prediction_type": draw(st.sampled_from(["epsilon", "v_prediction", "sample"])),
            "timestep_spacing": draw(st.sampled_from(["leading", "trailing", "linspace"])),
            "variance_type": draw(st.sampled_from(["fixed_small", "fixed_large"])),
            "steps_offset": draw(st.integers(0, 2)),
        }
    )
    steps = draw(st.integers(1, schedule.timesteps))
    eta = draw(st.floats(0, 1))
    return schedule, build_plan(schedule, draw(st.sampled_from(list(SAMPLERS))), steps, eta=eta)


@given(drawn=plans())
def test_what_holds_for_every_plan(drawn: tuple[NoiseSchedule, Plan]) -> None:
    schedule, plan = drawn
    assert np.isfinite(plan.table).all()
    assert plan.table.dtype == np.float64
    assert (np.diff(plan.table[:, T]) < 0).all()
    assert plan.timesteps == tuple(plan.table[:, T])
    assert plan.table[-1, [C_X, C_0, C_P, C_N]].tolist() == [0, 1, 0, 0]
    assert plan.table[0, C_P] == 0, "there is no previous x₀ yet"
    assert (plan.table[:, C_N] >= 0).all()
    assert 1 <= len(plan) <= schedule.timesteps
    assert plan.clip == schedule.clip


@given(t=st.integers(0, 999), x0=st.floats(-1, 1), eps=st.floats(-4, 4))
def test_the_parametrisations_agree_on_x0(t: int, x0: float, eps: float) -> None:
    guesses = []
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule(linear_betas(1000), prediction_type=kind)
        ac = schedule.alphas_cumprod[t]
        x = ac**0.5 * x0 + (1 - ac) ** 0.5 * eps
        out = training_target(
            schedule,
            torch.tensor([x0], dtype=torch.float64),
            torch.tensor([t]),
            torch.tensor([eps], dtype=torch.float64),
        )
        row = build_plan(schedule, "ddim", 1, timesteps=[t]).table[0]
        guesses.append(row[A_X] * x + row[A_O] * float(out))
    assert guesses == pytest.approx([x0] * 3, abs=1e-9)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [1, 2], [1000], [3, -1]])
def test_timesteps_that_do_not_fall_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        build_plan(NoiseSchedule(linear_betas(1000)), "ddim", 2, timesteps=timesteps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_outside_its_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match="eta"):
        build_plan(NoiseSchedule(linear_betas(1000)), "ddim", 2, eta=eta)


def test_an_unknown_sampler_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="euler"):
        build_plan(NoiseSchedule(linear_betas(1000)), "euler", 2)


def test_defaults_come_from_the_schedule() -> None:
    schedule = NoiseSchedule(linear_betas(1000), variance_type="fixed_large", timestep_spacing="trailing")
    plan = build_plan(schedule, "ddpm", 10)
    explicit = build_plan(schedule, "ddpm", 10, variance="fixed_large", spacing="trailing")
    np.testing.assert_array_equal(plan.table, explicit.table)
    assert plan.timesteps[0] == 999
