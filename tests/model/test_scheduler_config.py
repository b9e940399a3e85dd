"""Every scheduler that a pipeline folder carries, against diffusers' own."""

from __future__ import annotations

import ast
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete
from torch import Tensor

from model.diffusion import q_sample
from model.samplers import SAMPLERS, build_plan
from model.schedule import NoiseSchedule, ScheduleError
from model.scheduler_config import (
    BELONGING,
    COMMON,
    OF_LEVELS,
    OF_OTHER_NETWORKS,
    OF_SOLVERS,
    OPTIONAL,
    SCHEDULERS,
    UNSUPPORTED,
    nearest_sampler,
)
from tests.model.reference import SHAPE, Network, assert_same_chain, drive, follow, network, noise

CANNOT_BE_MADE = {"DPMSolverSDEScheduler"}  # without torchsde
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def made(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


def read(scheduler: Any) -> NoiseSchedule:
    """As from the file that diffusers writes."""
    return NoiseSchedule.from_diffusers({**scheduler.config, "_class_name": type(scheduler).__name__})


# ── The table of classes ───────────────────────────────────────────────────────────────────────


@cache
def constructors() -> dict[str, dict[str, Any]]:
    """Options and defaults of every scheduler, from the source: some cannot be imported here."""
    found: dict[str, dict[str, Any]] = {}
    for path in Path(diffusers.schedulers.__file__).parent.rglob("scheduling_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    names = [each.arg for each in inner.args.args][-len(inner.args.defaults) :]
                    written = [ast.unparse(each) for each in inner.args.defaults]
                    found[node.name] = dict(zip(names, written, strict=False))
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_options_of_a_class_are_those_of_its_constructor(name: str) -> None:
    kind, parameters = SCHEDULERS[name], constructors()[name]
    assert kind.options == {key for key in parameters if key in OPTIONAL and key not in BELONGING}
    known = COMMON | OPTIONAL | OF_SOLVERS | OF_LEVELS.keys() | OF_OTHER_NETWORKS.keys()
    assert parameters.keys() <= known, "an option that would be refused"
    defaults = {key: ast.literal_eval(value) for key, value in parameters.items() if "float" not in value}
    assert kind.betas == (defaults["beta_start"], defaults["beta_end"])
    assert kind.bounded == defaults.get("clip_sample", False)
    if "set_alpha_to_one" in defaults:
        assert kind.to_one == defaults["set_alpha_to_one"]
    if "timestep_spacing" in defaults:
        assert kind.spacing == defaults["timestep_spacing"]
    assert kind.sampler in SAMPLERS


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - CANNOT_BE_MADE))
def test_what_a_class_writes_is_read_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = made(name)
    schedule = read(scheduler)
    assert not caplog.records
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=5e-3, atol=1e-6)
    assert schedule.prediction_type == "epsilon"
    assert schedule.bounded == bool(scheduler.config.get("clip_sample"))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 20, 28])
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "SASolverScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_timesteps_are_those_of_the_class(name: str, steps: int, spacing: str) -> None:
    options = {"timestep_spacing": spacing} if "timestep_spacing" in SCHEDULERS[name].options else {}
    scheduler = made(name, **options)
    scheduler.set_timesteps(steps)
    ours = read(scheduler).spaced_timesteps(steps)
    # Those in σ visit fractions of timesteps; ours are whole.
    assert np.abs(ours - scheduler.timesteps.numpy()).max() <= 0.5


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("DDPMScheduler", "dpmpp_2m"),
        ("DDIMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "ddim"),
        ("EulerAncestralDiscreteScheduler", "ddpm"),
        ("PNDMScheduler", "dpmpp_2m"),
        ("SASolverScheduler", "sde_dpmpp_2m"),
    ],
)
def test_the_nearest_sampler(name: str, sampler: str) -> None:
    assert nearest_sampler({"_class_name": name}) == sampler


def test_the_nearest_sampler_follows_the_algorithm() -> None:
    solver = {"_class_name": "DPMSolverMultistepScheduler"}
    assert nearest_sampler({**solver, "algorithm_type": "sde-dpmsolver++"}) == "sde_dpmpp_2m"
    assert nearest_sampler({**solver, "algorithm_type": "dpmsolver++"}) == "dpmpp_2m"
    assert nearest_sampler({"algorithm_type": "sde-dpmsolver++", "_class_name": "DDIMScheduler"}) == "ddim"
    assert nearest_sampler({}) == "dpmpp_2m"


# ── Chains ─────────────────────────────────────────────────────────────────────────────────────

ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2}
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "sigmoid": (20, {"beta_schedule": "sigmoid"}),
    "laplace": (20, {"beta_schedule": "laplace"}),
    "scaled_linear": (20, {"beta_schedule": "scaled_linear"}),
    "cosine": (20, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
    "fixed_small_log": (20, {"variance_type": "fixed_small_log"}),
    "fixed_large": (20, {"variance_type": "fixed_large"}),
    "trained betas": (10, {"trained_betas": np.geomspace(1e-3, 0.1, 50).tolist(), "num_train_timesteps": 50}),
    "more trained betas than timesteps": (
        10,
        {"trained_betas": np.geomspace(1e-4, 0.02, 1000).tolist(), "num_train_timesteps": 100},
    ),
    "one timestep": (1, {"num_train_timesteps": 1}),
    "4000 timesteps": (20, {"num_train_timesteps": 4000}),
    "no bound": (20, {"clip_sample": False}),
    "another bound": (20, {"clip_sample_range": 0.7}),
    "thresholding": (20, THRESHOLDING),
    "thresholding beside a bound": (20, {**THRESHOLDING, "clip_sample": True, "clip_sample_range": 0.1}),
    "thresholding at 1": (20, {"thresholding": True}),
    "zero SNR": (20, ZERO_SNR),
    "zero SNR, x0": (20, {**ZERO_SNR, "prediction_type": "sample"}),
    "offset": (20, {"steps_offset": 1}),
    "linspace": (28, {"timestep_spacing": "linspace"}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_ddpm_follows_diffusers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, options = OPTIONS[case]
    scheduler = made("DDPMScheduler", **options)
    scheduler.set_timesteps(steps)
    schedule = read(scheduler)
    drawn: list[Tensor] = []
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: drawn[-1])

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        drawn.append(z)
        result: Tensor = scheduler.step(out, t, x).prev_sample
        return result

    plan = build_plan(schedule, "ddpm", steps)
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    out = network(schedule)
    assert_same_chain(follow(plan, out), drive(scheduler.timesteps, out, step), within=2e-4)


def test_an_ancestral_chain_ends_in_its_x0() -> None:
    """Where the lowest timestep is not 0, diffusers adds noise to the finished image."""
    schedule = NoiseSchedule.from_diffusers({"variance_type": "fixed_large", "steps_offset": 1})
    assert build_plan(schedule, "ddpm", 20).timesteps[-1] == 1
    assert build_plan(schedule, "ddpm", 20).table["c_n"][-1] == 0


@pytest.mark.parametrize("name", ["fixed_large_log", "learned"])
def test_logarithms_of_variances_are_taken_for_what_they_are(name: str) -> None:
    """Diffusers takes their roots, which are not numbers."""
    schedule = NoiseSchedule.from_diffusers({"variance_type": name})
    plan = build_plan(schedule, "ddpm", 1000)
    if name == "fixed_large_log":
        np.testing.assert_allclose(plan.table["c_n"][:-1], schedule.betas[:0:-1] ** 0.5)
        return
    # A network whose output is log β̃ everywhere does as fixed_small.
    assert schedule.learned_variance
    log_variance = np.log(schedule.posterior_variance("fixed_small")[1:])
    found = plan.table["c_n"][:-1] * np.exp(plan.table["c_v"][:-1] * (log_variance[::-1] + 1) / 2)
    small = build_plan(schedule, "ddpm", 1000, variance="fixed_small")
    np.testing.assert_allclose(found, small.table["c_n"][:-1])


DDIM_OPTIONS = {
    case: given
    for case, given in OPTIONS.items()
    if case not in ("sigmoid", "laplace", "linspace") and "variance_type" not in given[1]
} | {
    "ends at the first α": (20, {"set_alpha_to_one": False}),
    "ends at the first α, offset": (20, {"set_alpha_to_one": False, "steps_offset": 1}),
}


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("case", DDIM_OPTIONS)
def test_ddim_follows_diffusers(case: str, eta: float) -> None:
    steps, options = DDIM_OPTIONS[case]
    scheduler = made("DDIMScheduler", **options)
    scheduler.set_timesteps(steps)
    schedule = read(scheduler)

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        result: Tensor = scheduler.step(out, t, x, eta=eta, variance_noise=z).prev_sample
        return result

    plan = build_plan(schedule, "ddim", steps, eta=eta)
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    out = network(schedule)
    assert_same_chain(follow(plan, out), drive(scheduler.timesteps, out, step), within=2e-4)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_each_step_leads_to_the_next_ones_timestep(spacing: str) -> None:
    """Diffusers' DDIM goes to t − T // steps, which is not where its next step is (its issue 11347)."""
    scheduler = made("DDIMScheduler", timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(7)
    schedule = read(scheduler)
    plan = build_plan(schedule, "ddim", 7)
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    x0, eps = 0.5 * torch.ones(SHAPE).double(), noise(-1)

    def at(t: int) -> Tensor:
        return q_sample(schedule, x0, torch.tensor([t, t]), eps)

    ours, theirs = at(plan.timesteps[0]), at(plan.timesteps[0])
    for row, t, following in zip(plan.table, plan.timesteps, plan.timesteps[1:], strict=False):
        x0_pred = row["a_x"] * ours + row["a_o"] * eps
        ours = row["c_x"] * ours + (row["c_0"] + row["c_u"]) * x0_pred
        theirs = scheduler.step(eps, t, theirs).prev_sample
        torch.testing.assert_close(ours, at(following))
    assert (theirs - at(plan.timesteps[-1])).abs().max() > 0.01


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"final_sigmas_type": "sigma_min"},
        {**THRESHOLDING, "variance_type": "learned_range"},
        ZERO_SNR,
        {**ZERO_SNR, "prediction_type": "sample"},
    ],
)
def test_dpm_solvers_follow_diffusers(algorithm: str, steps: int, options: dict[str, Any]) -> None:
    scheduler = made("DPMSolverMultistepScheduler", algorithm_type=algorithm, **options)
    scheduler.set_timesteps(steps)
    schedule = read(scheduler)
    scheduler.register_to_config(variance_type=None)  # it would cut the output to three channels

    def step(out: Tensor, t: int, x: Tensor, z: Tensor) -> Tensor:
        result: Tensor = scheduler.step(out, t, x, variance_noise=z).prev_sample
        return result

    plan = build_plan(
        schedule, nearest_sampler(dict(scheduler.config, _class_name=type(scheduler).__name__)), steps
    )
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    out = network(schedule)
    assert_same_chain(follow(plan, out), drive(scheduler.timesteps, out, step), within=5e-4)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (28, {}),
        (20, {"timestep_spacing": "leading", "steps_offset": 1}),
        (20, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        (20, {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
        (20, ZERO_SNR),
    ],
)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_eulers_methods_are_ddim_and_ddpm(
    name: str, steps: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "EulerAncestralDiscreteScheduler":
        options = {key: value for key, value in options.items() if key != "final_sigmas_type"}
    scheduler = made(name, **options)
    scheduler.set_timesteps(steps)
    schedule = read(scheduler)
    drawn: list[Tensor] = []
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: drawn[-1])
    out = network(schedule)
    sigmas = scheduler.sigmas.double()
    scaled, theirs = noise(-1) * (1 + sigmas[0] ** 2) ** 0.5, []
    for row, t in enumerate(scheduler.timesteps):
        drawn.append(noise(row))
        x = scheduler.scale_model_input(scaled, t)
        scaled = scheduler.step(out(x, int(t)), t, scaled).prev_sample.double()
        theirs.append(scaled / (1 + sigmas[row + 1] ** 2) ** 0.5)
    plan = build_plan(schedule, nearest_sampler({"_class_name": name}), steps)
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    ours = follow(plan, out)
    if options == ZERO_SNR:  # theirs begins at σ = 4096 instead of infinity, which is soon forgotten
        ours, theirs = ours[-1:], theirs[-1:]
    assert_same_chain(ours, theirs, within=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_other_solvers_lead_to_the_same_image(name: str) -> None:
    """They follow the same probability flow, here that of pixels of deviation 0.5."""
    scheduler = made(name, num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(50)
    schedule = read(scheduler)

    def out(x: Tensor, ac: float) -> Tensor:
        return x * (math.sqrt(1 - ac) / (ac * 0.25 + 1 - ac))

    in_sigmas = name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler")
    theirs = noise(-1) * (float(scheduler.init_noise_sigma) if in_sigmas else 1.0)
    known = torch.from_numpy(schedule.alphas_cumprod)
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(theirs, t)
        ac = float(np.interp(float(t), np.arange(1000), known))
        theirs = scheduler.step(out(x, ac), t, theirs).prev_sample.double()
    plan = build_plan(schedule, nearest_sampler({"_class_name": name}), 50)
    exact: Network = lambda x, t: out(x, float(known[t]))  # noqa: E731
    ours = follow(plan, exact)[-1]
    # Second order is coarse where so many levels lie between the two lowest timesteps, in diffusers too.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.07)
    assert theirs.abs().max() > 1


# ── What cannot be followed ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*UNSUPPORTED, "SomebodysScheduler"])
def test_a_class_of_another_network_is_refused_by_name(name: str) -> None:
    assert name == "SomebodysScheduler" or name in constructors()
    with pytest.raises(ScheduleError, match=f"{name} is not supported"):
        NoiseSchedule.from_diffusers({"_class_name": name})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type='continuous'",
        ),
        ({"noise_offset": 0.1}, "noise_offset=0.1"),
        ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps is 1000"),
        ({"trained_betas": [[0.1]], "num_train_timesteps": 1}, "trained_betas"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"rescale_betas_zero_snr": True}, "ᾱ_T = 0"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "ᾱ_T = 0"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "at least 2 timesteps"),
        ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "half"}, "final_sigmas_type='half'"),
        ({"_class_name": "DEISMultistepScheduler", "prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 99.5}, "dynamic_thresholding_ratio=99.5"),
        ({"data_range": [1, 0]}, "data_range"),
        ({"data_range": 1}, "data_range=1"),
        ({"timestep_scale": 0}, "timestep_scale=0"),
        ({"clip_sample": "false"}, "clip_sample='false' must be true or false"),
        ({"num_train_timesteps": 100.5}, "num_train_timesteps=100.5 must be a whole number"),
        ({"steps_offset": 0.5}, "steps_offset=0.5 must be a whole number"),
    ],
)
def test_an_option_that_changes_the_network_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ScheduleError, match=named):
        NoiseSchedule.from_diffusers(options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"_class_name": "PNDMScheduler", "clip_sample": True}, "clip_sample=True is ignored: PNDMScheduler"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False is ignored: DDPMScheduler"),
        ({"torch_dtype": "float16"}, "torch_dtype='float16' is ignored"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 2}, "2: only as many of the 3"),
    ],
)
def test_an_option_without_effect_is_named(
    options: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    NoiseSchedule.from_diffusers(options)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert named in caplog.text


def test_options_of_solvers_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    schedule = NoiseSchedule.from_diffusers(
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "_diffusers_version": "0.42.0",
            "solver_order": 3,
            "lower_order_final": False,
            **OF_LEVELS,
            **OF_OTHER_NETWORKS,
        }
    )
    assert not caplog.records
    assert schedule.clip == math.inf
    assert schedule.spare_timestep


def test_our_own_options_are_read() -> None:
    schedule = NoiseSchedule.from_diffusers({"data_range": [0.0, 1.0], "timestep_scale": 0.25})
    assert schedule.data_range == (0.0, 1.0)
    assert schedule.timestep_scale == 0.25
