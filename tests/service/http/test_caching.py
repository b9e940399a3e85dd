"""`GET /generate`: a picture by its address, which caches may keep where a seed decides it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from PIL import Image
from werkzeug.datastructures import ResponseCacheControl
from werkzeug.http import parse_cache_control_header, parse_etags

from service.engine.messages import Invariance
from service.http.caching import entity_tag, kept, matches
from tests.service.fakes import SIZE, fake_info
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Threaded, serving, sse
from tests.service.tasks.test_sampling import capabilities, prepare

SHORT = {"num_inference_steps": 2}
CHROME_IMG = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
CHROME_PAGE = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
)
FIREFOX_IMG = "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5"


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    start = serving()
    yield next(start)()
    next(start, None)


def get(server: Threaded, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return server.client.get("/generate", params={**SHORT, **fields}, headers=headers)


def evaluations(server: Threaded) -> float:
    return server.metric("ddpm_steps_total")


# ── The form of the answer ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("accept", ["*/*", CHROME_IMG, CHROME_PAGE, FIREFOX_IMG, "image/webp,*/*;q=0.1"])
def test_a_browser_gets_a_png(server: Threaded, accept: str) -> None:
    answer = get(server, {"accept": accept}, seed=7, class_label="dog")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["vary"] == "Accept"
    asked = {**SHORT, "seed": 7, "class_label": "dog"}
    posted = server.client.post("/generate", json=asked, headers={"accept": "image/png"})
    assert answer.content == posted.content


@pytest.mark.parametrize(
    ("accept", "output_format", "media_type"),
    [
        (CHROME_IMG, "webp", "image/webp"),
        ("*/*", "jpeg", "image/jpeg"),
        ("*/*", "npy", "application/x-npy"),
        ("image/webp", "png", "image/webp"),
        ("application/json", "webp", "application/json"),
        ("application/json, text/plain, */*", "png", "image/png"),
    ],
)
def test_another_form(server: Threaded, accept: str, output_format: str, media_type: str) -> None:
    answer = get(server, {"accept": accept}, seed=7, output_format=output_format)
    assert answer.headers["content-type"] == media_type


def test_events_where_nothing_else_is_accepted(server: Threaded) -> None:
    with server.client.stream(
        "GET", "/generate", params=SHORT, headers={"accept": "text/event-stream"}
    ) as answer:
        events = list(sse(answer))
    assert events[-1].name == "completed"
    assert answer.headers["x-job-id"] == events[-1].data["id"]


def test_several_images_are_a_sheet(server: Threaded) -> None:
    answer = server.client.get("/generate?seed=7&seed=9&class_label=dog&class_label=&num_inference_steps=2")
    image = Image.open(BytesIO(answer.content))
    assert image.size == (2 * SIZE + 2, SIZE)
    assert json.loads(image.info["parameters"])["seed"] == [7, 9]


def test_a_form_that_is_not_offered(server: Threaded) -> None:
    problem(get(server, {"accept": "image/gif"}), 406, "not_acceptable")


# ── What caches are told ───────────────────────────────────────────────────────────────────────


def test_a_picture_with_a_seed_is_kept(server: Threaded) -> None:
    answer = get(server, seed=7)
    found = parse_cache_control_header(answer.headers["cache-control"], cls=ResponseCacheControl)
    assert (found.public, found.max_age, found.immutable) == (True, 31536000, True)
    assert answer.headers["etag"].startswith('"')
    assert get(server, seed=7).headers["etag"] == answer.headers["etag"]
    assert get(server, seed=7).content == answer.content


def test_a_request_that_means_the_same_has_the_same_tag(server: Threaded) -> None:
    tag = get(server, seed=7, class_label="dog").headers["etag"]
    asked: dict[str, Any] = {"seed": 7, "class_label": "dog"}
    for same in ({"n": 1}, {"class_label": "DOG"}, {"class_label": 1}, {"deadline_s": 20, "preview": "none"}):
        assert get(server, **(asked | same)).headers["etag"] == tag
    for other in ({"n": 2}, {"class_label": "cat"}, {"seed": 8}, {"scale": 2}, {"output_format": "webp"}):
        assert get(server, **(asked | other)).headers["etag"] != tag
    assert get(server, {"accept": "image/webp"}, seed=7, class_label="dog").headers["etag"] != tag


def test_without_a_seed_nothing_is_kept(server: Threaded) -> None:
    answer = get(server)
    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers
    answer = get(server, {"accept": "application/json"}, seed=7)  # it has an id and timings
    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers


def test_no_error_is_kept(server: Threaded) -> None:
    for answer in (get(server, seed=7, eta=2), get(server, seed=7, deadline_s=1e-6)):
        assert answer.status_code in (422, 504)
        assert answer.headers["cache-control"] == "no-store"
        assert "etag" not in answer.headers


def test_with_keys_it_is_not_for_everybody(serve: Serve) -> None:
    server = serve(api_keys="secret")
    assert get(server, seed=7).status_code == 401
    answer = get(server, {"authorization": "Bearer secret"}, seed=7)
    assert answer.headers["cache-control"].startswith("private, max-age=")


@pytest.mark.parametrize("given", ["{}", "W/{}", '"other", {}', '"a,b" , W/{}', "*"])
def test_what_the_client_has_is_not_computed_again(server: Threaded, given: str) -> None:
    first = get(server, seed=7)
    before = evaluations(server)
    again = get(server, {"if-none-match": given.format(first.headers["etag"])}, seed=7)
    assert (again.status_code, again.content) == (304, b"")
    for name in ("etag", "cache-control", "vary"):
        assert again.headers[name] == first.headers[name]
    assert evaluations(server) == before > 0


def test_what_it_has_not_is(server: Threaded) -> None:
    first = get(server, seed=7)
    assert get(server, {"if-none-match": '"other"'}, seed=7).content == first.content
    assert get(server, {"if-none-match": "*"}).status_code == 200  # without a seed there is nothing to have
    given = {"if-none-match": "*"}
    problem(get(server, given, seed=7, eta=2), 422, "invalid_request")
    problem(get(server, given, seed=7, class_label="bird"), 422, "invalid_request")


def test_head_computes_nothing(server: Threaded) -> None:
    first = get(server, seed=7)
    before = evaluations(server)
    head = server.client.head("/generate", params={**SHORT, "seed": 7})
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "cache-control", "vary", "content-type"):
        assert head.headers[name] == first.headers[name]
    assert "content-length" not in head.headers
    known = {"if-none-match": first.headers["etag"]}
    assert server.client.head("/generate", params={**SHORT, "seed": 7}, headers=known).status_code == 304
    assert server.client.head("/generate").headers["cache-control"] == "no-store"
    assert evaluations(server) == before


# ── Tags ───────────────────────────────────────────────────────────────────────────────────────


def test_a_tag_names_all_that_decides_the_bytes() -> None:
    model, engine, prepared = capabilities(), fake_info(), prepare({"seed": 7})
    tags = {
        entity_tag(prepared, "image/png", model, engine),
        entity_tag(prepared, "image/webp", model, engine),
        entity_tag(prepare({"seed": 8}), "image/png", model, engine),
        entity_tag(prepared, "image/png", replace(model, checksum="other"), engine),
        entity_tag(prepared, "image/png", replace(model, name="other"), engine),
        entity_tag(prepared, "image/png", model, replace(engine, device="cuda:0")),
        entity_tag(prepared, "image/png", model, replace(engine, dtype="bfloat16")),
        entity_tag(prepared, "image/png", model, replace(engine, runtime="torch")),
        entity_tag(prepared, "image/png", model, replace(engine, runtime="torch", max_batch_size=64)),
    }
    assert len(tags) == 9


def test_where_neighbours_change_bits_a_tag_is_weak() -> None:
    model, prepared = capabilities(), prepare({"seed": 7})
    engine = replace(fake_info(), invariance=Invariance((2,), 1e-7))
    assert parse_etags(entity_tag(prepared, "image/png", model, engine)).as_set(include_weak=True)
    assert not parse_etags(entity_tag(prepared, "image/png", model, engine)).as_set()


@pytest.mark.parametrize(
    "header", ["", '"a"', 'W/"a"', '"b"', '"b", "a"', '"b" ,W/"a" ', "*", '"a,b"', "a", '"b", *']
)
def test_a_header_names_a_tag_as_another_reader_finds(header: str) -> None:
    for tag in ('"a"', 'W/"a"'):
        if header in ("a", '"b", *'):  # neither is a tag nor a list of tags
            assert not matches(header, tag)
        else:
            assert matches(header, tag) == parse_etags(header).contains_weak("a")


def test_a_year_is_for_ever() -> None:
    assert kept('"a"', private=True) == {
        "ETag": '"a"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
