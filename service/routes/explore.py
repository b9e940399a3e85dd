"""`POST /score`: what the network makes of pictures at every noise level."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from service.routes import InHouse
from service.routes.answers import EVENTS, REFUSALS, answer, choose_form
from service.routes.bodies import HALVES, described, read
from service.scores import ScoreRequest, to_score

router = APIRouter(tags=["explore"])

UPLOAD_ROUTES = frozenset({"/score"})
"""Whose bodies may be as large as pictures are."""
SCORES = {
    "two pictures, by a hundred terms each": {"images": [HALVES, HALVES], "seed": 7},
    "one, by as few as there can be": {"images": [HALVES], "terms": 3},
}


@router.post("/score", responses=REFUSALS, openapi_extra=described(ScoreRequest, SCORES))  # type: ignore[arg-type]
async def score(request: Request, house: InHouse) -> Response:
    """How likely pictures are: the variational bound in bits per dimension, from its terms by timestep.

    With it come the rate–distortion curve and, where the model has the statistics, how unusual the errors
    are. `Accept` chooses the answer as for `/generate`: as a picture, a row for each image shows what it
    looks like after ever more bits; events show the guesses as they are made.
    """
    form = choose_form(request)
    body = await read(request, ScoreRequest)
    order = await asyncio.to_thread(to_score, body, house.catalogue, streamed=form == EVENTS)
    return await answer(order, form, request, house)
