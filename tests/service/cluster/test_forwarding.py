"""What of an answer is passed on when replicas die."""

from __future__ import annotations

import pytest
from starlette.types import Message

from service.cluster.forwarding import Forwarding, NotContinuedError

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/generate",
    "raw_path": b"/generate",
    "query_string": b"a=b",
    "root_path": "",
    "headers": [
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer x"),
        (b"x-session-id", b"s"),
    ],
    "state": {"this": "process"},
}
SIGNED = "job:{}:{}:request:signature"


def start(kind: str = "text/event-stream", status: int = 200) -> Message:
    headers = [(b"content-type", kind.encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(*ids: str, more: bool = True) -> Message:
    text = "".join(f"event: preview\ndata: {{}}\nid: {each}\n\n" for each in ids)
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def test_what_has_not_begun_is_asked_again_as_it_is() -> None:
    request = Forwarding(SCOPE, b"{}")
    assert request.again()
    assert (request.scope["method"], request.body, request.session) == ("POST", b"{}", "s")
    assert "state" not in request.scope


def test_a_stream_goes_on_after_the_last_event_that_was_passed_on() -> None:
    request = Forwarding(SCOPE, b"{}")
    first = [start(), body(SIGNED.format(1, 0)), body(SIGNED.format(2, 1), SIGNED.format(3, 2))]
    assert request.passed(first) == first
    assert request.again()
    assert (request.scope["method"], request.scope["path"], request.body) == ("GET", "/stream", b"")
    assert request.scope["query_string"] == b""
    assert dict(request.scope["headers"]) == {
        b"last-event-id": SIGNED.format(3, 2).encode(),
        b"authorization": b"Bearer x",
        b"x-session-id": b"s",
    }
    rest = body(SIGNED.format(4, 3))
    assert request.passed([start(), rest]) == [rest]
    assert request.again()
    assert dict(request.scope["headers"])[b"last-event-id"] == SIGNED.format(4, 3).encode()


def test_a_comment_is_no_event() -> None:
    request = Forwarding(SCOPE, b"")
    request.passed(
        [start(), body(SIGNED.format(1, 0)), {"type": "http.response.body", "body": b": ping\n\n"}]
    )
    assert request.again()
    assert dict(request.scope["headers"])[b"last-event-id"] == SIGNED.format(1, 0).encode()


@pytest.mark.parametrize("sent", [[start("application/json")], [start()], [start(), body("job:1")]])
def test_another_answer_that_has_begun_cannot_be_whole(sent: list[Message]) -> None:
    request = Forwarding(SCOPE, b"")
    request.passed(sent)
    assert not request.again()


def test_after_the_last_event_nothing_is_missing() -> None:
    request = Forwarding(SCOPE, b"")
    request.passed([start(), body(SIGNED.format(1, 0))])
    assert not request.over
    request.passed([body(SIGNED.format(9, "end"))])
    assert request.over


def test_a_replica_that_does_not_go_on_is_not_passed_on() -> None:
    request = Forwarding(SCOPE, b"")
    request.passed([start(), body(SIGNED.format(1, 0))])
    assert request.again()
    with pytest.raises(NotContinuedError, match="429"):
        request.passed([start("application/problem+json", 429)])
