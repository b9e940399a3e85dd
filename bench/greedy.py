"""A client that asks for all there is, beside one that asks for little, on a running service.

The greedy one has six requests of 64 images of 50 steps going at any moment; the modest one asks for an image
of 20 steps twice a second. With a key each, each has its share of slots and rows. With one key for both they
are one client, and there are no shares between them: the control. `python -m bench.overload --only shares`.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

GREEDY_AT_ONCE = 6
GREEDY = {"n": 64, "num_inference_steps": 50, "sampler": "ddim", "preview": "none"}
MODEST = {"num_inference_steps": 20, "sampler": "ddim", "preview": "none"}
MODEST_EVERY_S = 0.5
PATIENCE_S = 120.0
BUSY_S = 5.0
"""So long the greedy client is alone, until it has all the slots it can get."""


@dataclass
class Served:
    """What became of a client's requests. seconds: of those that were answered by images."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    images: int = 0


def contest(url: str, seconds: float, greedy_key: str, modest_key: str) -> tuple[Served, Served]:
    """Let both ask for so many seconds. Returns what became of their requests, the greedy one's first."""
    greedy, modest = Served(), Served()
    until = time.monotonic() + BUSY_S + seconds
    threads = [
        threading.Thread(target=_again_and_again, args=(url, greedy_key, greedy, until), daemon=True)
        for _ in range(GREEDY_AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    time.sleep(BUSY_S)
    due = time.monotonic()
    while time.monotonic() < until:
        thread = threading.Thread(target=_ask, args=(url, modest_key, MODEST, modest), daemon=True)
        thread.start()
        threads.append(thread)
        due += MODEST_EVERY_S
        time.sleep(max(0.0, due - time.monotonic()))
    for thread in threads:
        thread.join(PATIENCE_S)
    return greedy, modest


def _again_and_again(url: str, key: str, served: Served, until: float) -> None:
    while time.monotonic() < until:
        time.sleep(min(1.0, _ask(url, key, GREEDY, served)))


def _ask(url: str, key: str, request: dict[str, object], served: Served) -> float:
    """Make one request. Returns the seconds after which to come back, if it was refused."""
    where, begun = urlsplit(url), time.monotonic()
    connection = HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE_S)
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "Connection": "close"}
    try:
        connection.request("POST", "/generate", json.dumps(request), head)
        answer = connection.getresponse()
        answer.read()
    except (OSError, HTTPException):
        served.failed += 1
        return 1.0
    finally:
        connection.close()
    if answer.status == 200:
        served.seconds.append(time.monotonic() - begun)
        served.images += int(str(request.get("n", 1)))
        return 0.0
    served.refused += answer.status == 429
    served.failed += answer.status != 429
    return float(answer.headers.get("Retry-After", 1.0))
