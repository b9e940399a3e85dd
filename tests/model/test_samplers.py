from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.betas import zero_terminal_snr
from model.diffusion import predict_x0, training_target
from model.samplers import (
    COLUMNS,
    ROW,
    SAMPLERS,
    Guidance,
    Plan,
    build_inversion,
    build_measurement,
    build_plan,
    build_repaint,
    repaint_steps,
)
from model.schedule import PREDICTION_TYPES, NoiseSchedule, Spacing, VarianceType, linear_betas
from tests.model.reference import assert_same_chain, drive, follow, network, noise, values


def columns(plan: Plan, names: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[steps, names]"""
    return np.stack([plan.table[name] for name in names.split()], axis=1)


def matrix(plan: Plan) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[steps, columns], all of them."""
    return columns(plan, " ".join(COLUMNS))


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
    assert_same_chain(follow(plan, eps), drive(scheduler.timesteps, eps, step), within)


@pytest.mark.parametrize(
    ("steps", "within"), [(1000, 1e-4), (50, 1e-4), (1000, 1e-9), (37, 1e-9), (2, 1e-9), (1, 1e-9)]
)
def test_ddpm_with_a_learned_variance_follows_diffusers(
    steps: int, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config))
    if within < 1e-4:
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)  # theirs are in float32
    drawn: list[Tensor] = []
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: drawn[-1])

    def variance_frac(x: Tensor, t: int) -> Tensor:
        """Where the variance lies, from −1 to 1 and a little beyond, as a network's output does."""
        return 1.1 * torch.cos(x + t)

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        drawn.append(z)
        result: Tensor = scheduler.step(torch.cat((out, variance_frac(x, t)), dim=1), t, x).prev_sample
        return result

    plan = build_plan(schedule, "ddpm", steps, timesteps=scheduler.timesteps.tolist())
    eps = network(schedule)
    theirs = drive(scheduler.timesteps, eps, step)
    assert_same_chain(follow(plan, eps, variance_frac), theirs, within)
    fixed = build_plan(schedule, "ddpm", steps, variance="fixed_small", timesteps=plan.timesteps)
    apart = max((a - b).abs().max() for a, b in zip(follow(fixed, eps), theirs, strict=True))
    assert apart > 1e-3 or steps == 1


@pytest.mark.parametrize("within", [1e-4, 1e-9])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (50, {}),
        (50, {"clip_sample": False}),
        (8, {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}),
        (1000, {"clip_sample_range": 0.9}),
    ],
)
def test_ddim_follows_diffusers(
    steps: int, options: dict[str, Any], eta: float, within: float, clipped: bool
) -> None:
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config))
    if within < 1e-4:
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)  # theirs are in float32

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        result: Tensor = scheduler.step(
            out, t, x, eta=eta, use_clipped_model_output=clipped, variance_noise=z
        ).prev_sample
        return result

    timesteps = scheduler.timesteps.tolist()
    plan = build_plan(schedule, "ddim", steps, eta=eta, use_clipped_model_output=clipped, timesteps=timesteps)
    eps = network(schedule)
    if steps == 1000 and not clipped:
        within *= 100  # the network's own ε does not forget the rounding of their ᾱ
    assert_same_chain(follow(plan, eps), drive(scheduler.timesteps, eps, step), within)


@pytest.mark.parametrize(
    ("guidance", "guided"),
    [
        (Guidance(2.0, (0.3, 5.0)), True),
        (Guidance(classifier_scale=2.0, sigmas=(0.3, 5.0)), True),
        (Guidance(sigmas=(0.3, 5.0)), False),
    ],
    ids=["classifier-free", "by a classifier", "none"],
)
def test_guided_steps_of_ddim_take_the_epsilon_of_the_clipped_x0(guidance: Guidance, guided: bool) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config))
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    sigmas = np.sqrt(1 / schedule.alphas_cumprod - 1)
    clipped = []

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        clipped.append(guided and 0.3 <= sigmas[t] <= 5)
        result: Tensor = scheduler.step(out, t, x, use_clipped_model_output=clipped[-1]).prev_sample
        return result

    plan = build_plan(
        schedule, "ddim", 50, guidance=guidance, timesteps=[int(t) for t in scheduler.timesteps]
    )
    eps = network(schedule)
    assert_same_chain(follow(plan, eps), drive(scheduler.timesteps, eps, step), 1e-7)
    assert set(clipped) == {False, guided}


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
    assert_same_chain(follow(plan, eps), drive(scheduler.timesteps, eps, step))


def test_ddim_at_eta_one_is_ddpm_with_the_small_variance() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    for steps in (1, 2, 33, 250):
        ddim = matrix(build_plan(schedule, "ddim", steps, eta=1.0, use_clipped_model_output=True))
        ddpm = matrix(build_plan(schedule, "ddpm", steps, variance="fixed_small"))
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-9)
    large = matrix(build_plan(schedule, "ddpm", 250, variance="fixed_large"))
    assert not np.allclose(ddpm, large, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_plan_of_one_step_gives_the_x0_prediction(sampler: str) -> None:
    schedule = NoiseSchedule(linear_betas(1000), clip=math.inf)
    plan = build_plan(schedule, sampler, 1, eta=1.0, timesteps=[700])
    assert plan.timesteps == (700,)
    x, out = noise(0), noise(1)
    a_x, a_o, c_x, c_0, c_p, c_n = values(plan.table[0], "a_x a_o c_x c_0 c_p c_n")
    x0_pred = predict_x0(schedule, x, torch.tensor([700, 700]), out)
    torch.testing.assert_close(c_x * x + c_0 * (a_x * x + a_o * out), x0_pred)
    assert (c_x, c_0, c_p, c_n) == (0, 1, 0, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_network_arrives_from_any_noise(sampler: str) -> None:
    # With x₀ known, every step must lead x to √ᾱ' x₀ + √(1 − ᾱ') ε.
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_plan(schedule, sampler, 25)
    x0 = 0.5
    following = np.append(schedule.alphas_cumprod[list(plan.timesteps[1:])], 1.0)
    for t, row, ac in zip(plan.timesteps, plan.table, following, strict=True):
        mean = schedule.alphas_cumprod[t] ** 0.5 * x0
        x0s = row["c_0"] + row["c_u"] + row["c_p"]
        assert row["c_x"] * mean + x0s * x0 == pytest.approx(ac**0.5 * x0, abs=1e-12)
        variance = row["c_x"] ** 2 * (1 - schedule.alphas_cumprod[t]) + row["c_n"] ** 2
        assert variance == pytest.approx(1 - ac, abs=1e-12)


@st.composite
def plans(draw: st.DrawFn) -> tuple[NoiseSchedule, Plan]:
    schedule = NoiseSchedule.from_diffusers(
        {
            "num_train_timesteps": draw(st.sampled_from([10, 1000])),
            "beta_schedule": draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
            "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
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
    assert np.isfinite(matrix(plan)).all()
    assert plan.table.dtype == ROW
    assert (np.diff(plan.table["t"]) < 0).all()
    assert plan.timesteps == tuple(plan.table["t"])
    assert values(plan.table[-1], "c_x c_0 c_u c_p c_n") == [0, 1, 0, 0, 0]
    assert plan.table["c_p"][0] == 0, "there is no previous x₀ yet"
    assert (plan.table["c_n"] >= 0).all()
    assert 1 <= len(plan) <= schedule.timesteps
    assert (plan.table["clip"] == schedule.clip).all()


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "logsnr"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_plan_from_pure_noise_is_finite(sampler: str, spacing: Spacing) -> None:
    """ᾱ_T = 0: the first step goes to √ᾱ' x₀ + √(1 − ᾱ') times what is noise already, guided by nothing."""
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(1000)), prediction_type="v_prediction")
    guidance = Guidance(3.0, classifier_scale=2.0)
    for steps in (1, 2, 20, 1000):
        plan = build_plan(schedule, sampler, steps, eta=1.0, spacing=spacing, guidance=guidance)
        assert np.isfinite(matrix(plan)).all()
        if plan.timesteps[0] == 999:
            assert values(plan.table[0], "a_x a_o a_g") == [0, -1, 0]
    up = build_inversion(schedule, 20, spacing=spacing)
    assert np.isfinite(columns(up, "a_x a_o c_x c_0")).all()
    bounded = build_plan(schedule, sampler, 20, spacing=spacing, guidance=Guidance(3.0, (0.0, 100.0)))
    assert bounded.evaluations[0] == 1, "σ is infinite there"
    jumps = build_repaint(schedule, "ddim", 9, jump_length=3, jump_n_sample=2, spacing=spacing)
    assert np.isfinite(columns(jumps, "c_x c_0 c_u c_n k_0 k_n")).all()


@given(t=st.integers(0, 999), x0=st.floats(-1, 1), eps=st.floats(-4, 4))
def test_the_parametrisations_agree_on_x0(t: int, x0: float, eps: float) -> None:
    predictions = []
    for kind in PREDICTION_TYPES:
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
        predictions.append(row["a_x"] * x + row["a_o"] * float(out))
    assert predictions == pytest.approx([x0] * len(PREDICTION_TYPES), abs=1e-9)


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


# ── Guidance as columns ────────────────────────────────────────────────────────────────────────


def test_guidance_outside_its_interval_costs_one_evaluation() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_plan(schedule, "ddim", 50, guidance=Guidance(3.0, (0.3, 5.0), classifier_scale=2.0))
    sigma = np.sqrt(1 / schedule.alphas_cumprod[list(plan.timesteps)] - 1)
    inside = (sigma >= 0.3) & (sigma <= 5.0)
    assert 5 < inside.sum() < 45
    assert plan.evaluations == tuple(np.where(inside, 2, 1))
    np.testing.assert_array_equal(plan.table["w"], np.where(inside, 3.0, 1.0))
    np.testing.assert_array_equal(plan.table["a_g"] != 0, inside)
    left = plan.remaining
    assert left[0] == sum(plan.evaluations)
    assert left[-1] == 0
    assert [before - after for before, after in pairwise(left)] == list(plan.evaluations)


def test_a_learned_variance_has_the_small_and_the_large_one_as_ends() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    kinds: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "learned_range")
    small, large, learned = (build_plan(schedule, "ddpm", 40, variance=kind).table for kind in kinds)
    np.testing.assert_array_equal(learned["c_n"], small["c_n"])
    np.testing.assert_allclose(
        learned["c_n"][:-1] * np.exp(learned["c_v"][:-1]), large["c_n"][:-1], rtol=1e-12
    )
    assert not small["c_v"].any()
    assert not large["c_v"].any()


# ── Other plans ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("strength", "rows"), [(1.0, 20), (0.5, 10), (0.01, 1), (0.13, 3)])
def test_an_edit_is_the_end_of_a_chain(strength: float, rows: int) -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    whole, part = (build_plan(schedule, "ddim", 20, strength=s) for s in (1.0, strength))
    np.testing.assert_array_equal(part.table, whole.table[20 - rows :])
    start = 0.0 if strength == 1 else schedule.alphas_cumprod[part.timesteps[0]] ** 0.5
    assert part.start == pytest.approx(start)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.1, math.nan])
def test_a_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        build_plan(NoiseSchedule(linear_betas(1000)), "ddim", 20, strength=strength)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_inversion_leads_to_the_noise_that_leads_back(spacing: Any) -> None:
    schedule = NoiseSchedule(linear_betas(1000), clip=math.inf)
    up, down = (
        build_inversion(schedule, 250, spacing=spacing),
        build_plan(schedule, "ddim", 250, spacing=spacing),
    )
    assert (np.diff(up.table["t"]) > 0).all()
    image, deviation = noise(3).clamp(-1, 1), 0.5

    def run(plan: Plan, x: Tensor) -> Tensor:
        """With the network that is right for images of independent normal pixels."""
        for row in plan.table:
            ac = float(schedule.alphas_cumprod[int(row["t"])])
            x0 = ac**0.5 * deviation**2 / (ac * deviation**2 + 1 - ac) * x
            eps = (x - ac**0.5 * x0) / (1 - ac) ** 0.5
            x = row["c_x"] * x + row["c_0"] * (row["a_x"] * x + row["a_o"] * eps)
        return x

    top = run(up, image)
    torch.testing.assert_close(top, image / deviation, rtol=0.03, atol=0)  # the exact flow stretches them
    torch.testing.assert_close(run(down, top), image, rtol=0.03, atol=0)


def test_inversion_keeps_a_perfect_network_on_its_path() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_inversion(schedule, 20)
    assert plan.start == 1.0
    levels = schedule.alphas_cumprod[np.append(plan.table["t"].astype(int)[1:], 950)]
    for row, ac in zip(plan.table, levels, strict=True):
        here = schedule.alphas_cumprod[int(row["t"])]
        x0, eps = 0.3, -0.7
        x = here**0.5 * x0 + (1 - here) ** 0.5 * eps
        assert row["c_x"] * x + row["c_0"] * x0 == pytest.approx(ac**0.5 * x0 + (1 - ac) ** 0.5 * eps)


def test_repaint_goes_down_with_jumps_back_up() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_repaint(schedule, "ddpm", 6, jump_length=2, jump_n_sample=3)
    t = build_plan(schedule, "ddpm", 6).timesteps  # levels 6 … 1
    level = {6 - i: timestep for i, timestep in enumerate(t)}
    down = [6, 5, 4, 3, 4, 3, 4, 3, 2, 1, 2, 1, 2, 1]
    assert plan.timesteps == tuple(level[i] for i in down)
    without = build_repaint(schedule, "ddpm", 6, jump_length=2, jump_n_sample=1)
    np.testing.assert_array_equal(without.table, build_plan(schedule, "ddpm", 6).table)


def test_a_jump_is_the_forward_process() -> None:
    """With x₀ known, x has the mean and variance of its level after every row, jumps included."""
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_repaint(schedule, "ddpm", 9, jump_length=3, jump_n_sample=2)
    x0 = 0.5
    after = np.append(schedule.alphas_cumprod[list(plan.timesteps[1:])], 1.0)
    for t, row, ac in zip(plan.timesteps, plan.table, after, strict=True):
        here = schedule.alphas_cumprod[t]
        assert row["c_x"] * here**0.5 * x0 + row["c_0"] * x0 == pytest.approx(ac**0.5 * x0, abs=1e-12)
        assert row["c_x"] ** 2 * (1 - here) + row["c_n"] ** 2 == pytest.approx(1 - ac, abs=1e-12)
        assert row["k_0"] ** 2 == pytest.approx(ac)
        assert row["k_n"] ** 2 == pytest.approx(1 - ac)


@pytest.mark.parametrize(
    ("sampler", "options", "reason"),
    [
        ("dpmpp_2m", {}, "jumps need a sampler"),
        ("ddpm", {"jump_length": 0}, "at least 1"),
        ("ddpm", {"jump_n_sample": 0}, "at least 1"),
    ],
)
def test_jumps_that_make_no_sense_are_refused(sampler: str, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_repaint(NoiseSchedule(linear_betas(1000)), sampler, 10, **options)  # type: ignore[arg-type]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5))
def test_the_length_of_a_repaint_is_known_beforehand(steps: int, length: int, n_sample: int) -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_repaint(schedule, "ddim", steps, jump_length=length, jump_n_sample=n_sample)
    assert len(plan) == repaint_steps(steps, length, n_sample)


def test_without_a_bound_there_is_one_x0() -> None:
    schedule = NoiseSchedule(linear_betas(1000), dynamic_thresholding_ratio=0.9)
    plan = build_plan(schedule, "ddim", 5, strength=0.5)
    loose = plan.unclipped()
    assert np.isinf(loose.table["clip"]).all()
    assert not columns(loose, "q c_u").any()
    assert plan.table["q"].all()
    assert plan.table["c_u"][:-1].all()
    assert loose.start == plan.start
    np.testing.assert_array_equal(loose.table["c_0"], plan.table["c_0"] + plan.table["c_u"])
    same = [name for name in COLUMNS if name not in ("clip", "q", "c_0", "c_u")]
    np.testing.assert_array_equal(columns(loose, " ".join(same)), columns(plan, " ".join(same)))
    unbounded = build_plan(replace(schedule, dynamic_thresholding_ratio=0.0, clip=math.inf), "ddim", 5)
    assert not unbounded.table["c_u"].any(), "no need of the other one"


def test_a_measurement_does_not_use_its_predictions() -> None:
    schedule = NoiseSchedule(linear_betas(1000))
    plan = build_measurement(schedule, [5, 900, 5])
    assert plan.timesteps == (5, 900, 5)
    assert not columns(plan, "c_x c_0 c_p c_n c_v a_g").any()
    ac = schedule.alphas_cumprod
    assert plan.start == pytest.approx(ac[5] ** 0.5)
    np.testing.assert_allclose(plan.table["k_0"], [ac[900] ** 0.5, ac[5] ** 0.5, 1.0])
    for wrong in ([], [1000], [-1]):
        with pytest.raises(ValueError, match="timesteps"):
            build_measurement(schedule, wrong)
