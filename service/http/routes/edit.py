"""`POST /edit`: images from a picture."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.http.forms import HALVES, body_schema, read_body
from service.http.middleware import UploadRoute
from service.http.negotiation import negotiate
from service.http.openapi import OUTCOMES
from service.http.respond import answer, decoded
from service.tasks.edit import EditRequest, prepare_edit

router = APIRouter(tags=["edit"], route_class=UploadRoute)

EXAMPLES = {
    "image to image, strength 0.6": {"image": HALVES, "strength": 0.6, "seed": 7},
    "inpainting: regenerate what the mask shows white": {
        "image": HALVES,
        "mask": HALVES,
        "jump_length": 10,
        "jump_n_sample": 5,
    },
    "inpainting that starts from the picture": {"image": HALVES, "mask": HALVES, "strength": 0.8},
}


@router.post("/edit", responses=OUTCOMES, openapi_extra=body_schema(EditRequest, EXAMPLES))
async def edit(request: Request) -> Response:
    """Change a picture: by `strength` (SDEdit), or where `mask` is white (RePaint).

    What a mask shows black comes back exactly, pixel for pixel of the picture at the model's size. `Accept`
    chooses the answer as for `/generate`.
    """
    media_type = negotiate(request)
    # Nothing keeps the body while the job runs.
    prepared = await decoded(prepare_edit, await read_body(request, EditRequest), request)
    return await answer(media_type, prepared, request)
