"""`POST /score`: likelihoods of pictures."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.http.forms import HALVES, body_schema, read_body
from service.http.middleware import UploadRoute
from service.http.negotiation import negotiate
from service.http.openapi import OUTCOMES
from service.http.respond import answer, decoded
from service.tasks.score import ScoreRequest, prepare_score

router = APIRouter(tags=["score"], route_class=UploadRoute)

EXAMPLES = {
    "two pictures, 100 terms each": {"images": [HALVES, HALVES], "seed": 7},
    "one picture with the fewest terms": {"images": [HALVES], "terms": 3},
}


@router.post("/score", responses=OUTCOMES, openapi_extra=body_schema(ScoreRequest, EXAMPLES))
async def score(request: Request) -> Response:
    """How likely pictures are: the variational bound in bits per dimension, from its terms by timestep.

    The answer includes the rate–distortion curve and, where the model has the statistics, how unusual the
    errors are. `Accept` chooses the form as for `/generate`: a picture has a row for each image that shows it
    after more and more bits; events show the x₀ predictions as they are made.
    """
    media_type = negotiate(request)
    # Nothing keeps the body while the job runs.
    prepared = await decoded(prepare_score, await read_body(request, ScoreRequest), request)
    return await answer(media_type, prepared, request)
