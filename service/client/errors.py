"""What a client raises.

ClientError
├── ConnectionFailed       no answer, or one that broke off
└── ServiceError           the service's own problem: code, status, detail, errors, request_id
    ├── InvalidRequest     422: `errors` names the fields
    ├── Unauthorized       401
    ├── Forbidden          403
    ├── NotFound           404
    ├── QueueFull          429: `retry_after_s` says when to try again
    ├── Unavailable        503: loading, draining or dead; `retry_after_s` too
    ├── DeadlineExceeded   504
    ├── JobCancelled       499
    └── ComputeFailed      500: the job failed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx


class ClientError(Exception):
    """Base of all."""


class ConnectionFailed(ClientError):
    """No answer, or one that broke off. again: whether another try may succeed."""

    def __init__(self, detail: str, again: bool = True) -> None:
        super().__init__(detail)
        self.again = again


@dataclass(eq=False)
class ServiceError(ClientError):
    """A problem that the service reports.

    code: stable, see docs/api.md. errors: the fields that are wrong, each with `field` and `message`.
    """

    detail: str
    code: str
    status: int
    errors: Sequence[Mapping[str, Any]] = ()
    request_id: str | None = None
    retry_after_s: float | None = None

    by_status: ClassVar[dict[int, type[ServiceError]]] = {}

    def __init_subclass__(cls, status: int) -> None:
        ServiceError.by_status[status] = cls

    def __str__(self) -> str:
        return f"{self.detail} ({self.code})"


class InvalidRequest(ServiceError, status=422):
    """Malformed, or not possible with this model or these limits."""


class Unauthorized(ServiceError, status=401):
    """No API key, or an unknown one."""


class Forbidden(ServiceError, status=403):
    """The service is not called by this name, or not by this page."""


class NotFound(ServiceError, status=404):
    """No such route or job."""


class QueueFull(ServiceError, status=429):
    """All slots are taken."""


class Unavailable(ServiceError, status=503):
    """Loading, draining or dead."""


class DeadlineExceeded(ServiceError, status=504):
    """The deadline has passed, or cannot be met."""


class JobCancelled(ServiceError, status=499):
    """The job was cancelled."""


class ComputeFailed(ServiceError, status=500):
    """The job failed in the network or the engine, or the service has a bug."""


def from_problem(problem: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> ServiceError:
    """The error that a problem (RFC 9457) describes."""
    headers = headers or {}
    status = int(problem["status"])
    kind = ServiceError.by_status.get(status, ServiceError)
    return kind(
        str(problem.get("detail") or problem.get("title") or "no detail"),
        str(problem.get("code") or f"http_{status}"),
        status,
        problem.get("errors") or (),
        headers.get("x-request-id"),
        _seconds(headers.get("retry-after")),
    )


def from_response(response: httpx.Response) -> ServiceError:
    """The error of an answer whose status is 400 or more; its body has been read."""
    try:
        content = response.json()
    except ValueError:
        content = None
    problem = content if isinstance(content, dict) else {}
    if not problem and 200 <= response.status_code < 300:
        problem = {"detail": "The answer is not the service's JSON.", "code": "not_understood"}
    detail = f"status {response.status_code} {response.reason_phrase}".rstrip()
    return from_problem({"detail": detail, **problem, "status": response.status_code}, response.headers)


def from_transport(error: httpx.TransportError, url: object) -> ConnectionFailed:
    """The error of a request that had no whole answer.

    Another try is worth it, except after a long wait for an answer, and for an address that cannot be used.
    """
    waited = isinstance(error, httpx.ReadTimeout)
    again = not waited and not isinstance(error, httpx.UnsupportedProtocol)
    reason = "no answer in time" if waited else str(error) or type(error).__name__
    return ConnectionFailed(f"{url}: {reason}", again)


def when_to_try_again(error: Exception) -> bool | float:
    """Whether another try may succeed, and after how many seconds where the service has said so."""
    if isinstance(error, QueueFull | Unavailable):
        return True if error.retry_after_s is None else error.retry_after_s
    return isinstance(error, ConnectionFailed) and error.again


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
