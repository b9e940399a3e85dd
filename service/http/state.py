"""What the routes share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request
from msgspec.structs import asdict

from service.engine.client import EngineClient
from service.engine.messages import ModelInfo
from service.engine.streams import Streams
from service.errors import ClientLimitError, LoadingError
from service.http.answers import StreamPresenter
from service.http.caching import computed_by
from service.http.event_ids import EventIds
from service.http.intake import Bodies, Decoders
from service.http.jobs import Jobs
from service.settings import Settings
from service.tasks.sampling import ModelCapabilities
from service.telemetry import Telemetry


@dataclass
class AppState:
    """The application's state, wired up in app.py.

    streams: each with the presenter of its events, for a client that reconnects, or None where a job is not
    streamed. decoders, bodies: what decodes pictures, and what is held of them before.
    """

    engine: EngineClient
    streams: Streams[StreamPresenter | None]
    telemetry: Telemetry
    settings: Settings
    decoders: Decoders = field(default_factory=Decoders)
    jobs: Jobs = field(init=False)
    bodies: Bodies = field(init=False)
    _capabilities: ModelCapabilities | None = None
    _event_ids: EventIds | None = None
    _open_streams: Counter[str] = field(default_factory=Counter)  # by owner

    def __post_init__(self) -> None:
        ttl_s, most = self.settings.result_ttl_s, self.settings.result_bytes
        self.bodies = Bodies(self.settings.body_bytes)
        self.jobs = Jobs(self.engine, self.streams, ttl_s=ttl_s, max_bytes=most)

    @contextmanager
    def open_stream(self, who: str) -> Iterator[None]:
        """Count a stream of an owner while it is open. Raises ClientLimitError where there are too many."""
        most = self.settings.max_streams_per_key or 2 * self.settings.most_slots_of_a_key
        if self._open_streams[who] >= most:
            self.telemetry.rejected.labels(ClientLimitError.code).inc()
            raise ClientLimitError(f"This client has {most} streams open, and may have no more.", 5.0)
        self._open_streams[who] += 1
        try:
            yield
        finally:
            self._open_streams[who] -= 1
            if not self._open_streams[who]:
                del self._open_streams[who]

    @property
    def capabilities(self) -> ModelCapabilities:
        """What can be asked of the model. Raises LoadingError as long as that is not known."""
        if self._capabilities is None:
            if self.engine.model is None:
                raise self.engine.refusal() or LoadingError("The network is being loaded.", 2.0)
            self._capabilities = capabilities_of(self.engine.model, self.settings)
        return self._capabilities

    @property
    def event_ids(self) -> EventIds:
        """Ids of events, signed where there is a secret. Raises LoadingError until the network is loaded."""
        if self._event_ids is None:
            secret, info = self.settings.resume_secret, self.engine.info
            if info is None:
                raise self.engine.refusal() or LoadingError("The network is being loaded.", 2.0)
            key = secret.get_secret_value().encode() if secret is not None else None
            self._event_ids = EventIds(key, computed_by(self.capabilities, info))
        return self._event_ids


def capabilities_of(model: ModelInfo, settings: Settings) -> ModelCapabilities:
    """What can be asked of a model under these settings."""
    known = asdict(model)
    return ModelCapabilities(
        **{**known, "name": settings.served_model_name or model.name},
        max_images=min(settings.max_images, settings.max_queue),  # more would always be refused
        deadline_s=settings.deadline_s,
    )


def app_state(request: Request) -> AppState:
    """The state of the app that serves a request."""
    found: AppState = request.app.state.ddpm
    return found
