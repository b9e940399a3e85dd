"""Which form of an answer an Accept header gets, of those that can hold the model's samples."""

from __future__ import annotations

import pytest

from service.errors import NotAcceptableError
from service.http.negotiation import choose_media_type


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON; charset=utf-8", "application/json"),
        ("image/*", "image/png"),
        ("text/html, image/webp", "image/webp"),
        ("image/png, application/json", "application/json"),
        ("image/png, application/json;q=0.9", "image/png"),
        ("*/*;q=0.1, image/jpeg", "image/jpeg"),
        ("*/*, application/json;q=0", "image/png"),
        ("text/event-stream", "text/event-stream"),
        ("text/html,*/*;q=0.8", "application/json"),
        ("image/png;q=0.5, image/jpeg;q=banana", "image/png"),
    ],
)
def test_the_form_of_the_answer(accept: str, answer: str) -> None:
    assert choose_media_type(accept) == answer


@pytest.mark.parametrize(
    "accept", ["application/pdf", "image/gif", "*/*;q=0", "application/json;q=nan", "json"]
)
def test_no_form(accept: str) -> None:
    with pytest.raises(NotAcceptableError):
        choose_media_type(accept)


@pytest.mark.parametrize(
    ("accept", "channels", "answer"),
    [
        ("application/x-npy", 1, "application/x-npy"),
        ("application/*;q=0.5, application/x-npy", 3, "application/x-npy"),
        ("application/*", 5, "application/json"),
        ("image/*", 5, "image/png"),
        ("image/jpeg", 5, "image/jpeg"),
        ("image/*", 4, "image/png"),
        ("image/jpeg, image/webp;q=0.5", 4, "image/webp"),
        ("image/jpeg, */*;q=0.1", 4, "application/json"),
    ],
)
def test_the_form_that_holds_so_many_channels(accept: str, channels: int, answer: str) -> None:
    assert choose_media_type(accept, channels) == answer


def test_a_jpeg_of_what_is_transparent_is_refused_with_the_reason() -> None:
    with pytest.raises(NotAcceptableError, match="A JPEG has no transparency") as refused:
        choose_media_type("image/jpeg", 4)
    assert "image/jpeg" not in refused.value.detail
    with pytest.raises(NotAcceptableError) as refused:
        choose_media_type("image/gif", 3)
    assert "JPEG" not in refused.value.detail
