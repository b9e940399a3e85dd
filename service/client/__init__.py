"""A typed client of the service: `Client`, and `AsyncClient` with the same methods.

    from service.client import Client

    with Client("http://localhost:8000") as client:
        result = client.generate(class_label="bag", n=4, seed=7)
        result.images[0].pil.save("bag.png")

It needs neither torch nor fastapi. docs/client.md has more.
"""

from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.errors import (
    ClientError,
    ComputeFailed,
    ConnectionFailed,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    JobCancelled,
    NotFound,
    QueueFull,
    ServiceError,
    Unauthorized,
    Unavailable,
)
from service.client.results import (
    Completed,
    Event,
    Image,
    Job,
    Preview,
    Queued,
    Result,
    Score,
    ScoreResult,
)

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "Completed",
    "ComputeFailed",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Event",
    "Forbidden",
    "Image",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "NotFound",
    "Preview",
    "QueueFull",
    "Queued",
    "Result",
    "Score",
    "ScoreResult",
    "ServiceError",
    "Unauthorized",
    "Unavailable",
]
