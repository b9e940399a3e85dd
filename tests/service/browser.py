"""A real browser on the pages of a real service."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from service.engine.warmup import warm_up
from tests.service.fakes import tiny_model

CHROMIUM = shutil.which("chromium")
IN_A_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
# Without these the browser keeps trying to reach its vendor, in a closed network too.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


TINY: dict[str, Any] = {
    "warm": lambda config: warm_up(tiny_model(), config),
    "runtime": "torch",
    "device": "cpu",
    "max_batch": 8,
}
"""What starts a service with a tiny network of its own, and not with a fake of one."""


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser. Playwright's loop runs in this thread until its end, so no other one can."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Visit:
    """Opens pages of a service, each as somebody new; afterwards their console must be clean.

    expected: what a complaint of the console may contain.
    """

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        self.expected = {"401"}
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._opened = ExitStack()

    def __call__(self, path: str = "/", at: str = "", width: int = 1280, **options: Any) -> Page:
        """The page at a path of the service, or of another one at a URL."""
        context = self.browser.new_context(viewport={"width": width, "height": 800}, **options)
        self._opened.callback(context.close)
        page = context.new_page()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requested.append(request.url))
        page.goto((at or self.url) + path)
        return page

    def close(self) -> None:
        """Close the pages. Fails where one of them has complained."""
        self._opened.close()
        unexpected = [text for text in self.complaints if not any(part in text for part in self.expected)]
        assert not unexpected, unexpected
