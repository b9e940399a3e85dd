"""Which form of an answer an Accept header gets, of those that can hold the model's samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from service.errors import NotAcceptableError
from service.http.negotiation import MAX_ACCEPT, MEDIA, choose_media_type
from tests.service.http.test_problems import problem
from tests.service.live import Serve


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
        ("application/json;q=banana, */*;q=0.1", "application/json"),
        ("image/png;q=1.5, image/webp;q=0.1", "image/webp"),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "image/jpeg"),
        ("*/*;q=.2", "application/json"),
        ("image/png;q=1., image/webp;q=0.9", "image/png"),
        ("application/json;v=1, application/json;q=0, image/png;q=0.1", "image/png"),
        ("image/png;v=1;q=0.1, image/*;q=0.9", "image/jpeg"),
        ("image/png;q=, image/webp;q=0.5", "image/webp"),
        ('image/gif;a="x, image/webp", image/png;q=0.1', "image/png"),
        ('image/png;a="b\\"c;q=0", image/webp;q=0.5', "image/png"),
        ('image/webp;a="', "image/webp"),
    ],
)
def test_the_form_of_the_answer(accept: str, answer: str) -> None:
    assert choose_media_type(accept) == answer


@pytest.mark.parametrize(
    "accept",
    ["application/pdf", "image/gif", "*/*;q=0", "application/json;q=nan", "json", ",", "*", "*/json", ";q=1"],
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


# ── Checked by werkzeug ────────────────────────────────────────────────────────────────────────

RANGES = (*MEDIA, "*/*", "image/*", "application/*", "text/*", "text/html", "image/gif", "*/png", "*", "json")
WEIGHTS = st.one_of(
    st.none(),
    st.integers(0, 1000).map(lambda thousandths: f"{thousandths / 1000:g}"),
    st.sampled_from(["0", "1", "0.0", "1.000", "0.5", "1.001", "2", "-1", "-0.5", "nan", "inf", "1e-1", "x"]),
)
SPACES = st.sampled_from(["", " ", "\t", "  "])


def expected(header: str) -> str | None:
    """The first that we offer of those with the best quality: of a tie RFC 9110 leaves the choice to us.

    So its `best_match` would not do, which takes the type that the more specific range has named.
    """
    accepted = parse_accept_header(header, MIMEAccept)
    qualities = {offered: accepted.quality(offered) for offered in MEDIA}
    best = max(qualities.values())
    return next(offered for offered in MEDIA if qualities[offered] == best) if best > 0 else None


def chosen(header: str) -> str | None:
    try:
        return choose_media_type(header)
    except NotAcceptableError:
        return None


@st.composite
def headers(draw: st.DrawFn, parameters: st.SearchStrategy[str]) -> tuple[str, str]:
    """An Accept header, and the same without parameters. No range comes twice."""
    full, plain = [], []
    for pattern in draw(st.lists(st.sampled_from(RANGES), min_size=1, max_size=6, unique=True)):
        name = draw(st.sampled_from([pattern, pattern.upper(), pattern.title()]))
        weight, before, after = draw(WEIGHTS), draw(SPACES), draw(SPACES)
        quality = "" if weight is None else f"{before};{after}{draw(st.sampled_from('qQ'))}={weight}"
        full.append(f"{before}{name}{draw(parameters)}{quality}{after}")
        plain.append(f"{name}{quality}")
    return ",".join(full), ",".join(plain)


@given(headers(st.just("")))
def test_weights_and_wildcards_mean_what_werkzeug_says(header: tuple[str, str]) -> None:
    assert chosen(header[0]) == expected(header[0])


@given(st.lists(st.tuples(st.sampled_from(RANGES), WEIGHTS), min_size=1, max_size=6))
def test_of_ranges_that_come_twice_the_same_one_counts(ranges: list[tuple[str, str | None]]) -> None:
    header = ", ".join(name if weight is None else f"{name};q={weight}" for name, weight in ranges)
    assert chosen(header) == expected(header)


@given(
    headers(st.sampled_from(["", ";charset=utf-8", ' ; a="b, c"', ';v=1;a="x;q=0"', '; a="\\", image/png"']))
)
def test_parameters_change_nothing(header: tuple[str, str]) -> None:
    """By the RFC, and for werkzeug, such a range is none of our types; but many clients send a charset."""
    assert chosen(header[0]) == expected(header[1])


@pytest.mark.parametrize("path", ["/generate", "/edit", "/score", "/interpolate", "/jobs/a"])
def test_a_very_long_header_is_refused_unread(
    serve: Serve, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve().client
    monkeypatch.setattr("service.http.negotiation.choose_media_type", lambda *_: pytest.fail("it is read"))
    method = "GET" if path == "/jobs/a" else "POST"
    for headers in ([("accept", "a/b," * MAX_ACCEPT)], 5 * [("accept", "a" * (MAX_ACCEPT // 4))]):
        problem(client.request(method, path, headers=headers), 406, "not_acceptable")


def test_a_header_of_a_picture_is_bounded_too(serve: Serve) -> None:
    client = serve().client
    refused = client.get("/generate", headers={"accept": "image/*," * MAX_ACCEPT})
    problem(refused, 406, "not_acceptable")
    padded = "image/*" + "," * (MAX_ACCEPT - 7)
    assert client.get("/generate?num_inference_steps=1", headers={"accept": padded}).status_code == 200
