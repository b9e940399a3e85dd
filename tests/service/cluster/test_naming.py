"""Which model a request is for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from service.cluster.naming import model_named, models_of
from service.http.event_ids import EventIds
from tests.service.tasks.test_sampling import capabilities, prepare


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("weights/a", {"a": "weights/a"}),
        ("weights/a, weights/b/", {"a": "weights/a", "b": "weights/b/"}),
        ("x=weights/a,y=weights/a", {"x": "weights/a", "y": "weights/a"}),
        ("hf:owner/name@abc", {"name": "hf:owner/name@abc"}),
        ("faces=hf:owner/name@abc", {"faces": "hf:owner/name@abc"}),
    ],
)
def test_models_have_names(text: str, models: dict[str, str]) -> None:
    assert models_of(text) == models


@pytest.mark.parametrize("text", ["", ",", "a=", "=", "x/a,y/a", "/"])
def test_models_without_a_name_or_with_the_same_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="model"):
        models_of(text)


def named(body: bytes = b"", query: str = "", path: str = "/generate", **headers: str) -> str | None:
    scope: dict[str, Any] = {
        "type": "http",
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    return asyncio.run(model_named(scope, body))


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n\x89PNG model=no\r\n'
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--x--\r\n'
)


def test_a_request_names_its_model_wherever_its_fields_are() -> None:
    assert named(json.dumps({"n": 1, "model": "b"}).encode(), content_type="application/json") == "b"
    assert named(query="model=b&n=1") == "b"
    assert named(b'{"n": 1}', query="model=b") == "b"
    assert named(FORM, content_type="multipart/form-data; boundary=x") == "b"
    assert named(b"n=1&model=b", content_type="application/x-www-form-urlencoded") == "b"
    assert named(path="/v1/models/b") == "b"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/json"),
        (b'{"model": 3}', "application/json"),
        (b'{"model": ""}', "application/json"),
        (b"[1]", "application/json"),
        (b"\xff{", "application/json"),
        (b"[" * 100_000, "application/json"),
        (FORM[:-40], "multipart/form-data; boundary=x"),
        (FORM, "multipart/form-data"),
        (FORM, "multipart/form-data; boundary=y"),
    ],
)
def test_what_cannot_be_read_names_none(body: bytes, kind: str) -> None:
    assert named(body, content_type=kind) is None


def test_a_stream_that_goes_on_is_of_the_model_that_it_began_with() -> None:
    ids = EventIds(b"a secret that is shared")
    signed = ids.of(prepare({"model": capabilities().name})).at(2, 1)
    assert named(path="/stream", last_event_id=signed) == capabilities().name
    assert named(path="/stream", last_event_id=ids.of(prepare({})).at(2, 1)) is None
    assert named(path="/stream", last_event_id="a:1:2:é:x") is None
