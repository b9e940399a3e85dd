"""What a diffusers `scheduler_config.json` says: the noise schedule, and the nearest of our samplers.

A scheduler of diffusers is two things. One belongs to the network: β, what its output means, how its x₀
prediction is bounded. That is read, from every class whose network takes a timestep and predicts the noise of
a variance-preserving process, and an option of it that we do not have is refused. The other is a solver, and
ours takes its place: SAMPLERS says which, and options of the solver alone are ignored. Options that choose
other noise levels for it (Karras et al. 2022 and the like) are ignored with a warning. Keys that the class
does not have are ignored by diffusers too, also with a warning; a key that no scheduler has is refused, for
nobody knows what it would have done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.betas import BETAS, Array, ScheduleError, zero_terminal_snr

logger = logging.getLogger(__name__)

MAX_TIMESTEPS = 100_000
"""A hundred times as many as networks are trained with. Tables of them are made before anything is loaded."""
DEFAULT_CLASS = "DDPMScheduler"
DEFAULT_SAMPLER = "dpmpp_2m"


@dataclass(frozen=True)
class Scheduler:
    """A scheduler class of diffusers, as far as it is not like the others.

    sampler: the nearest of ours. options: which of OPTIONAL it has. By default: spacing, its
    `timestep_spacing`; betas, its `beta_start` and `beta_end`; bounded, its `clip_sample`; to_one, its
    `set_alpha_to_one`, or that it ends there without such an option. spare_timestep: as NoiseSchedule's.
    """

    sampler: str
    options: frozenset[str] = frozenset()
    spacing: str = "linspace"
    betas: tuple[float, float] = (1e-4, 0.02)
    bounded: bool = False
    to_one: bool = True
    spare_timestep: bool = False


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _class(sampler: str, options: str, spacing: str = "linspace", **others: Any) -> Scheduler:
    return Scheduler(sampler, _names(options), spacing, **others)


_DDPM = _class(
    DEFAULT_SAMPLER,  # as close to real images in 20 steps as this class is in 1000
    "clip_sample thresholding timestep_spacing steps_offset rescale_betas_zero_snr variance_type",
    "leading",
    bounded=True,
)
_DDIM = _class(
    "ddim",
    "clip_sample thresholding timestep_spacing steps_offset rescale_betas_zero_snr set_alpha_to_one",
    "leading",
    bounded=True,
)
_MULTISTEP = "thresholding timestep_spacing steps_offset"
_SPACED = "timestep_spacing steps_offset"
_LATENT_BETAS = (0.00085, 0.012)
SCHEDULERS: Mapping[str, Scheduler] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDIMInverseScheduler": _class(
        "ddim",
        "clip_sample timestep_spacing steps_offset rescale_betas_zero_snr set_alpha_to_one",
        "leading",
        bounded=True,
    ),
    "RePaintScheduler": _class("dpmpp_2m", "clip_sample", "leading", bounded=True),
    "PNDMScheduler": _class(
        "dpmpp_2m",
        "timestep_spacing steps_offset set_alpha_to_one",
        "leading",
        to_one=False,
    ),
    "DPMSolverMultistepScheduler": _class(
        "dpmpp_2m",
        f"{_MULTISTEP} rescale_betas_zero_snr final_sigmas_type variance_type",
        spare_timestep=True,
    ),
    "DPMSolverMultistepInverseScheduler": _class(
        "dpmpp_2m", f"{_MULTISTEP} variance_type", spare_timestep=True
    ),
    "DPMSolverSinglestepScheduler": _class(
        "dpmpp_2m", "thresholding final_sigmas_type variance_type", spare_timestep=True
    ),
    "DEISMultistepScheduler": _class("dpmpp_2m", _MULTISTEP, spare_timestep=True, to_one=False),
    "UniPCMultistepScheduler": _class(
        "dpmpp_2m", f"{_MULTISTEP} rescale_betas_zero_snr final_sigmas_type", spare_timestep=True
    ),
    "SASolverScheduler": _class(
        "sde_dpmpp_2m", f"{_MULTISTEP} variance_type", spare_timestep=True, to_one=False
    ),
    "DPMSolverSDEScheduler": _class("sde_dpmpp_2m", _SPACED, betas=_LATENT_BETAS),
    # In x / √ᾱ, Euler's method is DDIM with η = 0, and its ancestral form DDPM with the small variance.
    "EulerDiscreteScheduler": _class("ddim", f"{_SPACED} rescale_betas_zero_snr final_sigmas_type"),
    "EulerAncestralDiscreteScheduler": _class("ddpm", f"{_SPACED} rescale_betas_zero_snr"),
    "HeunDiscreteScheduler": _class("dpmpp_2m", f"{_SPACED} clip_sample", betas=_LATENT_BETAS),
    "KDPM2DiscreteScheduler": _class("dpmpp_2m", _SPACED, betas=_LATENT_BETAS),
    "KDPM2AncestralDiscreteScheduler": _class("sde_dpmpp_2m", _SPACED, betas=_LATENT_BETAS),
    "LMSDiscreteScheduler": _class("dpmpp_2m", _SPACED),
}

_IN_SIGMA = "its network takes a noise level σ and scaled input, not a timestep"
_DISTILLED = "its network is distilled to jump to x₀, which none of our samplers does"
_FLOW = "its network predicts the velocity of a flow from data to noise, not of a diffusion process"
UNSUPPORTED: Mapping[str, str] = {
    "KarrasVeScheduler": _IN_SIGMA,
    "ScoreSdeVeScheduler": _IN_SIGMA,
    "EDMEulerScheduler": _IN_SIGMA,
    "EDMDPMSolverMultistepScheduler": _IN_SIGMA,
    "CosineDPMSolverMultistepScheduler": _IN_SIGMA,
    "CMStochasticIterativeScheduler": f"{_IN_SIGMA}, and {_DISTILLED}",
    "ScoreSdeVpScheduler": "its network takes a continuous time from 0 to 1, not a timestep",
    "IPNDMScheduler": "its network takes a continuous time from 0 to 1, not a timestep",
    "DDPMWuerstchenScheduler": "its network takes a continuous time from 0 to 1, not a timestep",
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "SCMScheduler": _DISTILLED,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "VQDiffusionScheduler": "its network predicts tokens, not pixels",
    "AmusedScheduler": "its network predicts tokens, not pixels",
}
"""Classes of diffusers that mean another network, and why."""

COMMON = _names(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type predict_epsilon"
    " data_range timestep_scale distilled_guidance guidance_scale guidance_rescale"
)
"""Read from every class. The last five are ours; `predict_epsilon` is the old form of `prediction_type`."""
OPTIONAL = _names(
    "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value timestep_spacing"
    " steps_offset rescale_betas_zero_snr set_alpha_to_one variance_type final_sigmas_type"
)
"""Read from the classes that have them."""
FLAGS = _names("clip_sample thresholding rescale_betas_zero_snr set_alpha_to_one predict_epsilon")
WHOLE = _names("num_train_timesteps steps_offset")
BELONGING = {
    "clip_sample_range": "clip_sample",
    "dynamic_thresholding_ratio": "thresholding",
    "sample_max_value": "thresholding",
}
"""Which option these are details of."""
OF_SOLVERS = _names(
    "algorithm_type solver_order solver_type solver_p lower_order_final euler_at_final predict_x0"
    " disable_corrector predictor_order corrector_order tau_func skip_prk_steps interpolation_type eta"
    " noise_sampler_seed time_shift_type flow_shift original_inference_steps timestep_scaling s_noise s_churn"
    " s_min s_max rho sigma_data"
)
"""They choose how a class solves, which we do by samplers of ours."""
OF_LEVELS: Mapping[str, object] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "sigma_min": None,
    "sigma_max": None,
}
"""They choose the noise levels that a class visits, where they are not these."""
OF_OTHER_NETWORKS: Mapping[str, object] = {
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "timestep_type": "discrete",
}
"""They mean another network input or process, where they are not these."""
IGNORED = frozenset({"torch_dtype", "dtype"})


def nearest_sampler(config: Mapping[str, Any]) -> str:
    """Which of our samplers is nearest to the scheduler of a config that `read` takes."""
    sampler = SCHEDULERS[_class_name(config)].sampler
    sde = str(config.get("algorithm_type", "")).startswith("sde-")
    return f"sde_{sampler}" if sde and sampler == "dpmpp_2m" else sampler


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `schedule.NoiseSchedule`. Raises ScheduleError on what cannot be followed."""
    name = _class_name(config)
    kind = SCHEDULERS[name]
    _check_keys(config, name, kind)
    known = {key: value for key, value in config.items() if key in COMMON or _has(kind, key)}
    _check_values(known)
    zero_snr = bool(known.get("rescale_betas_zero_snr"))
    predicts_epsilon = known.get("predict_epsilon", True)
    thresholding = bool(known.get("thresholding"))
    if thresholding:  # diffusers clips then, if at all, by this
        clip = float(known.get("sample_max_value", 1.0))
    else:
        clip = (
            float(known.get("clip_sample_range", 1.0)) if known.get("clip_sample", kind.bounded) else math.inf
        )
    return {
        "betas": _betas(known, kind, zero_snr=zero_snr),
        "prediction_type": known.get("prediction_type", "epsilon" if predicts_epsilon else "sample"),
        "clip": clip,
        "dynamic_thresholding_ratio": float(known.get("dynamic_thresholding_ratio", 0.995)) * thresholding,
        "variance_type": _variance_type(config),
        "timestep_spacing": known.get("timestep_spacing", kind.spacing),
        "steps_offset": int(known.get("steps_offset", 0)),
        "spare_timestep": kind.spare_timestep,
        "set_alpha_to_one": _ends_at_one(known, kind),
        "data_range": _data_range(known.get("data_range", (-1.0, 1.0))),
        "timestep_scale": float(known.get("timestep_scale", 1.0)),
        "distilled_guidance": _number_or_none(known.get("distilled_guidance")),
        "guidance_scale": _number_or_none(known.get("guidance_scale")),
        "guidance_rescale": _number_or_none(known.get("guidance_rescale")),
    }


def _class_name(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name", DEFAULT_CLASS)
    if name in UNSUPPORTED:
        raise ScheduleError(f"{name} is not supported: {UNSUPPORTED[name]}")
    if name not in SCHEDULERS:
        raise ScheduleError(f"{name} is not supported (known: {', '.join(SCHEDULERS)})")
    return str(name)


def _has(kind: Scheduler, key: str) -> bool:
    return BELONGING.get(key, key) in kind.options


def _check_keys(config: Mapping[str, Any], name: str, kind: Scheduler) -> None:
    for key, value in config.items():
        if key.startswith("_") or key in COMMON or key in OF_SOLVERS or _has(kind, key):
            continue
        if key in OF_OTHER_NETWORKS:
            if value != OF_OTHER_NETWORKS[key]:
                raise ScheduleError(f"{key}={value!r} is not supported: it changes what the network is given")
        elif key in OF_LEVELS:
            if value is not None and value != OF_LEVELS[key]:
                logger.warning(
                    "%s=%r of %s is ignored: timesteps are spaced by timestep_spacing", key, value, name
                )
        elif key == "variance_type":  # describes the network, whatever the class makes of it
            continue
        elif key in OPTIONAL or key in IGNORED:
            logger.warning("%s=%r is ignored: %s has no such option", key, value, name)
        else:
            raise ScheduleError(
                f"{key}={value!r} is an option of no scheduler; remove it if it means nothing"
            )


def _check_values(config: Mapping[str, Any]) -> None:
    """Raises ScheduleError for what would be taken for another value: "false" is a text, and no false."""
    for key in config.keys() & FLAGS:
        if config[key] not in (True, False, None):
            raise ScheduleError(f"{key}={config[key]!r} must be true or false")
    for key in config.keys() & WHOLE:
        if float(config[key]) != int(config[key]):
            raise ScheduleError(f"{key}={config[key]!r} must be a whole number")


def _betas(config: Mapping[str, Any], kind: Scheduler, *, zero_snr: bool) -> Array:
    timesteps = int(config.get("num_train_timesteps", 1000))
    if not 1 <= timesteps <= MAX_TIMESTEPS:
        raise ScheduleError(f"num_train_timesteps={timesteps} must be from 1 to {MAX_TIMESTEPS}")
    start, end = (
        float(config.get(key, default))
        for key, default in zip(("beta_start", "beta_end"), kind.betas, strict=True)
    )
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif (name := config.get("beta_schedule", "linear")) in BETAS:
        betas = BETAS[name](timesteps, start, end)
    else:
        raise ScheduleError(f"beta_schedule={name!r} is not supported (known: {', '.join(BETAS)})")
    if betas.ndim != 1 or len(betas) < timesteps:
        raise ScheduleError(
            f"trained_betas has the shape {betas.shape} where num_train_timesteps is {timesteps}:"
            " there must be one number for each timestep"
        )
    if zero_snr:
        betas = zero_terminal_snr(betas)
    if len(betas) > timesteps:
        # As diffusers does, which looks up ᾱ at timesteps below num_train_timesteps.
        logger.warning(
            "num_train_timesteps=%d: only as many of the %d trained_betas are used", timesteps, len(betas)
        )
    return betas[:timesteps]


def _variance_type(config: Mapping[str, Any]) -> Any:
    """The variance type by our names.

    The two with `_log` are the same variances by way of their logarithms. Of `fixed_large_log` diffusers
    takes the root of the logarithm, which is not a number, and so it does of `learned`, a logarithm in the
    code that it comes from (Nichol & Dhariwal 2021).
    """
    found = config.get("variance_type")
    if found is None:  # as diffusers' solvers write it
        return "fixed_small"
    return {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}.get(found, found)


def _ends_at_one(config: Mapping[str, Any], kind: Scheduler) -> bool:
    final = config.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise ScheduleError(f"final_sigmas_type={final!r} is not supported (known: zero, sigma_min)")
    return bool(config.get("set_alpha_to_one", kind.to_one)) and final == "zero"


def _number_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def _data_range(value: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise ScheduleError(f"data_range={value!r} must be two numbers, the lower one first") from None
    return low, high
