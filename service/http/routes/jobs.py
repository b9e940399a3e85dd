"""`/jobs/{id}`: how far a job is, its result if it was to go on without a client, and its end."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response

from service.engine.messages import Cancelled, Failed, Finished, Located, Terminal
from service.errors import CancelledError, NotAcceptableError
from service.http.answers import EVENTS, JSON, StreamPresenter, encoded
from service.http.bodies import bodies_of
from service.http.jobs import not_found, state_body
from service.http.negotiation import negotiate
from service.http.openapi import ANSWERS, JOB_STATE, Responses, problems
from service.http.problems import to_problem
from service.http.respond import EventStream, finished, presenter_of
from service.http.state import AppState, app_state

router = APIRouter(tags=["jobs"])

HEADERS = {"Cache-Control": "no-store", "Vary": "Accept"}
LONGEST_RETRY_S = 120
JOB: Responses = {
    200: {
        "description": "Its state, or its result as its POST would have answered",
        "content": {**ANSWERS[200]["content"], **JOB_STATE},
    },
    202: {"description": "Its state, where a picture is wanted and it is not finished", "content": JOB_STATE},
    **problems(401, 403, 404, 406, 422, 499, 500, 503, 504),
}
JobId = Annotated[str, Path(description="as `X-Job-ID` and the ids of events have it")]


@router.get("/jobs/{job_id}", response_class=Response, responses=JOB)
async def job(
    job_id: JobId,
    request: Request,
    preview: Annotated[bool, Query(description="with the latest previews, where the job has any")] = False,
) -> Response:
    """How far a job is. Of one that was sent with `Prefer: respond-async` also its result, as for its POST.

    `preview` adds the latest previews. Events are those of such a job that have not been read yet.
    """
    state, media_type = app_state(request), negotiate(request)
    if media_type == EVENTS:
        return _follow(job_id, state)
    place = await state.engine.locate(job_id)
    if place is not None:
        return await _in_flight(place, state, media_type, preview=preview)
    stream = state.jobs.find(job_id)
    if stream is None or stream.last is None or stream.context is None:
        raise not_found()
    return await _over(stream.last, stream.context, state.capabilities.name, media_type)


@router.delete("/jobs/{job_id}", status_code=204, response_class=Response, responses=problems(401, 403, 404))
async def delete(job_id: JobId, request: Request) -> Response:
    """Cancel a job in flight, whoever waits for it; forget the result of one that is over."""
    app_state(request).jobs.delete(job_id)
    return Response(status_code=204)


def _follow(job_id: str, state: AppState) -> Response:
    stream = state.jobs.find(job_id)
    if stream is not None and stream.context is not None:
        return EventStream(stream.context, state)
    if state.engine.has(job_id):
        raise NotAcceptableError("The events of this job go to the client that waits for it.")
    raise not_found()


async def _in_flight(place: Located, state: AppState, media_type: str, *, preview: bool) -> Response:
    stream = state.streams.find(place.job_id)
    presenter = None if stream is None else stream.context
    shown = stream.shown if preview and stream is not None and presenter is not None else []

    def content() -> bytes:
        body = state_body(place)
        if preview:
            body["previews"] = [bodies_of(prepared).preview(each) for each in shown]
        return msgspec.json.encode(body)

    if presenter is None:
        made = content()
    else:
        prepared = presenter.prepared
        pictures = [picture for each in shown for picture in each.pictures]
        made = await encoded(content, pictures, prepared.output_format, prepared.scale)
    wait_s = min(LONGEST_RETRY_S, max(1, math.ceil(place.eta_s or 1.0)))
    headers = {**HEADERS, "Retry-After": str(wait_s), "X-Job-ID": place.job_id}
    # Who wants a picture is not given this for one.
    return Response(made, 200 if media_type == JSON else 202, headers, JSON)


async def _over(event: Terminal, presenter: StreamPresenter, model: str, media_type: str) -> Response:
    prepared = presenter.prepared
    if media_type != JSON:
        response = await presenter_of(media_type, prepared, model).respond(finished(event))
        response.headers.update(HEADERS)
        return response
    headers = {**HEADERS, "X-Job-ID": event.job_id}
    match event:
        case Finished():

            def content() -> bytes:
                result = bodies_of(prepared).completed(event, model)
                return msgspec.json.encode({"id": event.job_id, "state": "finished", "result": result})

            work, image_format = bool(event.measurements), prepared.output_format
            return Response(
                await encoded(content, event.pictures, image_format, prepared.scale, work=work),
                headers=headers,
                media_type=JSON,
            )
        case Failed(_, error) if not isinstance(error, CancelledError):
            name, problem = "failed", to_problem(error)
        case Failed() | Cancelled():
            name, problem = "cancelled", to_problem(CancelledError("The job was cancelled."))
    body = {"id": event.job_id, "state": name, "error": problem.model_dump(exclude_none=True)}
    return Response(msgspec.json.encode(body), headers=headers, media_type=JSON)
