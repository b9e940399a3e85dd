"""Requests that begin with pictures: edits, and ways between two images. Their wire models, and their jobs.

Decoding pictures takes time, so `to_edit` and `to_interpolation` are to be called away from an event loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, WithJsonSchema

from model.denoiser import Chain, Image, Known, Mix, from_pixels, noised
from model.interpolation import angle_between, linear, mixed, spherical
from model.samplers import ONE_STEP, build_inversion, build_repaint, repaint_rows
from service.errors import InvalidRequestError
from service.events import Picture
from service.jobs import Job, Sequel
from service.schemas import (
    MAX_SEED,
    Catalogue,
    ChainRequest,
    Images,
    Order,
    Sampler,
    Terms,
    check_count,
    settle,
    to_order,
)
from service.uploads import FORMATS, MAX_PIXELS, decode, decode_masked, unpack

DEFAULT_STRENGTH = 0.6
DEFAULT_JUMP_LENGTH = 10
DEFAULT_JUMP_N_SAMPLE = 5
"""With which an inpainting costs less than five plain chains, whatever its steps."""
MAX_ROWS = 10_000
"""Steps of one image, jumps included: enough for a thousand with RePaint's own jumps."""
DEFAULT_POINTS = 9
DEFAULT_NOISE = 0.5
"""The strength of a stochastic interpolation: t = 500 of 1000, as in Fig. 8 of Ho et al. 2020."""
DEFAULT_INVERSION_STEPS = 100
"""After which real clothes come back within about 4 levels of 255 on average; after 50, within 8."""
DETERMINISTIC = ("ddim", "dpmpp_2m")

Upload = Annotated[
    str | bytes,
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}),
]
"""A PNG, JPEG or WebP: in JSON as base64 or a data URL, in a form as a file too."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Method = Literal["stochastic", "inversion"]


class EditRequest(ChainRequest):
    """What `POST /edit` takes: a picture, and how much (strength) or what (mask) of it is made anew."""

    image: Upload = Field(description="PNG, JPEG or WebP; cropped and resized to the model's size")
    mask: Upload | None = Field(
        None, description="a picture of the same size: what is white is made anew, what is black is kept"
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="share of the steps that is done, from the picture under noise (SDEdit)"
    )
    n: Images = 1
    sampler: Sampler | None = Field(
        None, description="absent: ddpm with a mask, else ddim. A mask without strength takes no other"
    )
    jump_length: int | None = Field(
        None, ge=1, description="RePaint, for a mask without strength: steps that a jump goes back up"
    )
    jump_n_sample: int | None = Field(
        None, ge=1, description="RePaint: how often each such stretch is done; 1 is no jumps"
    )


class InterpolateRequest(ChainRequest):
    """What `POST /interpolate` takes: two pictures or two seeds, and how many points between them."""

    images: tuple[Upload, Upload] | None = Field(None, description="two pictures, as for /edit")
    seeds: tuple[Seed, Seed] | None = Field(None, description="or two seeds: between what they alone give")
    points: int | None = Field(None, ge=2, description="images, with λ evenly from 0 to 1")
    method: Method | None = Field(
        None,
        description="of pictures: stochastic (both under noise, mixed linearly, denoised) or inversion"
        " (both run up by DDIM, mixed spherically, run down again)",
    )
    sampler: Sampler | None = Field(
        None, description="absent: ddim; any for stochastic, ddim or dpmpp_2m for seeds, ddim for inversion"
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of stochastic: share of the steps that is done from the mix under noise",
    )


def editing(catalogue: Catalogue) -> dict[str, Any]:
    """What `/info` says about editing."""
    return {
        "pictures": {"formats": [name.lower() for name in FORMATS], "max_pixels": MAX_PIXELS},
        "edit": {"strength": DEFAULT_STRENGTH},
        "inpainting": {
            "samplers": list(ONE_STEP),
            "jump_length": DEFAULT_JUMP_LENGTH,
            "jump_n_sample": DEFAULT_JUMP_N_SAMPLE,
            "max_rows": MAX_ROWS,
        },
        "interpolation": {
            "methods": list(get_args(Method)),
            "points": min(DEFAULT_POINTS, catalogue.max_images),
            "strength": DEFAULT_NOISE,
            "inversion_steps": min(DEFAULT_INVERSION_STEPS, catalogue.schedule.timesteps),
        },
    }


# ── Edits ──────────────────────────────────────────────────────────────────────────────────────


def to_edit(request: EditRequest, catalogue: Catalogue, *, streamed: bool) -> Order:
    """A job that makes a picture anew, wholly or where a mask says so.

    Without a mask, SDEdit (Meng et al. 2022): from the picture under noise, the last `strength` of the steps.
    With a mask alone, RePaint (Lugmayr et al. 2022): from noise all the way, with jumps. With both, SDEdit
    whose known pixels are put back after every step, which needs no jumps: what is to be made has begun as
    what was there. Known pixels come back exactly. Raises InvalidRequestError.
    """
    check_count("n", request.n, catalogue)
    inpainting = request.mask is not None and request.strength is None
    if not inpainting:
        needs = "It belongs to a mask without strength."
        _refuse(needs, jump_length=request.jump_length, jump_n_sample=request.jump_n_sample)
    # What is made has to come to agree with what is known: fresh noise in every step lets it.
    sampler = request.sampler or ("ddim" if request.mask is None else "ddpm")
    terms = settle(request, catalogue, sampler, request.n)
    told: dict[str, Any] = {"n": request.n, "masked": request.mask is not None}
    if inpainting:
        told |= _jumps(request, terms)
        jumps = {"jump_length": told["jump_length"], "jump_n_sample": told["jump_n_sample"]}
        plan = build_repaint(
            catalogue.schedule,
            terms.sampler,
            terms.steps,
            eta=terms.eta,
            spacing=terms.spacing,
            guidance=terms.guidance,
            **jumps,
        )
    else:
        told["strength"] = request.strength or DEFAULT_STRENGTH
        plan = terms.plan(catalogue.schedule, told["strength"])
    image, known = _image_of(request, catalogue)
    chains = [
        Chain(plan, seed, terms.label, None if inpainting else noised(plan, image, seed), known)
        for seed in range(terms.seed, terms.seed + request.n)
    ]
    return to_order(request, terms, chains, catalogue, streamed=streamed, told=told)


def _image_of(request: EditRequest, catalogue: Catalogue) -> tuple[Image, Known | None]:
    data = unpack(request.image, "image")
    if request.mask is None:
        return from_pixels(decode(data, catalogue.shape)), None
    pixels, kept = decode_masked(data, unpack(request.mask, "mask"), catalogue.shape)
    image = from_pixels(pixels)
    return image, Known(image, kept)


def _jumps(request: EditRequest, terms: Terms) -> dict[str, int]:
    """RePaint's parameters, checked before a table of any length is made of them."""
    if terms.sampler not in ONE_STEP:
        raise InvalidRequestError("sampler", f"Inpainting goes by {' or '.join(ONE_STEP)}.")
    length = request.jump_length or DEFAULT_JUMP_LENGTH
    n_sample = request.jump_n_sample or DEFAULT_JUMP_N_SAMPLE
    if repaint_rows(terms.steps, length, n_sample) > MAX_ROWS:
        raise InvalidRequestError("jump_n_sample", f"A chain has at most {MAX_ROWS} steps, jumps included.")
    return {"jump_length": length, "jump_n_sample": n_sample}


# ── Ways between two images ────────────────────────────────────────────────────────────────────


def to_interpolation(request: InterpolateRequest, catalogue: Catalogue, *, streamed: bool) -> Order:
    """A job with an image for each point of a way between two (Ho et al. 2020, §4.4 and Fig. 8).

    All of them have the same noise in every step, that of `seed`, or the way would not be smooth. Raises
    InvalidRequestError.
    """
    points = request.points or min(DEFAULT_POINTS, catalogue.max_images)
    check_count("points", max(2, points), catalogue)
    if (request.images is None) == (request.seeds is None):
        raise InvalidRequestError("images", "Two images are needed, or else two seeds.")
    shares = [i / (points - 1) for i in range(points)]
    if request.images is None:
        order = _between_seeds(request, shares, catalogue, streamed)
    elif request.method == "inversion":
        order = _by_inversion(request, shares, catalogue, streamed)
    else:
        order = _stochastic(request, shares, catalogue, streamed)
    return replace(order, marks=tuple({"lambda": share} for share in shares), columns=points)


def _stochastic(
    request: InterpolateRequest, shares: Sequence[float], catalogue: Catalogue, streamed: bool
) -> Order:
    """Both images under noise, the same for every λ (of `seed` and `seed` + 1), mixed linearly, denoised.

    The noise is what the paper mixes as well, so that its variance falls to a half midway.
    """
    strength = request.strength or DEFAULT_NOISE
    terms = settle(request, catalogue, request.sampler or "ddim", seeds=2)
    plan = terms.plan(catalogue.schedule, strength)
    ends = [
        noised(plan, image, seed) for seed, image in enumerate(_images_of(request, catalogue), terms.seed)
    ]
    chains = [Chain(plan, terms.seed, terms.label, mixed(linear(share), ends)) for share in shares]
    told = {"method": "stochastic", "points": len(shares), "strength": strength}
    return to_order(request, terms, chains, catalogue, streamed=streamed, told=told)


def _between_seeds(
    request: InterpolateRequest, shares: Sequence[float], catalogue: Catalogue, streamed: bool
) -> Order:
    """From a spherical mix of two starting noises, which is noise of variance 1 (Song et al. 2021, §5.3)."""
    assert request.seeds is not None
    first, second = request.seeds
    needs = "It belongs to images, not to seeds."
    _refuse(needs, seed=request.seed, method=request.method, strength=request.strength)
    _need_sampler(request, DETERMINISTIC)
    if first == second:
        raise InvalidRequestError("seeds", "Between a seed and itself there is no way.")
    terms = settle(request.model_copy(update={"seed": first}), catalogue, request.sampler or "ddim")
    plan = terms.plan(catalogue.schedule)
    ends = [Mix(noises=((1.0, seed),)) for seed in (first, second)]
    chains = [Chain(plan, first, terms.label, mixed(spherical(share), ends)) for share in shares]
    told = {"points": len(shares), "seeds": [first, second]}
    return to_order(request, terms, chains, catalogue, streamed=streamed, told=told)


def _by_inversion(
    request: InterpolateRequest, shares: Sequence[float], catalogue: Catalogue, streamed: bool
) -> Order:
    """Both images run up to the noise that DDIM makes them of, mixed spherically, run down again.

    Two jobs in a row, the second as the first one's sequel. Nothing is guided, and nothing clipped on the
    way down either, or what was run up would not be what is run down. At the ends the images come back but
    for the error of the steps, the smaller the more there are.
    """
    _refuse("An inversion goes all the way.", strength=request.strength)
    _need_sampler(request, ("ddim",))
    if request.guidance_scale not in (None, 1.0) or request.classifier_scale:
        field = "classifier_scale" if request.classifier_scale else "guidance_scale"
        raise InvalidRequestError(field, "An inversion is not guided.")
    steps = request.num_inference_steps or min(DEFAULT_INVERSION_STEPS, catalogue.schedule.timesteps)
    exact = {"guidance_scale": 1.0, "num_inference_steps": steps}
    terms = settle(request.model_copy(update=exact), catalogue, "ddim")
    if terms.steps < 2:
        raise InvalidRequestError("num_inference_steps", "An inversion takes at least 2 steps.")
    down = Chain(replace(terms.plan(catalogue.schedule), clip=math.inf), terms.seed, terms.label)
    told = {"method": "inversion", "points": len(shares)}
    images = _images_of(request, catalogue)
    order = to_order(request, terms, [down] * len(shares), catalogue, streamed=streamed, told=told)

    def chains(pictures: Sequence[Picture]) -> list[Chain]:
        latents = [picture.latent for picture in pictures if picture.latent is not None]
        angle = angle_between(*latents)
        ends = [Mix(((1.0, latent),)) for latent in latents]
        return [replace(down, start=mixed(spherical(share, angle), ends)) for share in shares]

    last = order.job
    first = Job(last.id, last.sampler, last.deadline, created=last.created, sequel=Sequel(last, chains))
    up = build_inversion(catalogue.schedule, terms.steps, spacing=terms.spacing)
    for image in images:
        first.add(Chain(up, terms.seed, terms.label, Mix(((1.0, image),))))
    return replace(order, job=first)


def _images_of(request: InterpolateRequest, catalogue: Catalogue) -> list[Image]:
    files = [unpack(upload, "images") for upload in request.images or ()]
    return [from_pixels(decode(data, catalogue.shape, "images")) for data in files]


def _need_sampler(request: InterpolateRequest, samplers: Sequence[str]) -> None:
    if request.sampler not in (None, *samplers):
        raise InvalidRequestError("sampler", f"This way goes by {' or '.join(samplers)}.")
    if request.eta:
        raise InvalidRequestError("eta", "This way is deterministic.")


def _refuse(reason: str, **fields: object) -> None:
    """Raises InvalidRequestError for the first of the fields that is given."""
    for name, value in fields.items():
        if value is not None:
            raise InvalidRequestError(name, reason)
