"""The error tree. Each error has a stable code; what HTTP makes of it is decided in app.py alone.

ServiceError
├── InvalidRequestError        the request asks for something impossible; `field` says where
├── UnauthorizedError          no key, or not one of ours
├── NotAcceptableError         no answer in a form the client takes
├── RefusedError               not now: `retry_after_s` says when it may be worth trying again
│   ├── QueueFullError
│   ├── LoadingError
│   ├── DrainingError
│   └── WorkerDeadError
├── DeadlineError              the deadline passed, or cannot be met
├── CancelledError             somebody stopped the job
└── ComputeError               the step failed for this job
    └── NonFiniteError         the network gave a NaN or an infinity for it
"""

from __future__ import annotations


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


class NotAcceptableError(ServiceError):
    """The Accept header leaves no form we can answer in."""

    code = "not_acceptable"


class RefusedError(ServiceError):
    """Not taken in; nothing was started."""

    code = "refused"

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class QueueFullError(RefusedError):
    """As many samples are in the house as it holds."""

    code = "queue_full"


class LoadingError(RefusedError):
    """The network is not loaded and warm yet."""

    code = "loading"


class DrainingError(RefusedError):
    """The process is about to stop and takes nothing new."""

    code = "draining"


class WorkerDeadError(RefusedError):
    """The worker is gone; the process is about to be replaced."""

    code = "worker_dead"


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
