"""Sends requests to a server in a thread, and makes of each answer what is kept of it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from PIL import Image

from tests.golden.app import build_app
from tests.golden.requests import Ask

FILE = Path(__file__).with_name("golden.json")
PATIENCE_S = 60.0
Record = dict[str, Any]


@contextmanager
def serving(name: str) -> Iterator[httpx.Client]:
    """A client of one of the models, served on a real socket for as long as the block lasts."""
    config = uvicorn.Config(build_app(name), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    give_up = time.monotonic() + PATIENCE_S
    while not server.started:
        assert time.monotonic() < give_up, "the server does not start"
        time.sleep(0.002)
    port = server.servers[0].sockets[0].getsockname()[1]
    # No certificates on loopback.
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, verify=False) as client:
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < give_up, "the service does not become ready"
            time.sleep(0.002)
        yield client
    server.should_exit = True
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the server does not stop"


def answer(client: httpx.Client, ask: Ask) -> Record:
    """Send a request and keep of its answer what does not change from run to run."""
    sent: dict[str, Any] = {"headers": ask.headers, "params": ask.query}
    if ask.files:
        sent |= {"data": ask.body, "files": [(name, ("a.png", data)) for name, data in ask.files]}
    elif ask.content is not None:
        sent["content"] = ask.content
    elif ask.body is not None:
        sent["json"] = ask.body
    response = client.request(ask.method, ask.path, **sent)
    kind = response.headers.get("content-type", "").partition(";")[0]
    record: Record = {"status": response.status_code, "type": kind}
    if kind == "application/problem+json":
        return record | problem(response.json())
    if kind == "application/json":
        return record | {"body": kept(response.json())}
    if kind.startswith("image/"):
        return record | {"picture": picture(response.content)}
    if kind == "text/event-stream":
        return record | watched(response.text)
    assert not response.content, f"{ask.name}: {kind}"
    return record


def problem(body: Mapping[str, Any]) -> Record:
    """Of an error: its code and which fields are wrong. Its words may change."""
    return {"code": body["code"], "fields": sorted(each["field"] for each in body.get("errors", ()))}


def kept(value: Any, *, top: bool = True) -> Any:
    """JSON without what belongs to one run, and with what is in its pictures."""
    if isinstance(value, list):
        return [kept(each, top=False) for each in value]
    if not isinstance(value, dict):
        return value
    left_out = ("id", "timings", "b64_json") if top else ("b64_json",)
    found = {key: kept(each, top=False) for key, each in value.items() if key not in left_out}
    if "b64_json" in value:
        found["picture"] = picture(base64.b64decode(value["b64_json"], validate=True))
    return found


def picture(data: bytes) -> Record:
    """What a file shows and says. Of a JPEG, whose decoders differ, not what it shows."""
    with Image.open(BytesIO(data)) as image:
        image.load()
        found: Record = {"size": list(image.size), "mode": image.mode}
        if image.format != "JPEG":
            found["pixels"] = hashlib.sha256(image.tobytes()).hexdigest()
        written = image.info.get("parameters")
        if written is None:
            comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
            written = comment.removeprefix(b"ASCII\0\0\0").decode("ascii")
    found["parameters"] = json.loads(written) if written else None
    return found


# ── Streams ────────────────────────────────────────────────────────────────────────────────────


def watched(text: str) -> Record:
    """A stream: what was said first and last, and between them each look, by step, image and kind.

    A score's image has several stretches, so the timestep is part of a look's name.
    """
    found: Record = {"looks": {}}
    for name, data in events(text):
        if name == "preview":
            found["steps"] = data["steps"]
            for each in data["images"]:
                look = kept(each)
                timestep = data["timestep"] if "timestep" in data else look["measure"]["timestep"]
                place = f"step {data['step']} t {timestep} image {look['index']} {look['kind']}"
                assert place not in found["looks"], place
                found["looks"][place] = look
        elif name == "queued":
            found["queued"] = {key: data[key] for key in data.keys() - {"id", "position", "eta_s"}}
        else:
            assert name in ("completed", "error"), name
            found[name] = kept(data) if name == "completed" else {"status": data["status"], **problem(data)}
    return found


def events(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of each server-sent event."""
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        fields = {name: value for name, _, value in lines}
        if fields:
            yield fields["event"], json.loads(fields["data"])


def complete(client: httpx.Client, ask: Ask, tries: int = 20) -> Record:
    """The answer with every look of a stream, from as many runs as that takes.

    A slow reader gets the latest look in place of those it has missed.
    """
    found = answer(client, ask)
    for _ in range(tries):
        if len(found.get("looks", ())) >= ask.looks:
            break
        again = answer(client, ask)
        again["looks"] |= found["looks"]
        assert {**found, "looks": 0} == {**again, "looks": 0}, ask.name
        found = again
    assert len(found.get("looks", ())) == ask.looks, f"{ask.name}: {len(found.get('looks', ()))} looks"
    return found
