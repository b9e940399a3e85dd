"""`/generate` and `/stream` over real sockets, with a fake network behind a gate."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice, pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.engine.engine import PREVIEW_INTERVAL_S
from service.engine.messages import Picture
from service.http.answers import encoded
from service.tasks.images import ImageFormat
from tests.service.fakes import EVERYWHERE, SIZE, FakeDenoiser, until
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Sse, Threaded, sse

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def pixels(image: dict[str, Any]) -> bytes:
    return opened(base64.b64decode(image["b64_json"])).tobytes()


def cancelled(server: Threaded) -> float:
    return server.metric("ddpm_cancelled_total")


# ── POST /generate ─────────────────────────────────────────────────────────────────────────────


def test_json_is_the_default(serve: Serve) -> None:
    server = serve()
    request = {"n": 3, "seed": 5, "num_inference_steps": 4, "class_label": "dog", **EVERYWHERE}
    response = server.client.post("/generate", json=request)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "Accept"
    body = response.json()
    assert body.keys() == {"id", "model", "images", "parameters", "timings"}
    assert response.headers["x-job-id"] == body["id"]
    assert body["model"] == "tiny"
    assert body["parameters"]["guidance_scale"] == 2.0
    assert [(i["index"], i["seed"], i["media_type"]) for i in body["images"]] == [
        (0, 5, "image/png"),
        (1, 6, "image/png"),
        (2, 7, "image/png"),
    ]
    assert server.denoiser.widths == [6] * 4


def test_one_seed_gives_the_same_bytes_alone_and_among_others(serve: Serve) -> None:
    client = serve().client
    many = client.post("/generate", json={"n": 4, "seed": 10, "num_inference_steps": 3}).json()["images"]
    for image in many:
        (alone,) = client.post("/generate", json={"seed": image["seed"], "num_inference_steps": 3}).json()[
            "images"
        ]
        assert alone["b64_json"] == image["b64_json"]
    assert len({image["b64_json"] for image in many}) == 4


@pytest.mark.parametrize("media_type", FORMATS)
def test_the_picture_itself(serve: Serve, media_type: str) -> None:
    client = serve().client
    response = client.post(
        "/generate", json={"seed": 1, "num_inference_steps": 2}, headers={"accept": media_type}
    )
    assert response.headers["content-type"] == media_type
    assert response.headers["vary"] == "Accept"
    image = opened(response.content)
    assert (image.format, image.size) == (FORMATS[media_type], (SIZE, SIZE))


def test_several_pictures_come_on_a_sheet(serve: Serve) -> None:
    client = serve().client
    request = {"n": 3, "seed": 1, "num_inference_steps": 2}
    sheet = opened(client.post("/generate", json=request, headers={"accept": "image/png"}).content)
    assert sheet.size == (2 * SIZE + 2, 2 * SIZE + 2)
    assert json.loads(sheet.info["parameters"])["n"] == 3
    images = client.post("/generate", json=request).json()["images"]
    tile = np.asarray(sheet)[SIZE + 2 :, :SIZE]
    assert tile.tobytes() == pixels(images[2])


def test_a_sheet_is_enlarged_as_a_whole(serve: Serve) -> None:
    client = serve().client
    request = {"n": 3, "seed": 1, "num_inference_steps": 2}
    png = {"accept": "image/png"}
    small = np.asarray(opened(client.post("/generate", json=request, headers=png).content))
    large = np.asarray(opened(client.post("/generate", json={**request, "scale": 5}, headers=png).content))
    assert large.tobytes() == np.kron(small, np.ones((5, 5), np.uint8)).tobytes()


def test_a_stream_is_enlarged(serve: Serve) -> None:
    with serve().client.stream("GET", "/stream?num_inference_steps=2&scale=3") as response:
        (*_, preview, completed) = sse(response)
    for event in (preview, completed):
        image = opened(base64.b64decode(event.data["images"][0]["b64_json"]))
        assert image.size == (3 * SIZE, 3 * SIZE)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_json_holds_pictures_of_any_format(serve: Serve, image_format: str) -> None:
    request = {"num_inference_steps": 1, "output_format": image_format}
    (image,) = serve().client.post("/generate", json=request).json()["images"]
    assert image["media_type"] == f"image/{image_format}"
    assert opened(base64.b64decode(image["b64_json"])).format == image_format.upper()


def test_events_of_a_post(serve: Serve) -> None:
    server = serve()
    with server.client.stream(
        "POST", "/generate", json={"num_inference_steps": 2}, headers={"accept": "text/event-stream"}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(sse(response))
    assert (events[0].name, events[-1].name) == ("queued", "completed")


def test_no_answer_in_that_form(serve: Serve) -> None:
    server = serve()
    response = server.client.post("/generate", json={}, headers={"accept": "application/pdf"})
    body = problem(response, 406, "not_acceptable")
    assert "image/png" in str(body["detail"])
    assert response.headers["vary"] == "Accept"
    assert server.denoiser.starts == []


# ── Lists ──────────────────────────────────────────────────────────────────────────────────────


def parameters(image: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(opened(base64.b64decode(image["b64_json"])).info["parameters"])
    return found


def test_a_list_of_classes_gives_the_bytes_of_single_requests(serve: Serve) -> None:
    client = serve().client
    shared: dict[str, Any] = {"num_inference_steps": 3, **EVERYWHERE}
    asked = {"class_label": ["dog", None, 0], "seed": [7, 7, 40], **shared}
    body = client.post("/generate", json=asked).json()
    assert body["parameters"]["class_label"] == ["dog", None, "cat"]
    assert body["parameters"]["seed"] == [7, 7, 40]
    images = body["images"]
    assert [(image["seed"], image["class_label"]) for image in images] == [(7, "dog"), (7, None), (40, "cat")]
    for image in images:
        single = {"class_label": image["class_label"], "seed": image["seed"], **shared}
        (alone,) = client.post("/generate", json=single).json()["images"]
        assert alone["b64_json"] == image["b64_json"]
        own = parameters(image)
        assert own["n"] == 1
        again = client.post("/generate", json={name: own[name] for name in own.keys() - {"model"}})
        assert again.json()["images"][0]["b64_json"] == image["b64_json"]
    sheet = client.post("/generate", json=asked, headers={"accept": "image/png"})
    assert json.loads(opened(sheet.content).info["parameters"])["class_label"] == ["dog", None, "cat"]


def test_a_list_in_a_query_and_in_a_form(serve: Serve) -> None:
    client = serve().client
    asked = [("class_label", "dog"), ("class_label", ""), ("seed", "7"), ("seed", "9")]
    query = httpx.QueryParams([*asked, ("num_inference_steps", "2"), ("preview", "x0")])
    with client.stream("GET", "/stream", params=query) as response:
        events = list(sse(response))
    assert events[0].data["seed"] == [7, 9]
    assert [image["class_label"] for image in events[1].data["images"]] == ["dog", None]
    json_body = {"class_label": ["dog", None], "seed": [7, 9], "num_inference_steps": 2}
    images = client.post("/generate", json=json_body).json()["images"]
    assert events[-1].data["images"] == images
    one = [("class_label", "dog"), ("class_label", ""), ("seed", "7"), ("num_inference_steps", "2")]
    form = client.post("/generate", files=[(name, (None, value)) for name, value in one]).json()
    assert (form["parameters"]["class_label"], form["parameters"]["seed"]) == (["dog", None], 7)


def test_an_entry_that_is_refused_is_named(serve: Serve) -> None:
    client = serve().client
    for field, entries, message in (
        ("class_label", ["dog", "bird"], "Index 1: Unknown class."),
        ("seed", [1, 2, -1], "Index 2: Input should be greater than or equal to 0"),
    ):
        body = problem(client.post("/generate", json={field: entries}), 422, "invalid_request")
        assert str(body["detail"]).removeprefix(f"{field}: ").startswith(message)
        assert str(body["errors"]).count("'message'") == 1


# ── Refusals ───────────────────────────────────────────────────────────────────────────────────


def test_exactly_as_many_as_there_are_slots_for(serve: Serve) -> None:
    server = serve(max_queue=4)
    server.gate.shut()

    def ask(seed: int) -> httpx.Response:
        return server.client.post("/generate", json={"seed": seed, "num_inference_steps": 2})

    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(ask, seed) for seed in range(40)]
        until(lambda: sum(answer.done() for answer in asked) == 36, "36 refusals")
        server.gate.open()
        answers = [answer.result() for answer in asked]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 36
    for answer in refused:
        problem(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    assert sorted(server.denoiser.starts) == sorted(
        answer.json()["images"][0]["seed"] for answer in answers if answer.status_code == 200
    )
    assert server.metric("ddpm_rejected_total", reason="queue_full") == 36


def test_a_stream_is_refused_by_a_status_and_not_by_an_event(serve: Serve) -> None:
    server = serve(max_queue=1)
    server.gate.shut()
    with server.client.stream("GET", "/stream") as running:
        assert running.status_code == 200
        problem(server.client.get("/stream"), 429, "queue_full")
        server.gate.open()
        list(sse(running))
    until(lambda: server.client.get("/stream?num_inference_steps=1").status_code == 200)


def test_a_deadline_that_cannot_be_met(serve: Serve) -> None:
    server = serve()
    for response in (
        server.client.post("/generate", json={"deadline_s": 1e-6}),
        server.client.get("/stream", params={"deadline_s": "1e-6"}),
    ):
        problem(response, 504, "deadline_exceeded")
    assert server.denoiser.starts == []
    assert server.metric("ddpm_rejected_total", reason="deadline_exceeded") == 2


def test_a_deadline_that_passes_while_running(serve: Serve) -> None:
    server = serve(deadline_s=0.3)
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.client.post, "/generate", json={"num_inference_steps": 50})
        server.gate.wait_for_arrival(1)
        (job,) = server.state.engine._in_flight.values()
        until(lambda: time.monotonic() > (job.spec.deadline or 0), "the deadline")
        server.gate.allow(1)
        problem(asked.result(), 504, "deadline_exceeded")
        server.gate.open()
    until(lambda: server.state.engine.idle)
    assert server.gate.arrived <= 2  # the one that had been launched, and no more


def test_a_nan_is_a_500_of_its_own(serve: Serve) -> None:
    server = serve(FakeDenoiser(gives_nan={7}))
    problem(server.client.post("/generate", json={"seed": 7}), 500, "non_finite")
    assert server.client.post("/generate", json={"seed": 8}).status_code == 200
    assert server.metric("ddpm_nonfinite_total") == 1


def test_an_error_in_a_stream_is_its_last_event(serve: Serve) -> None:
    server = serve(FakeDenoiser(raises={7: ValueError}))
    with server.client.stream("GET", "/stream?seed=7") as response:
        events = list(sse(response))
    assert [event.name for event in events] == ["queued", "error"]
    assert events[-1].data["code"] == "compute_failed"
    assert events[-1].data["status"] == 500


# ── GET /stream ────────────────────────────────────────────────────────────────────────────────


def read_in_step(server: Threaded, response: httpx.Response) -> list[Sse]:
    """Every event of a stream, the gate letting a step through for each event read."""
    events = []
    for event in sse(response):
        events.append(event)
        server.gate.allow(1)
    return events


def test_a_reader_that_keeps_up_sees_the_whole_chain(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    query = "/stream?seed=3&num_inference_steps=50&preview_every=1"
    with server.client.stream("GET", query) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        events = read_in_step(server, response)
    names = [event.name for event in events]
    assert names == ["queued", *["preview"] * 50, "completed"]
    job_id = events[0].data["id"]
    assert [event.id for event in events] == [f"{job_id}:{number}" for number in range(1, 53)]
    assert events[0].data.keys() == {"id", "position", "eta_s", "seed"}
    previews = [event.data for event in events[1:-1]]
    assert [preview["step"] for preview in previews] == list(range(1, 51))
    assert all(preview["steps"] == 50 for preview in previews)
    assert all(a["timestep"] > b["timestep"] for a, b in pairwise(previews))
    assert previews[-1]["eta_s"] == 0 < previews[0]["eta_s"]
    assert previews[0]["images"][0]["kind"] == "x0"
    assert len({preview["images"][0]["b64_json"] for preview in previews}) == 50
    assert events[-1].data["id"] == job_id
    server.gate.open()
    (alone,) = server.client.post("/generate", json={"seed": 3, "num_inference_steps": 50}).json()["images"]
    assert events[-1].data["images"][0]["b64_json"] == alone["b64_json"]
    assert server.metric("ddpm_time_to_first_preview_seconds_count") == 1


def test_by_default_a_long_chain_has_few_previews_and_always_the_first_and_the_last(serve: Serve) -> None:
    server = serve()
    begun = time.monotonic()
    with server.client.stream("GET", "/stream?num_inference_steps=100") as response:
        steps = [event.data["step"] for event in sse(response) if event.name == "preview"]
    assert (steps[0], steps[-1]) == (1, 100)
    assert len(steps) <= 3 + (time.monotonic() - begun) / PREVIEW_INTERVAL_S


def test_a_reader_that_does_not_keep_up_gets_the_latest(serve: Serve) -> None:
    server = serve()
    with server.client.stream(
        "GET", "/stream?n=2&num_inference_steps=100&preview_every=1&preview=both"
    ) as stream:
        events = list(sse(stream))
    assert (events[0].name, events[-1].name) == ("queued", "completed")
    steps = [event.data["step"] for event in events[1:-1]]
    assert steps == sorted(steps)
    assert steps[-1] == 100
    kinds = {(image["index"], image["kind"]) for image in events[-2].data["images"]}
    assert kinds == {(0, "x0"), (0, "xt"), (1, "x0"), (1, "xt")}


def test_a_quiet_stream_is_kept_open_by_pings(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.respond.PING_S", 0.02)
    server = serve()
    server.gate.shut()
    with server.client.stream("GET", "/stream?num_inference_steps=2") as response:
        lines = response.iter_lines()
        assert [line for line in islice(lines, 12) if line.startswith(":")][:2] == [": ping", ": ping"]
        server.gate.open()
        assert "event: completed" in list(lines)


@pytest.mark.parametrize(
    ("image_format", "size", "scale", "inline"),
    [
        ("png", 20, 1, True),
        ("png", 200, 1, False),
        ("png", 20, 16, False),
        ("jpeg", 60, 1, True),
        ("jpeg", 70, 1, False),
        ("webp", 70, 1, False),
    ],
)
def test_large_pictures_are_encoded_on_another_thread(
    image_format: ImageFormat, size: int, scale: int, inline: bool
) -> None:
    pictures = (Picture(0, 0, "xt", np.zeros((size, size, 1), np.uint8)),)

    def thread() -> bytes:
        return str(threading.get_ident()).encode()

    found = asyncio.run(encoded(thread, pictures, image_format, scale))
    assert (found == thread()) == inline


def test_no_previews_when_none_are_wanted(serve: Serve) -> None:
    with serve().client.stream("GET", "/stream?preview=none") as response:
        assert [event.name for event in sse(response)] == ["queued", "completed"]


# ── Reconnecting ───────────────────────────────────────────────────────────────────────────────


def test_a_reconnect_goes_back_to_the_same_job(serve: Serve) -> None:
    server = serve(stream_grace_s=30)
    server.gate.shut()
    query = "/stream?n=2&num_inference_steps=6&preview_every=1"
    with server.client.stream("GET", query) as first:
        events = sse(first)
        seen = [next(events)]
        for _ in range(2):
            server.gate.allow(1)
            seen.append(next(events))
    with server.client.stream("GET", query, headers={"last-event-id": seen[-1].id}) as second:
        server.gate.allow(1)
        rest = read_in_step(server, second)
    job_id = seen[0].data["id"]
    assert rest[-1].name == "completed"
    assert rest[-1].data["id"] == job_id
    numbers = [int(event.id.removeprefix(f"{job_id}:")) for event in seen + rest]
    assert numbers == sorted(set(numbers))
    assert "queued" not in [event.name for event in rest]
    assert len(server.denoiser.starts) == 2  # two images, and no second chain
    assert cancelled(server) == 0
    # It has it all: an EventSource that comes once more is told to stop.
    over = server.client.get(query, headers={"last-event-id": rest[-1].id})
    assert (over.status_code, over.content) == (204, b"")
    # One that missed the last event gets it again.
    with server.client.stream("GET", query, headers={"last-event-id": rest[-2].id}) as third:
        assert [event.id for event in sse(third)] == [rest[-1].id]
    assert len(server.denoiser.starts) == 2


def test_a_reconnect_while_the_lost_connection_still_hangs(serve: Serve) -> None:
    """The new reader takes over, and the end of the old one is no reason to abandon the job."""
    server = serve(stream_grace_s=0)
    server.gate.shut()
    query = "/stream?num_inference_steps=4&preview_every=1"
    with server.client.stream("GET", query) as first:
        former = sse(first)
        queued = next(former)
        with server.client.stream("GET", query, headers={"last-event-id": queued.id}) as second:
            assert list(former) == []  # it was ended in the new one's favour
            server.gate.allow(1)
            events = read_in_step(server, second)
    assert [event.name for event in events] == ["preview"] * 4 + ["completed"]
    assert len(server.denoiser.starts) == 1
    assert cancelled(server) == 0


@pytest.mark.parametrize(
    "last", ["", "nonsense", "0123456789abcdef:1", ":", "a:b", "x:" + "9" * 5000, "x:²"], ids=range(7)
)
def test_nothing_to_go_back_to(serve: Serve, last: str) -> None:
    server = serve()
    response = server.client.get("/stream", headers=[(b"last-event-id", last.encode("latin-1"))])
    assert response.status_code == 204
    assert server.denoiser.starts == []


@pytest.mark.parametrize("name", ["lastEventId", "evs_last_event_id"])
def test_a_polyfill_reconnects_by_its_query(serve: Serve, name: str) -> None:
    server = serve(stream_grace_s=30)
    server.gate.shut()
    query = {"num_inference_steps": "3", "preview": "none", "evs_preamble": "2056", name: ""}
    with server.client.stream("GET", "/stream", params=query) as first:
        seen = next(sse(first))
        assert first.headers["cache-control"] == "no-cache, no-transform"
    server.gate.open()
    with server.client.stream("GET", "/stream", params={**query, name: seen.id}) as second:
        assert [event.data["id"] for event in sse(second)] == [seen.data["id"]]
    assert len(server.denoiser.starts) == 1


def test_a_malformed_number_does_not_disturb_the_job(serve: Serve) -> None:
    server = serve(stream_grace_s=0)
    server.gate.shut()
    with server.client.stream("GET", "/stream?num_inference_steps=2&preview=none") as stream:
        events = sse(stream)
        job_id = next(events).data["id"]
        for number in ("x", "9" * 5000, ""):
            response = server.client.get("/stream", headers={"last-event-id": f"{job_id}:{number}"})
            assert response.status_code == 204
        server.gate.open()
        assert [event.name for event in events] == ["completed"]


# ── Clients that go ────────────────────────────────────────────────────────────────────────────


def test_client_disconnect_cancels_its_post(serve: Serve) -> None:
    neighbour_alone = FakeDenoiser()
    serve(neighbour_alone).client.post("/generate", json={"seed": 9, "num_inference_steps": 6})

    server = serve()
    server.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(server.client.post, "/generate", json={"seed": 9, "num_inference_steps": 6})
        server.gate.wait_for_arrival(1)
        going = httpx.Client(base_url=server.url, timeout=httpx.Timeout(60, read=0.2), verify=False)
        leaving = pool.submit(going.post, "/generate", json={"seed": 1, "num_inference_steps": 60})
        until(lambda: len(server.state.engine._in_flight) == 2, "the second job")
        server.gate.allow(1)
        server.gate.wait_for_arrival(2)
        assert sorted({seed for seed, _ in server.denoiser.seen}) == [9]
        with pytest.raises(httpx.ReadTimeout):
            leaving.result()
        going.close()
        until(lambda: len(server.state.streams._streams) == 1, "the disconnect")
        server.gate.open()
        assert staying.result().status_code == 200
    steps_of_the_gone = sum(seed == 1 for seed, _ in server.denoiser.seen)
    assert steps_of_the_gone <= 2
    assert {key: x for key, x in server.denoiser.seen.items() if key[0] == 9} == neighbour_alone.seen
    until(lambda: server.state.engine.idle)
    assert cancelled(server) == 1


def test_client_disconnect_of_a_stream_leaves_a_grace_period(serve: Serve) -> None:
    server = serve(stream_grace_s=0.2)
    server.gate.shut()
    with server.client.stream("GET", "/stream?num_inference_steps=60") as response:
        next(sse(response))
        server.gate.wait_for_arrival(1)
    until(lambda: server.state.streams.followed == 0, "the disconnect")
    assert len(server.state.streams._streams) == 1  # within the grace
    until(lambda: not server.state.streams._streams, "the end of the grace")
    server.gate.open()
    until(lambda: server.state.engine.idle)
    assert cancelled(server) == 1
    assert len(server.denoiser.seen) <= 2


def test_a_client_that_stays_is_not_cancelled(serve: Serve) -> None:
    server = serve(stream_grace_s=0)
    server.client.post("/generate", json={"num_inference_steps": 3})
    with server.client.stream("GET", "/stream?num_inference_steps=3") as response:
        list(sse(response))
    until(lambda: server.state.engine.idle and not server.state.streams._streams)
    assert cancelled(server) == 0


def test_the_wire_format_of_an_event(serve: Serve) -> None:
    text = serve().client.get("/stream?num_inference_steps=1&preview=none").text
    event = r"event: (queued|completed)\ndata: \{.*\}\nid: [0-9a-f]{16}:\d+\n\n"
    assert re.fullmatch(f"({event}){{2}}", text)


def test_a_form_gives_the_bytes_that_json_gives(serve: Serve) -> None:
    client = serve().client
    asked = {"n": 2, "seed": 7, "class_label": "dog", "num_inference_steps": 3}
    form = {name: (None, str(value)) for name, value in asked.items()}  # multipart, though there is no file
    answers = [client.post("/generate", json=asked), client.post("/generate", files=form)]
    images = [answer.json()["images"] for answer in answers]
    assert images[0] == images[1]
    assert len(images[0]) == 2
