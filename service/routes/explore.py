"""`POST /score`: what pictures cost under the model, bit by bit."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from service.errors import NotAcceptableError
from service.routes import InHouse
from service.routes.answers import EVENTS, REFUSALS, answer, choose_form
from service.routes.bodies import described, read
from service.scores import ScoreRequest, to_scores

router = APIRouter(tags=["explore"])

UPLOAD_ROUTES = frozenset({"/score"})
"""Whose bodies may be as large as pictures are."""
FORMS = ("application/json", EVENTS)
DOT = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACAQAAAABazTCJAAAADElEQVR42mNwYHAAAAEEAIFW8NEDAAAAAElFTkSuQmCC"
)
SCORES = {
    "a hundred terms of the bound, and its standard error": {"images": [DOT], "terms": 100},
    "every term": {"images": [DOT], "terms": 1000},
}


@router.post("/score", responses=REFUSALS, openapi_extra=described(ScoreRequest, SCORES))  # type: ignore[arg-type]
async def score(request: Request, house: InHouse) -> Response:
    """Bits per dimension of pictures by the variational bound, its terms, and the rate–distortion curve.

    The rates are those of a code in the sense that sending x_t to a receiver who holds the model costs so
    many bits in expectation (Ho et al. 2020, §4.3); nothing is encoded. `Accept` chooses JSON (default) or
    events, whose previews show the network's guesses with what they measure.
    """
    form = choose_form(request)
    if form not in FORMS:
        raise NotAcceptableError(f"Answers come as {' or '.join(FORMS)}.")
    body = await read(request, ScoreRequest)
    order = await asyncio.to_thread(to_scores, body, house.catalogue, streamed=form == EVENTS)
    return await answer(order, form, request, house)
