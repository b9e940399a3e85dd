"""A service with a fake denoiser for each test module, and both kinds of client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.client.either import KINDS, Connect
from tests.service.live import Threaded, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    started = serving()
    yield next(started)(stream_grace_s=30.0)
    next(started, None)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(kind: str) -> Iterator[Connect]:
    """Makes clients, which are closed afterwards."""
    made: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(KINDS[kind](*arguments, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(connect: Connect, server: Threaded) -> Any:
    return connect(server.url)
