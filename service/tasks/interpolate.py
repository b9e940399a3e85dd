"""`/interpolate`: a path from one image to another (Ho et al. 2020, §4.4 and Fig. 8).

Decoding pictures takes time: call `prepare_interpolation` away from the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from model.chain import Chain, Image, InitialLatent, SphericalMix, from_pixels, noised
from model.interpolation import linear, mixed, spherical
from model.samplers import build_inversion
from service.engine.jobs import Stage
from service.errors import InvalidRequestError
from service.tasks.per_image import Label, Seed
from service.tasks.sampling import (
    ModelCapabilities,
    PreparedRequest,
    Sampler,
    SamplingParams,
    SamplingRequest,
    check_count,
    refuse_condition,
    refuse_distilled,
    refuse_fields,
    resolve,
    sampling_request,
)
from service.tasks.uploads import Upload, decode, unpack

DEFAULT_POINTS = 9
DEFAULT_STRENGTH = 0.5
"""Of a stochastic interpolation: t = 500 of 1000, as in Fig. 8 of Ho et al. 2020."""
DEFAULT_INVERSION_STEPS = 100
"""After which real clothes come back within about 4 levels of 255 on average; after 50, within 8."""
DETERMINISTIC = ("ddim", "dpmpp_2m")

Method = Literal["stochastic", "inversion"]


class InterpolateRequest(SamplingRequest):
    """The fields of `POST /interpolate`: two pictures or two seeds, and the points between them."""

    seed: Seed | None = Field(None, description="of the noise in every step; random if absent")
    class_label: Label | None = Field(None, description="class index or name; absent: unconditional")
    images: tuple[Upload, Upload] | None = Field(None, description="two pictures, as for /edit")
    seeds: tuple[Seed, Seed] | None = Field(None, description="or two seeds, each standing for its image")
    points: int | None = Field(None, ge=2, description="images, with λ evenly from 0 to 1")
    method: Method | None = Field(
        None,
        description="of pictures: stochastic (noise both, mix linearly, denoise) or inversion"
        " (invert both by DDIM, mix spherically, denoise)",
    )
    sampler: Sampler | None = Field(
        None, description="absent: ddim; any for stochastic, ddim or dpmpp_2m for seeds, ddim for inversion"
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="stochastic: fraction of the steps that is run, from the noisy mix"
    )


def prepare_interpolation(request: InterpolateRequest, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job with an image for each point of a path.

    All of them have the same noise in every step, that of `seed`, so that the path is smooth. Raises
    InvalidRequestError.
    """
    refuse_condition(capabilities)
    points = request.points or min(DEFAULT_POINTS, capabilities.max_images)
    check_count("points", max(2, points), capabilities)
    if (request.images is None) == (request.seeds is None):
        raise InvalidRequestError("images", "Either two images or two seeds are needed.")
    shares = [i / (points - 1) for i in range(points)]
    if request.images is None:
        params, stages, reported = _between_seeds(request, shares, capabilities)
    elif request.method == "inversion":
        params, stages, reported = _by_inversion(request, shares, capabilities)
    else:
        params, stages, reported = _stochastic(request, shares, capabilities)
    return sampling_request(
        request,
        params,
        stages,
        capabilities,
        reported=reported,
        per_image=[{"lambda": share} for share in shares],
        columns=points,
    )


Path = tuple[SamplingParams, Sequence[Stage], dict[str, Any]]
"""Parameters, stages, and the parameters that only this method reports."""


def _stochastic(
    request: InterpolateRequest, shares: Sequence[float], capabilities: ModelCapabilities
) -> Path:
    """Both images under noise, the same for every λ (of `seed` and `seed` + 1), mixed linearly, denoised.

    As in the paper the noise is mixed too, so that its variance falls to a half in the middle.
    """
    strength = request.strength or DEFAULT_STRENGTH
    params = resolve(request, capabilities, request.sampler or "ddim", 2)
    plan = params.plan(capabilities.schedule, strength=strength)
    ends = [
        noised(plan, image, seed) for seed, image in enumerate(_decoded(request, capabilities), params.seed)
    ]
    chains = [Chain(plan, params.seed, params.label, mixed(linear(share), ends)) for share in shares]
    reported = {"method": "stochastic", "points": len(shares), "strength": strength}
    return params, [Stage("denoise", tuple(chains))], reported


def _between_seeds(
    request: InterpolateRequest, shares: Sequence[float], capabilities: ModelCapabilities
) -> Path:
    """From a spherical mix of two starting noises, which is noise of variance 1 (Song et al. 2021, §5.3)."""
    assert request.seeds is not None
    first, second = request.seeds
    reason = "It applies to images, not to seeds."
    refuse_fields(reason, seed=request.seed, method=request.method, strength=request.strength)
    _check_deterministic(request, DETERMINISTIC)
    if first == second:
        raise InvalidRequestError("seeds", "The two seeds must differ.")
    params = resolve(request.model_copy(update={"seed": first}), capabilities, request.sampler or "ddim")
    plan = params.plan(capabilities.schedule)
    ends = [InitialLatent(noises=((1.0, seed),)) for seed in (first, second)]
    chains = [Chain(plan, first, params.label, mixed(spherical(share), ends)) for share in shares]
    return params, [Stage("denoise", tuple(chains))], {"points": len(shares), "seeds": [first, second]}


def _by_inversion(
    request: InterpolateRequest, shares: Sequence[float], capabilities: ModelCapabilities
) -> Path:
    """Both images inverted to the noise they come from; spherical mixes of that, denoised.

    Nothing is guided, and nothing clipped, or denoising would not undo the inversion. At the ends the images
    come back but for the discretisation error, which falls with the number of steps.
    """
    refuse_distilled(capabilities, "method", "has no way up to invert pictures by")
    refuse_fields("An inversion always runs all steps.", strength=request.strength)
    _check_deterministic(request, ("ddim",))
    if request.guidance_scale not in (None, 1.0) or request.classifier_scale:
        name = "classifier_scale" if request.classifier_scale else "guidance_scale"
        raise InvalidRequestError(name, "An inversion cannot be guided.")
    schedule = capabilities.schedule
    steps = request.num_inference_steps or min(DEFAULT_INVERSION_STEPS, schedule.timesteps)
    unguided = request.model_copy(update={"guidance_scale": 1.0, "num_inference_steps": steps})
    params = resolve(unguided, capabilities, "ddim")
    if params.steps < 2:
        raise InvalidRequestError("num_inference_steps", "An inversion needs at least 2 steps.")
    up = build_inversion(schedule, params.steps, spacing=params.spacing)
    down = params.plan(schedule).unclipped()
    inverted = [
        Chain(up, params.seed, params.label, InitialLatent(((1.0, image),)))
        for image in _decoded(request, capabilities)
    ]
    denoised = [
        Chain(down, params.seed, params.label, InitialLatent(carried=SphericalMix(0, 1, share)))
        for share in shares
    ]
    stages = Stage("invert", tuple(inverted)), Stage("denoise", tuple(denoised))
    return params, stages, {"method": "inversion", "points": len(shares)}


def _decoded(request: InterpolateRequest, capabilities: ModelCapabilities) -> list[Image]:
    files = [unpack(upload, "images") for upload in request.images or ()]
    data_range = capabilities.schedule.data_range
    return [from_pixels(decode(data, capabilities.shape, "images"), data_range) for data in files]


def _check_deterministic(request: InterpolateRequest, samplers: Sequence[str]) -> None:
    if request.sampler not in (None, *samplers):
        raise InvalidRequestError("sampler", f"This path needs the sampler {' or '.join(samplers)}.")
    if request.eta:
        raise InvalidRequestError("eta", "This path is deterministic: η must be 0.")
