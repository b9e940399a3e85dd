"""What becomes of the requests of a greedy client and of a modest one."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench import greedy
from bench.greedy import GREEDY_AT_ONCE, contest

asked: Counter[tuple[str, int]] = Counter()


class Service(BaseHTTPRequestHandler):
    """Refuses the key `other` at first, and fails for `broken`."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"].removeprefix("Bearer ")
        asked[key, request.get("n", 1)] += 1
        first = asked[key, request.get("n", 1)] == 1
        status = 500 if key == "broken" else 429 if key == "other" and first else 200
        self.send_response(status)
        self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    asked.clear()
    monkeypatch.setattr(greedy, "BUSY_S", 0.1)
    monkeypatch.setattr(greedy, "MODEST_EVERY_S", 0.05)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_request_is_counted_once(url: str) -> None:
    many, few = contest(url, 0.3, "a", "other")
    assert (many.refused, many.failed, many.images) == (0, 0, 64 * asked["a", 64])
    assert asked["a", 64] >= GREEDY_AT_ONCE
    assert (few.refused, few.failed) == (1, 0)
    assert len(few.seconds) == few.images == asked["other", 1] - 1 >= 2


def test_a_failure_is_no_refusal(url: str) -> None:
    _, few = contest(url, 0.1, "a", "broken")
    assert few.failed == asked["broken", 1] > 0
    assert (few.refused, few.images) == (0, 0)
