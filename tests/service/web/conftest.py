"""One browser and one service for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.service.browser import TINY, Visit, browsing
from tests.service.live import Serve, Threaded, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny() -> Iterator[Threaded]:
    """A service with a tiny network."""
    servers = serving()
    yield next(servers)(**TINY).ready()
    next(servers, None)


@pytest.fixture
def visit(browser: Browser, tiny: Threaded, serve: Serve) -> Iterator[Visit]:
    """Opens pages; proof at the end that their console stayed clean.

    The pages are closed before any server stops, whose last answers they would complain about.
    """
    opened = Visit(browser, tiny.url)
    yield opened
    opened.close()
