"""`/edit`: images from a picture, all of it or where a mask says so.

Decoding pictures takes time: call `prepare_edit` away from the event loop.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, ValidationInfo

from model.chain import Chain, Image, KnownPixels, from_pixels, noised
from model.condition import assemble
from model.samplers import SINGLE_STEP, Guidance, Plan, build_repaint, repaint_steps
from model.schedule import NoiseSchedule
from service.engine.jobs import Stage
from service.errors import InvalidRequestError
from service.tasks.sampling import (
    COUNT,
    ImageCount,
    ModelCapabilities,
    PreparedRequest,
    Sampler,
    SamplingParams,
    SamplingRequest,
    image_count,
    refuse_fields,
    resolve,
    sampling_request,
)
from service.tasks.uploads import Upload, decode, decode_masked, unpack

DEFAULT_STRENGTH = 0.6
DEFAULT_JUMP_LENGTH = 10
DEFAULT_JUMP_N_SAMPLE = 5
"""With which inpainting costs less than five plain chains, whatever the number of steps."""
MAX_STEPS = 10_000
"""Of one image, jumps included: enough for a thousand with RePaint's own jumps."""


def _given(mask: object, info: ValidationInfo) -> object:
    return None if mask == "" and info.mode == "python" else mask  # a form's input that was left empty


class EditRequest(SamplingRequest):
    """The fields of `POST /edit`: a picture, and how much of it (strength) or what (mask) is to change."""

    image: Upload = Field(description="PNG, JPEG, WebP or .npy; cropped and resized to the model's size")
    mask: Annotated[Upload | None, BeforeValidator(_given)] = Field(
        None, description="a picture of the same size: white is regenerated, black is kept"
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the steps that is run, from the picture under noise (SDEdit)",
    )
    n: ImageCount | None = Field(None, description=COUNT)
    sampler: Sampler | None = Field(
        None,
        description="absent: ddpm with a mask, else ddim; a mask without strength takes no "
        "other. A model that makes pictures from a picture: as for /generate",
    )
    jump_length: int | None = Field(
        None, ge=1, description="RePaint, for a mask without strength: steps that a jump goes back up"
    )
    jump_n_sample: int | None = Field(
        None, ge=1, description="RePaint: how often each segment between jumps is run; 1 is no jumps"
    )


def prepare_edit(request: EditRequest, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job that changes a picture, all of it or where a mask says so.

    Without a mask, SDEdit (Meng et al. 2022): from the picture under noise, the last `strength` of the steps.
    With a mask alone, RePaint (Lugmayr et al. 2022): from pure noise, with jumps. With both, SDEdit whose
    known pixels are restored after every step; no jumps are needed, since the regenerated part began as the
    picture. Known pixels come back exactly. A network that takes the picture beside x (model/condition.py)
    is given it, and begins with noise. Raises InvalidRequestError.
    """
    count = image_count(request.n, request, capabilities)
    if capabilities.condition:
        return _conditioned(request, count, capabilities)
    inpainting = request.mask is not None and request.strength is None
    if not inpainting:
        reason = "It applies only to a mask without strength."
        refuse_fields(reason, jump_length=request.jump_length, jump_n_sample=request.jump_n_sample)
    # The regenerated part has to come to agree with the known pixels: fresh noise in every step allows it.
    distilled = capabilities.schedule.distilled
    sampler = request.sampler or ("ddim" if request.mask is None or distilled else "ddpm")
    params = resolve(request, capabilities, sampler, count)
    reported: dict[str, Any] = {"n": count, "masked": request.mask is not None}
    jumps = _jumps(request, params, capabilities) if inpainting else {}
    strength = request.strength or DEFAULT_STRENGTH
    reported |= jumps if inpainting else {"strength": strength}
    schedule = capabilities.schedule
    plans = {
        guidance: _repaint(params, guidance, jumps, schedule)
        if inpainting
        else params.plan(schedule, guidance, strength)
        for guidance in {params.guidance_of(label) for label in params.labels}
    }
    image, known = _decoded(request, capabilities)
    chains = []
    for seed, label in params.images:
        plan = plans[params.guidance_of(label)]
        start = None if inpainting else noised(plan, image, seed)
        chains.append(Chain(plan, seed, label, start, known))
    stage = Stage("denoise", tuple(chains))
    return sampling_request(request, params, [stage], capabilities, reported=reported)


def _conditioned(request: EditRequest, count: int, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job for a network that was trained to make pictures from a picture, or to fill the hole in one."""
    reason = "This model makes pictures from the picture alone, in all its steps."
    refuse_fields(
        reason,
        strength=request.strength,
        jump_length=request.jump_length,
        jump_n_sample=request.jump_n_sample,
    )
    fills = {"mask", "masked_image"} & {*capabilities.condition}
    if fills and request.mask is None:
        raise InvalidRequestError("mask", "This model fills holes in pictures: a mask is needed.")
    if not fills:
        refuse_fields("This model changes the whole picture.", mask=request.mask)
    params = resolve(request, capabilities, request.sampler or cast("Sampler", capabilities.sampler), count)
    image, known = _decoded(request, capabilities)
    condition = assemble(
        capabilities.condition, image, known.mask if known else None, capabilities.schedule.data_range
    )
    chains = tuple(
        Chain(
            params.plan(capabilities.schedule, params.guidance_of(label)),
            seed,
            label,
            known=known,
            condition=condition,
        )
        for seed, label in params.images
    )
    reported = {"n": count, "masked": known is not None}
    return sampling_request(request, params, [Stage("denoise", chains)], capabilities, reported=reported)


def _decoded(request: EditRequest, capabilities: ModelCapabilities) -> tuple[Image, KnownPixels | None]:
    data = unpack(request.image, "image")
    if request.mask is None:
        return from_pixels(decode(data, capabilities.shape), capabilities.schedule.data_range), None
    pixels, kept = decode_masked(data, unpack(request.mask, "mask"), capabilities.shape)
    image = from_pixels(pixels, capabilities.schedule.data_range)
    return image, KnownPixels(image, kept)


def _repaint(
    params: SamplingParams, guidance: Guidance, jumps: dict[str, Any], schedule: NoiseSchedule
) -> Plan:
    return build_repaint(
        schedule,
        params.sampler,
        params.steps,
        eta=params.eta,
        spacing=params.spacing,
        guidance=guidance,
        **jumps,
    )


def default_jump_length(capabilities: ModelCapabilities) -> int:
    """Of a model with few steps a single one, or there would be no jumps."""
    return 1 if capabilities.schedule.distilled else DEFAULT_JUMP_LENGTH


def _jumps(request: EditRequest, params: SamplingParams, capabilities: ModelCapabilities) -> dict[str, Any]:
    """RePaint's parameters, checked before a table of any length is built from them."""
    if params.sampler not in SINGLE_STEP:
        raise InvalidRequestError("sampler", f"Inpainting needs the sampler {' or '.join(SINGLE_STEP)}.")
    length = request.jump_length or default_jump_length(capabilities)
    n_sample = request.jump_n_sample or DEFAULT_JUMP_N_SAMPLE
    if repaint_steps(params.steps, length, n_sample) > MAX_STEPS:
        raise InvalidRequestError("jump_n_sample", f"A chain has at most {MAX_STEPS} steps, jumps included.")
    return {"jump_length": length, "jump_n_sample": n_sample}
