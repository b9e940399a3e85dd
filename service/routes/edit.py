"""`POST /edit` and `POST /interpolate`: images from pictures."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from service.edits import EditRequest, InterpolateRequest, to_edit, to_interpolation
from service.routes import InHouse
from service.routes.answers import EVENTS, REFUSALS, answer, choose_form
from service.routes.bodies import HALVES, described, read

router = APIRouter(tags=["edit"])

UPLOAD_ROUTES = frozenset({"/edit", "/interpolate"})
"""Whose bodies may be as large as pictures are."""
EDITS = {
    "a picture made anew by 60 %": {"image": HALVES, "strength": 0.6, "seed": 7},
    "what a mask shows white is made anew": {
        "image": HALVES,
        "mask": HALVES,
        "jump_length": 10,
        "jump_n_sample": 5,
    },
    "the same, beginning with what is there": {"image": HALVES, "mask": HALVES, "strength": 0.8},
}
INTERPOLATIONS = {
    "two pictures under noise, mixed, denoised": {"images": [HALVES, HALVES], "points": 7, "strength": 0.5},
    "two pictures by way of the noise they come from": {"images": [HALVES, HALVES], "method": "inversion"},
    "two seeds": {"seeds": [1, 2], "points": 7, "sampler": "dpmpp_2m", "num_inference_steps": 20},
}


@router.post("/edit", responses=REFUSALS, openapi_extra=described(EditRequest, EDITS))  # type: ignore[arg-type]
async def edit(request: Request, house: InHouse) -> Response:
    """Make a picture anew: by how much `strength` says (SDEdit), or where `mask` is white (RePaint).

    What a mask shows black comes back exactly, pixel for pixel of the picture at the model's size. `Accept`
    chooses the answer as for `/generate`.
    """
    form = choose_form(request)
    body = await read(request, EditRequest)
    # Always on another thread: how large a picture is only shows once it is open.
    order = await asyncio.to_thread(to_edit, body, house.catalogue, streamed=form == EVENTS)
    return await answer(order, form, request, house)


@router.post("/interpolate", responses=REFUSALS, openapi_extra=described(InterpolateRequest, INTERPOLATIONS))  # type: ignore[arg-type]
async def interpolate(request: Request, house: InHouse) -> Response:
    """The way from one image to another: an image for each of `points` λ from 0 to 1 (DDPM, Fig. 8).

    Each image of the answer says its `lambda`; as a picture they stand in a row. `Accept` chooses the answer
    as for `/generate`.
    """
    form = choose_form(request)
    body = await read(request, InterpolateRequest)
    order = await asyncio.to_thread(to_interpolation, body, house.catalogue, streamed=form == EVENTS)
    return await answer(order, form, request, house)
