"""From errors to answers: the one table of statuses, and RFC 9457 problems.

The form of an error belongs to the wire format of the route. `ErrorFormats` finds it by the path, so that an
error is in the right form even where no route has matched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, WithJsonSchema
from starlette.exceptions import HTTPException

from service.errors import (
    CancelledError,
    ClientLimitError,
    ComputeError,
    DeadlineError,
    ForbiddenError,
    InvalidRequestError,
    JobNotFoundError,
    NotAcceptableError,
    QueueFullError,
    RefusedError,
    ServiceError,
    UnauthorizedError,
)
from service.http.prefix import route_path
from service.telemetry import request_id

logger = logging.getLogger(__name__)

# The most specific class of an error that is listed here decides.
STATUS: dict[type[ServiceError], int] = {
    InvalidRequestError: 422,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    NotAcceptableError: 406,
    JobNotFoundError: 404,
    QueueFullError: 429,
    ClientLimitError: 429,
    RefusedError: 503,
    DeadlineError: 504,
    CancelledError: 499,
    ComputeError: 500,
    ServiceError: 500,
}
# Phrases that Python's versions do not agree on, or do not know.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content", 499: "Client Closed Request"}


FIELD_ERRORS = {
    "type": "array",
    "description": "the fields that are wrong, of an invalid request",
    "items": {
        "type": "object",
        "properties": {
            "field": {"type": "string", "description": "its name; empty where it is the whole request"},
            "message": {"type": "string", "description": "what is wrong with it"},
        },
    },
}


class Problem(BaseModel):
    """RFC 9457 problem details; `code` is stable."""

    type: str = Field("about:blank", description="always about:blank: `code` says what it is")
    title: str = Field(description="the status in words")
    status: int = Field(description="the HTTP status, also in an event of a stream")
    detail: str = Field(description="what is wrong, for people")
    code: str = Field(description="what is wrong, for programs")
    errors: Annotated[list[dict[str, Any]] | None, WithJsonSchema(FIELD_ERRORS)] = None


MAX_RETRY_AFTER_S = 120
"""Clients that are told to wait for longer give up instead."""
ErrorFormat = Callable[[Problem, Mapping[str, str]], Response]
"""(problem, headers) → the answer."""


def problem_json(problem: Problem, headers: Mapping[str, str]) -> Response:
    """The form of our own routes: `application/problem+json`."""
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        problem.status,
        {"Vary": "Accept", "Cache-Control": "no-store", **headers},
        media_type="application/problem+json",
    )


class ErrorFormats:
    """Which paths answer their errors in which form; `problem_json` where nothing else is registered."""

    def __init__(self) -> None:
        self._by_prefix: dict[str, ErrorFormat] = {}

    def register(self, prefix: str, error_format: ErrorFormat) -> None:
        """Answer errors below a path prefix in a form of their own."""
        self._by_prefix[prefix] = error_format

    def of(self, path: str) -> ErrorFormat:
        """The form of a path, by its longest prefix."""
        found = [prefix for prefix in self._by_prefix if path == prefix or path.startswith(f"{prefix}/")]
        return self._by_prefix[max(found, key=len)] if found else problem_json


def to_problem(error: ServiceError) -> Problem:
    """The problem that describes an error."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    errors = None
    if isinstance(error, InvalidRequestError):
        errors = [{"field": error.field, "message": error.detail}]
    return Problem(title=_title(status), status=status, detail=error.detail, code=error.code, errors=errors)


def register_handlers(app: FastAPI) -> None:
    """Answer everything that routes raise."""
    # Starlette types a handler by Exception, not by the class it is registered for.
    app.add_exception_handler(ServiceError, on_service_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_bug)


async def on_service_error(request: Request, error: ServiceError) -> Response:
    """Answer one of our own errors."""
    headers = {}
    if isinstance(error, RefusedError):
        headers["Retry-After"] = str(min(math.ceil(error.retry_after_s), MAX_RETRY_AFTER_S))
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(request, to_problem(error), headers)


async def _on_invalid(request: Request, error: RequestValidationError) -> Response:
    """Which fields are wrong and why, never what was sent: it may be huge, secret, or not JSON at all."""
    errors = [{"field": _field(found["loc"]), "message": _message(found)} for found in error.errors()[:20]]
    detail = "; ".join(f"{e['field']}: {e['message']}" if e["field"] else e["message"] for e in errors[:5])
    problem = Problem(title=_title(422), status=422, detail=detail, code="invalid_request", errors=errors)
    return _answer(request, problem)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 400:  # a body that breaks the JSON parser: nested too deep, not UTF-8, …
        return await _on_invalid(request, RequestValidationError([{"loc": (), "msg": str(error.detail)}]))
    title = _title(error.status_code)
    code = title.lower().replace(" ", "_")
    problem = Problem(title=title, status=error.status_code, detail=str(error.detail), code=code)
    return _answer(request, problem, error.headers or {})


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("unhandled error", exc_info=error)
    detail = "Internal error; the log has the details."
    problem = Problem(title=_title(500), status=500, detail=detail, code="internal")
    # Starlette answers a bug outside all middleware, where nobody else adds this.
    return _answer(request, problem, {"X-Request-ID": request_id.get(), "X-Content-Type-Options": "nosniff"})


def _answer(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    formats: ErrorFormats = request.app.state.error_formats
    return formats.of(route_path(request.scope))(problem, headers or {})


def _title(status: int) -> str:
    return TITLES.get(status) or HTTPStatus(status).phrase


def _field(location: Sequence[int | str]) -> str:
    """The field an error is about. An unknown field's name is input: repeated only if it is a short word."""
    name = location[1] if len(location) > 1 else ""
    plain = isinstance(name, str) and len(name) <= 40 and name.isascii() and name.isidentifier()
    return str(name) if plain else ""


def _message(found: Mapping[str, Any]) -> str:
    """What is wrong, and with which entry, where the field is a list."""
    index = next((part for part in found["loc"][2:] if isinstance(part, int)), None)
    return str(found["msg"]) if index is None else f"Index {index}: {found['msg']}"
