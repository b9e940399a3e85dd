"""`/jobs/{id}` and `Prefer: respond-async` over real sockets, with a fake network behind a gate."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.http.jobs import OVERHEAD
from tests.service.fakes import SIZE, FakeDenoiser, until
from tests.service.http.routes.test_generate import opened
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Threaded, serving, sse
from tests.service.tasks.test_edit import IMAGE

ASYNC = {"prefer": "respond-async"}
UPLOAD = base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def shared() -> Iterator[Threaded]:
    """For what needs no settings of its own, and leaves nothing in flight."""
    start = serving()
    yield next(start)()
    next(start, None)


def begin(server: Threaded, path: str = "/generate", **fields: Any) -> str:
    """Start a job that goes on by itself. Its address."""
    answer = server.client.post(path, json={"num_inference_steps": 4, **fields}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.json()["id"] == answer.headers["x-job-id"]
    assert answer.headers["location"] == f"/jobs/{answer.headers['x-job-id']}"
    return answer.headers["location"]


def state_of(server: Threaded, address: str) -> str:
    answer = server.client.get(address)
    return str(answer.json()["state"]) if answer.status_code == 200 else str(answer.status_code)


def ended(server: Threaded, address: str) -> dict[str, Any]:
    until(lambda: state_of(server, address) not in ("waiting", "running"), "its end")
    found: dict[str, Any] = server.client.get(address).json()
    return found


# ── Results ────────────────────────────────────────────────────────────────────────────────────


def test_a_job_goes_on_by_itself_and_keeps_its_result(shared: Threaded) -> None:
    asked: dict[str, Any] = {"n": 2, "seed": 7, "class_label": "dog"}
    address = begin(shared, **asked)
    body = ended(shared, address)
    assert body.keys() == {"id", "state", "result"}
    assert (body["state"], address) == ("finished", f"/jobs/{body['id']}")
    awaited = shared.client.post("/generate", json={"num_inference_steps": 4, **asked})
    result = body["result"]
    for name in ("images", "parameters", "model"):
        assert result[name] == awaited.json()[name]
    png = {"accept": "image/png"}
    picture = shared.client.get(address, headers=png)
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["cache-control"] == "no-store"
    sent = shared.client.post("/generate", json={"num_inference_steps": 4, **asked}, headers=png)
    assert picture.content == sent.content
    problem(shared.client.get(address, headers={"accept": "image/gif"}), 406, "not_acceptable")


@pytest.mark.parametrize(
    ("path", "fields", "key"),
    [
        ("/edit", {"image": UPLOAD, "strength": 0.5}, "images"),
        ("/interpolate", {"seeds": [1, 2], "points": 3}, "images"),
        ("/score", {"images": [UPLOAD], "terms": 3}, "scores"),
    ],
)
def test_every_kind_of_job(shared: Threaded, path: str, fields: dict[str, Any], key: str) -> None:
    asked = fields if "seeds" in fields else {**fields, "seed": 5}
    answer = shared.client.post(path, json=asked, headers=ASYNC)
    assert answer.status_code == 202
    body = ended(shared, answer.headers["location"])
    again = shared.client.post(path, json=asked)
    assert body["result"][key] == again.json()[key]


@pytest.mark.parametrize(
    "prefer", ["wait=5, Respond-Async", "respond-async; x=1", "return=minimal,respond-async"]
)
def test_a_preference_among_others(shared: Threaded, prefer: str) -> None:
    answer = shared.client.post("/generate", json={"num_inference_steps": 1}, headers={"prefer": prefer})
    assert answer.status_code == 202
    ended(shared, answer.headers["location"])


@pytest.mark.parametrize("prefer", ["", "wait=5", "respond-asynchronously", "x=respond-async"])
def test_another_preference(shared: Threaded, prefer: str) -> None:
    answer = shared.client.post("/generate", json={"num_inference_steps": 1}, headers={"prefer": prefer})
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


def test_a_result_that_has_been_deleted_is_gone(shared: Threaded) -> None:
    address = begin(shared)
    ended(shared, address)
    assert shared.client.delete(address).status_code == 204
    for method in ("GET", "DELETE"):
        problem(shared.client.request(method, address), 404, "job_not_found")
    accept = {"accept": "text/event-stream"}
    problem(shared.client.get(address, headers=accept), 404, "job_not_found")


def test_a_result_is_gone_after_its_time(serve: Serve) -> None:
    server = serve(result_ttl_s=0.3)
    address = begin(server)
    until(lambda: state_of(server, address) == "finished")
    until(lambda: state_of(server, address) == "404", "its end")
    problem(server.client.get(address), 404, "job_not_found")
    assert server.state.streams._streams == {}


def test_the_oldest_results_make_room(serve: Serve) -> None:
    size = OVERHEAD + SIZE * SIZE
    server = serve(result_bytes=2 * size)
    addresses = []
    for seed in range(3):
        addresses.append(begin(server, seed=seed))
        ended(server, addresses[-1])
    assert [state_of(server, address) for address in addresses] == ["404", "finished", "finished"]
    server.client.delete(addresses[1])
    address = begin(server)
    ended(server, address)
    assert state_of(server, addresses[2]) == "finished"  # there was room


def test_what_could_not_be_kept_is_waited_for(serve: Serve) -> None:
    server = serve(result_bytes=OVERHEAD + SIZE * SIZE)
    begin(server)
    answer = server.client.post("/generate", json={"n": 2, "num_inference_steps": 1}, headers=ASYNC)
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


def test_what_is_awaited_is_not_kept(shared: Threaded) -> None:
    body = shared.client.post("/generate", json={"num_inference_steps": 1}).json()
    problem(shared.client.get(f"/jobs/{body['id']}"), 404, "job_not_found")


# ── Errors ─────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_fails_says_why(serve: Serve) -> None:
    server = serve(FakeDenoiser(gives_nan={7}))
    address = begin(server, seed=7)
    body = ended(server, address)
    assert body.keys() == {"id", "state", "error"}
    assert (body["state"], body["error"]["code"], body["error"]["status"]) == ("failed", "non_finite", 500)
    problem(server.client.get(address, headers={"accept": "image/png"}), 500, "non_finite")
    address = begin(server, deadline_s=1e-6)
    assert ended(server, address)["error"]["code"] == "deadline_exceeded"


def test_a_job_that_is_refused_leaves_nothing_behind(serve: Serve) -> None:
    server = serve(max_queue=1)
    server.gate.shut()
    address = begin(server)
    problem(server.client.post("/generate", json={}, headers=ASYNC), 429, "queue_full")
    problem(server.client.post("/generate", json={"eta": 2}, headers=ASYNC), 422, "invalid_request")
    assert len(server.state.streams._streams) == len(server.state.jobs._running) == 1
    server.gate.open()
    ended(server, address)


@pytest.mark.parametrize("job_id", ["0123456789abcdef", "x", "%2e%2e"])
def test_an_unknown_job(shared: Threaded, job_id: str) -> None:
    for method in ("GET", "DELETE"):
        problem(shared.client.request(method, f"/jobs/{job_id}"), 404, "job_not_found")


def test_a_key_is_needed(serve: Serve) -> None:
    client = serve(api_keys="secret").client
    for method in ("GET", "DELETE"):
        problem(client.request(method, "/jobs/x"), 401, "unauthorized")


# ── Jobs in flight ─────────────────────────────────────────────────────────────────────────────


def test_how_far_a_job_is(serve: Serve) -> None:
    server = serve(max_batch_size=1)
    server.gate.shut()
    first = begin(server, seed=1, num_inference_steps=4)
    server.gate.wait_for_arrival(1)
    second, third = (begin(server, seed=seed, num_inference_steps=50) for seed in (2, 3))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.client.get, third)
        until(lambda: any(job.located for job in [*server.state.engine._in_flight.values()]), "the question")
        server.gate.allow(1)
        answer = asked.result()
    assert answer.status_code == 200
    assert int(answer.headers["retry-after"]) >= 1
    body = answer.json()
    assert body.keys() == {"id", "state", "position", "eta_s", "progress"}
    assert (body["state"], body["position"], body["progress"]) == ("waiting", 2, 0.0)
    assert body["eta_s"] > 0
    server.client.delete(second)
    server.gate.open()
    assert ended(server, first)["state"] == ended(server, third)["state"] == "finished"
    assert ended(server, second)["state"] == "cancelled"


def test_an_engine_in_a_long_step_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.client.LOCATE_S", 0.05)
    server = serve(max_batch_size=1)
    server.gate.shut()
    running = begin(server)
    server.gate.wait_for_arrival(1)
    waiting = begin(server, num_inference_steps=40)
    assert state_of(server, running) == "running"
    found = server.client.get(waiting).json()
    assert found["state"] == "waiting"
    picture = server.client.get(waiting, headers={"accept": "image/png"})
    assert (picture.status_code, picture.headers["content-type"]) == (202, "application/json")
    server.gate.open()
    ended(server, waiting)


def test_delete_cancels_a_job_that_runs(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    address = begin(server, num_inference_steps=60)
    server.gate.wait_for_arrival(1)
    assert server.client.delete(address).status_code == 204
    server.gate.open()
    body = ended(server, address)
    assert (body["state"], body["error"]["code"]) == ("cancelled", "cancelled")
    assert server.metric("ddpm_cancelled_total") == 1
    assert server.gate.arrived < 60
    assert server.client.delete(address).status_code == 204  # and forgets it
    problem(server.client.get(address), 404, "job_not_found")


def test_delete_cancels_a_job_that_somebody_waits_for(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.client.post, "/generate", json={"num_inference_steps": 60})
        server.gate.wait_for_arrival(1)
        (job_id,) = server.state.engine._in_flight
        assert server.client.delete(f"/jobs/{job_id}").status_code == 204
        server.gate.open()
        problem(waiting.result(), 499, "cancelled")


def test_delete_ends_a_stream(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    with server.client.stream("GET", "/stream?num_inference_steps=60") as response:
        events = sse(response)
        job_id = next(events).data["id"]
        assert response.headers["x-job-id"] == job_id
        server.gate.wait_for_arrival(1)
        assert server.client.delete(f"/jobs/{job_id}").status_code == 204
        server.gate.open()
        last = list(events)[-1]
    assert (last.name, last.data["code"]) == ("error", "cancelled")


def test_questions_do_not_disturb_a_stream(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    seen = []
    with server.client.stream("GET", "/stream?num_inference_steps=6&preview_every=1&seed=3") as response:
        for event in sse(response):
            seen.append(event)
            if event.name == "completed":
                break
            with ThreadPoolExecutor(1) as pool:
                job_id = seen[0].data["id"]
                asked = pool.submit(server.client.get, f"/jobs/{job_id}?preview=true")
                server.gate.allow(1)
                answer = asked.result()
            assert answer.status_code in (200, 404)
            accept = {"accept": "text/event-stream"}
            assert server.client.get(f"/jobs/{job_id}", headers=accept).status_code in (404, 406)
    assert [event.name for event in seen] == ["queued", *["preview"] * 6, "completed"]
    assert [event.data["step"] for event in seen[1:-1]] == list(range(1, 7))
    assert server.metric("ddpm_cancelled_total") == 0


# ── Previews and events ────────────────────────────────────────────────────────────────────────


def test_the_latest_preview_on_request(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.client.LOCATE_S", 0.05)
    server = serve()
    server.gate.shut()
    address = begin(server, n=2, seed=7, num_inference_steps=6, preview_every=1)
    assert server.client.get(f"{address}?preview=true").json()["previews"] == []
    server.gate.allow(2)
    server.gate.wait_for_arrival(3)

    def previews() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = server.client.get(f"{address}?preview=1").json()["previews"]
        return found

    until(lambda: [each["step"] for each in previews()] == [2], "the second preview")
    (shown,) = previews()  # again, as it is not used up
    assert [image["seed"] for image in shown["images"]] == [7, 8]
    assert opened(base64.b64decode(shown["images"][0]["b64_json"])).size == (SIZE, SIZE)
    assert "previews" not in server.client.get(address).json()
    server.gate.open()
    ended(server, address)


def test_a_job_without_previews_has_none(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.client.LOCATE_S", 0.05)
    server = serve()
    server.gate.shut()
    address = begin(server, preview="none")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.client.post, "/generate", json={"num_inference_steps": 2})
        until(lambda: len(server.state.engine._in_flight) == 2, "the second job")
        for job_id in [*server.state.engine._in_flight]:
            assert server.client.get(f"/jobs/{job_id}?preview=true").json()["previews"] == []
        server.gate.open()
        assert waiting.result().status_code == 200
    ended(server, address)


def test_the_events_of_a_job_that_goes_on_by_itself(serve: Serve) -> None:
    server = serve(stream_grace_s=0)
    server.gate.shut()
    address = begin(server, num_inference_steps=4, preview_every=1)
    accept = {"accept": "text/event-stream"}
    with server.client.stream("GET", address, headers=accept) as response:
        events = sse(response)
        assert next(events).name == "queued"
        server.gate.allow(1)
        assert next(events).data["step"] == 1
    until(lambda: server.state.streams.followed == 0, "the disconnect")
    server.gate.open()  # it goes on without its reader
    body = ended(server, address)
    assert body["state"] == "finished"
    assert server.metric("ddpm_cancelled_total") == 0
    for _ in range(2):  # and as often as somebody wants it
        with server.client.stream("GET", address, headers=accept) as response:
            assert [event.data for event in sse(response)] == [body["result"]]


def test_a_drain_waits_for_a_job_without_a_client(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    address = begin(server)
    server.gate.wait_for_arrival(1)
    server.server.handle_exit(15, None)
    until(lambda: server.client.get("/readyz").status_code == 503, "the drain")
    problem(server.client.post("/generate", json={}, headers=ASYNC), 503, "draining")
    assert not server.server.should_exit
    assert address.endswith(next(iter(server.state.jobs._running)))
    server.gate.open()
    server.wait_for_exit()
    assert server.denoiser.seen.keys() == {
        (seed, step) for seed, _ in server.denoiser.seen for step in range(4)
    }


def test_a_result_does_not_keep_what_made_it(shared: Threaded) -> None:
    answer = shared.client.post("/edit", json={"image": UPLOAD, "num_inference_steps": 2}, headers=ASYNC)
    ended(shared, answer.headers["location"])
    stream = shared.state.jobs.find(answer.headers["x-job-id"])
    assert stream is not None
    assert stream.context is not None
    assert stream.context.prepared.spec.stages == ()
    assert stream.last is not None
    assert all(picture.pixels.base is None for picture in stream.last.pictures)  # type: ignore[union-attr]


def test_pages_of_other_origins_may_delete(serve: Serve) -> None:
    client = serve(cors_origins="https://a.example").client
    headers = {"origin": "https://a.example", "access-control-request-method": "DELETE"}
    answer = client.options("/jobs/x", headers=headers)
    assert answer.status_code == 200
    read = client.get("/livez", headers=headers)
    assert {"Location", "ETag"} <= {*read.headers["access-control-expose-headers"].split(", ")}


def test_a_preview_is_asked_for_or_not(shared: Threaded) -> None:
    problem(shared.client.get("/jobs/x?preview=maybe"), 422, "invalid_request")
