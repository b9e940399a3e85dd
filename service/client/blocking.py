"""The client for programs without an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, Unpack

import httpx
import stamina
from httpx_sse import EventSource, ServerSentEvent

from service.client.calls import (
    Call,
    Following,
    client_options,
    content,
    job_call,
    post,
)
from service.client.errors import from_response, from_transport, when_to_try_again
from service.client.fields import (
    EditFields,
    GenerateFields,
    InterpolateFields,
    ScoreFields,
    Upload,
)
from service.client.results import (
    Event,
    Job,
    Result,
    ScoreResult,
    outcome,
    pause_s,
    to_job,
    to_result,
    to_scores,
)

Connected: TypeAlias = tuple[httpx.Response, ServerSentEvent | None, Iterator[ServerSentEvent]]
"""An answer, its next event, and those after it."""


class Client:
    """Calls a service, and waits for its answers.

    A request that is refused by 429 or 503, or whose connection fails, is sent again: when `Retry-After` says
    so, else after a growing pause. All methods raise ServiceError and ConnectionFailed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        attempts: int = 5,
        retry_for_s: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """base_url: of the service; else that of DDPM_URL, else this machine's port 8000.

        api_key: one of the service's, else that of DDPM_API_KEY. attempts: how often a request is sent at
        most, 1 for never again. retry_for_s: seconds after which it is not sent again.
        """
        self._http = httpx.Client(**client_options(base_url, api_key), transport=transport)
        self._retries: dict[str, Any] = {"attempts": attempts, "timeout": retry_for_s}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(self, **fields: Unpack[GenerateFields]) -> Result:
        """Images from noise."""
        return to_result(self._json(post("/generate", fields)))

    def stream(self, **fields: Unpack[GenerateFields]) -> Iterator[Event]:
        """The same, event by event: Queued, Preview …, Completed.

        A connection that is lost on the way is replaced, and the stream goes on behind the last event.
        Raises the error of a job that fails.
        """
        return self._follow(Following(post("/generate", fields)))

    def edit(self, image: Upload, **fields: Unpack[EditFields]) -> Result:
        """Images from a picture, all of it or where `mask` is white."""
        return to_result(self._json(post("/edit", {"image": image, **fields})))

    def interpolate(self, **fields: Unpack[InterpolateFields]) -> Result:
        """Images between two `images` or two `seeds`."""
        return to_result(self._json(post("/interpolate", fields)))

    def score(self, images: Sequence[Upload], **fields: Unpack[ScoreFields]) -> ScoreResult:
        """The likelihood and the typicality of pictures."""
        return to_scores(self._json(post("/score", {"images": list(images), **fields})))

    def info(self) -> dict[str, Any]:
        """What can be requested: model, samplers, defaults, limits."""
        return self._json(Call("GET", "/info"))

    def submit(self, **fields: Unpack[GenerateFields]) -> Job:
        """Start a job without waiting for it: see `wait`."""
        return to_job(self._json(post("/generate", fields, {"Prefer": "respond-async"})))

    def job(self, job_id: str) -> Job:
        """The state of a job. Raises NotFound for one that is not known, or no longer."""
        return to_job(self._json(job_call("GET", job_id)))

    def wait(self, job_id: str) -> Result | ScoreResult:
        """The result of a job that was submitted, once there is one. Raises the error of a failed job."""
        job = self.job(job_id)
        while not job.done:
            time.sleep(pause_s(job))
            job = self.job(job_id)
        return outcome(job)

    def cancel(self, job_id: str) -> None:
        """Cancel a job, or forget the result of a finished one. Raises NotFound."""
        self._answer(job_call("DELETE", job_id))

    def _json(self, call: Call) -> dict[str, Any]:
        return content(self._answer(call))

    def _answer(self, call: Call) -> httpx.Response:
        for attempt in stamina.retry_context(when_to_try_again, **self._retries):
            with attempt:
                response = self._open(call)
                try:
                    response.read()
                except httpx.TransportError as error:
                    raise from_transport(error, response.url) from error
                finally:
                    response.close()
        return response

    def _open(self, call: Call) -> httpx.Response:
        """The beginning of an answer. Raises the error of one that is refused."""
        request = call.request(self._http)
        try:
            response = self._http.send(request, stream=True)
            if response.is_error:
                response.read()
        except httpx.TransportError as error:
            raise from_transport(error, request.url) from error
        if response.is_error:
            raise from_response(response)
        return response

    def _follow(self, following: Following) -> Iterator[Event]:
        while not following.over:
            response, found, events = self._connect(following)
            try:
                while found is not None:
                    if (event := following.event(found)) is not None:
                        yield event
                    found = next(events, None)
            except httpx.TransportError:
                pass  # the next connection continues behind the last event
            finally:
                response.close()

    def _connect(self, following: Following) -> Connected:
        """A connection on which an event has come. Raises ConnectionFailed when there is none."""
        call = following.call()
        for attempt in stamina.retry_context(when_to_try_again, **self._retries):
            with attempt:
                response, found = self._open(call), None
                events = EventSource(response).iter_sse()
                try:
                    following.check(response)
                    found = next(events, None)
                    if found is None:
                        raise following.lost("it ended without an event")
                except httpx.TransportError as error:
                    raise following.lost(error) from error
                finally:
                    if found is None:
                        response.close()
        return response, found, events
