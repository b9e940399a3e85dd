"""`POST /interpolate`: a path from one image to another."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.http.forms import HALVES, body_schema, read_body
from service.http.middleware import UploadRoute
from service.http.negotiation import negotiate
from service.http.openapi import OUTCOMES
from service.http.respond import answer, decoded
from service.tasks.interpolate import InterpolateRequest, prepare_interpolation

router = APIRouter(tags=["edit"], route_class=UploadRoute)

EXAMPLES = {
    "two pictures: noise, mix, denoise": {"images": [HALVES, HALVES], "points": 7, "strength": 0.5},
    "two pictures by DDIM inversion": {"images": [HALVES, HALVES], "method": "inversion"},
    "two seeds": {"seeds": [1, 2], "points": 7, "sampler": "dpmpp_2m", "num_inference_steps": 20},
}


@router.post("/interpolate", responses=OUTCOMES, openapi_extra=body_schema(InterpolateRequest, EXAMPLES))
async def interpolate(request: Request) -> Response:
    """A path from one image to another: an image for each of `points` λ from 0 to 1 (DDPM, Fig. 8).

    Each image of the answer has its `lambda`; as a picture they are in one row. `Accept` chooses the answer
    as for `/generate`.
    """
    media_type = negotiate(request)
    # Nothing keeps the body while the job runs.
    prepared = await decoded(prepare_interpolation, await read_body(request, InterpolateRequest), request)
    return await answer(media_type, prepared, request)
