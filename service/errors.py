"""The error tree. Each error has a stable code; service/http/problems.py alone turns it into a status.

ServiceError
├── InvalidRequestError        the request asks for something impossible; `field` says where
├── UnauthorizedError          no key, or an unknown one
├── ForbiddenError             a browser says that another site's page asks, or by a name that is not ours
│   ├── HostError
│   └── CrossSiteError
├── NotAcceptableError         the client accepts none of our media types
├── JobNotFoundError           no job of this id, or not any more
├── RefusedError               not accepted now: `retry_after_s` says when to try again
│   ├── QueueFullError
│   ├── ClientLimitError    one client has its share
│   ├── LoadingError
│   ├── DrainingError
│   ├── EngineDeadError
│   └── SelfTestError
├── DeadlineError              the deadline passed, or cannot be met
├── CancelledError             the job was stopped on request
└── ComputeError               the step failed for this job
    ├── NonFiniteError         the network gave a NaN or an infinity for it
    └── EngineKilledError      the engine died of it, twice
"""

from __future__ import annotations

from typing import Any


class ServiceError(Exception):
    """Base of all; `code` is part of the wire interface and never changes."""

    code = "error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class InvalidRequestError(ServiceError):
    """A field's value is impossible for this model or these limits."""

    code = "invalid_request"

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


class UnauthorizedError(ServiceError):
    """The route asks for an API key."""

    code = "unauthorized"


class ForbiddenError(ServiceError):
    """A browser should not have been led to ask this."""

    code = "forbidden"


class HostError(ForbiddenError):
    """The service is not called by this name."""

    code = "host_not_allowed"


class CrossSiteError(ForbiddenError):
    """A page of another site may not ask this."""

    code = "cross_site"


class NotAcceptableError(ServiceError):
    """The Accept header names none of our media types."""

    code = "not_acceptable"


class JobNotFoundError(ServiceError):
    """There is no such job: it never was, or its result is no longer kept."""

    code = "job_not_found"


class RefusedError(ServiceError):
    """Not accepted; nothing was started."""

    code = "refused"

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class QueueFullError(RefusedError):
    """All slots are taken."""

    code = "queue_full"


class ClientLimitError(RefusedError):
    """The client has as many of the slots, or of the open streams, as it may have."""

    code = "client_limit"


class LoadingError(RefusedError):
    """The network is not loaded and warm yet."""

    code = "loading"


class DrainingError(RefusedError):
    """The process is about to stop and accepts nothing new."""

    code = "draining"


class EngineDeadError(RefusedError):
    """The engine has failed; the process is about to be replaced."""

    code = "worker_dead"  # older than the class's name, and part of the wire interface


class SelfTestError(RefusedError):
    """The engine is warm, but does not compute the result that is known of its model."""

    code = "self_test_failed"


class DeadlineError(ServiceError):
    """Too late, or certain to be."""

    code = "deadline_exceeded"


class CancelledError(ServiceError):
    """Stopped before it was finished."""

    code = "cancelled"


class ComputeError(ServiceError):
    """The step failed whenever this sample was in it."""

    code = "compute_failed"


class NonFiniteError(ComputeError):
    """NaN or infinity in the result; it is not repaired."""

    code = "non_finite"


class EngineKilledError(ComputeError):
    """The engine died while this job was in a step, and again when the job had it to itself."""

    code = "engine_killed"


def to_data(error: ServiceError) -> tuple[str, dict[str, Any]]:
    """An error as its code and its attributes, so that it can be sent."""
    return error.code, dict(vars(error))


def from_data(code: str, attributes: dict[str, Any]) -> ServiceError:
    """The error that `to_data` was given. Raises ValueError for a code that is none of ours."""
    kinds = [ServiceError]
    for kind in kinds:
        if kind.code == code:
            error = kind.__new__(kind, attributes.get("detail"))
            vars(error).update(attributes)
            return error
        kinds += kind.__subclasses__()
    raise ValueError(f"unknown code {code!r}")
