from __future__ import annotations

import asyncio
import time

import pytest

from bench.load import Answer, Endpoint, drive, figures, send, summarise
from bench.servers import free_port
from bench.workload import Request

PATIENCE_S = 30.0


def answers_of(endpoint, *requests, patience_s=PATIENCE_S):
    return asyncio.run(drive(endpoint, requests, patience_s))


def test_a_request_has_the_form_that_the_service_takes(faker):
    (answer,) = answers_of(faker.endpoint("ok"), Request(0.0, 20, 3, True, label=4, seed=70))
    assert (answer.result, answer.status) == ("done", 200)
    everywhere = {"guidance_sigma_min": 0.0, "guidance_sigma_max": None}
    body = {"n": 3, "seed": 70, "num_inference_steps": 20, "class_label": 4, "guidance_scale": 2.0}
    assert faker.received == [body | everywhere]


def test_without_guidance_the_scale_is_one(faker):
    answers_of(faker.endpoint("ok"), Request(0.0, 20))
    assert faker.received[0]["guidance_scale"] == 1.0


def test_some_servers_take_a_list_under_a_name(faker):
    (answer,) = answers_of(faker.endpoint("wrapped", wrap="requests"), Request(0.0, 20))
    assert answer.result == "done"
    assert list(faker.received[0]) == ["requests"]
    assert faker.received[0]["requests"][0]["num_inference_steps"] == 20


@pytest.mark.parametrize(
    ("path", "result", "error"),
    [
        ("status?code=429", "rejected", "go away"),
        ("status?code=503", "rejected", "go away"),
        ("status?code=500", "failed", "go away"),
        ("status?code=422", "failed", "go away"),
        ("fewer", "failed", "1 images instead of 2"),
        ("text", "failed", "not every image is a PNG"),
        ("empty", "failed", "no images"),
    ],
)
def test_an_answer_without_the_images_is_no_success(faker, path, result, error):
    (answer,) = answers_of(faker.endpoint(path), Request(0.0, 5, images=2))
    assert answer.result == result
    assert error in answer.error


def test_no_server_is_a_failure():
    (answer,) = answers_of(Endpoint(f"http://127.0.0.1:{free_port()}/"), Request(0.0, 5))
    assert (answer.result, answer.status) == ("failed", 0)
    assert "ConnectionRefusedError" in answer.error


def test_a_client_gives_up_after_its_patience(faker):
    (answer,) = answers_of(faker.endpoint("never"), Request(0.0, 5), patience_s=0.2)
    assert (answer.result, answer.latency_s) == ("timeout", 0.2)


def test_the_next_request_does_not_wait_for_an_answer(faker):
    faker.together = 5  # the first is answered when the fifth has come
    answers = answers_of(faker.endpoint("gate"), *(Request(0.02 * i, 5) for i in range(5)))
    assert [answer.result for answer in answers] == ["done"] * 5
    assert answers[0].latency_s >= 0.08


def test_requests_are_sent_when_they_are_due(faker):
    begun = time.monotonic()
    answers = answers_of(faker.endpoint("ok"), Request(0.3, 5, seed=1), Request(0.1, 5, seed=2))
    assert time.monotonic() - begun >= 0.3
    assert [body["seed"] for body in faker.received] == [2, 1]
    assert [answer.request.seed for answer in answers] == [1, 2]


def test_latency_counts_from_when_the_request_was_due(faker):
    async def late():
        begun = asyncio.get_running_loop().time() - 1.0
        return await send(faker.endpoint("ok"), Request(0.25, 5), begun, PATIENCE_S)

    answer = asyncio.run(late())
    assert answer.late_s >= 0.75
    assert answer.latency_s >= answer.first_byte_s >= answer.late_s


def test_a_stream_has_an_eta_and_previews(faker):
    (answer,) = answers_of(faker.endpoint("stream/whole", streams=True), Request(0.0, 5, images=2))
    assert answer.result == "done"
    assert faker.received[0]["accept"] == "text/event-stream"
    assert 0 < answer.first_byte_s <= answer.queued_s <= answer.first_preview_s <= answer.latency_s
    assert answer.eta_s == 0.5
    assert answer.eta_error_s == pytest.approx(answer.latency_s - answer.queued_s - 0.5)


@pytest.mark.parametrize(("how", "error"), [("error", "nonfinite"), ("cut", "ended before its last event")])
def test_a_stream_that_breaks_is_a_failure(faker, how, error):
    (answer,) = answers_of(faker.endpoint(f"stream/{how}", streams=True), Request(0.0, 5))
    assert answer.result == "failed"
    assert error in answer.error
    assert answer.eta_error_s is None


def test_a_run_in_figures():
    request = Request(1.0, 10, images=2)
    answers = [
        Answer(request, "done", 200, latency_s=1.0, first_byte_s=0.1, queued_s=0.5, eta_s=1.0, late_s=0.01),
        Answer(request, "done", 200, latency_s=3.0, first_byte_s=0.3),
        Answer(request, "timeout", 200, latency_s=9.0, first_preview_s=2.0),
        Answer(request, "rejected", 429, "full", latency_s=0.1),
        Answer(request, "failed", 500, "first", latency_s=0.1),
        Answer(request, "failed", 500, "second", latency_s=0.1),
    ]
    summary = summarise(answers)
    assert (summary.requests, summary.done, summary.rejected, summary.failed, summary.timeouts) == (
        6,
        2,
        1,
        2,
        1,
    )
    assert summary.seconds == 10.0
    assert (summary.rows_per_s, summary.images_per_s) == (4.0, 0.4)
    assert summary.latency is not None
    assert (summary.latency["p50"], summary.latency["max"]) == (3.0, 9.0)  # the one that timed out counts
    assert summary.first_byte == figures([0.1, 0.3])
    assert summary.first_preview == figures([2.0])
    assert summary.eta_error == figures([0.5])  # done half a second early, of half a second
    assert summary.eta_error_share == figures([1.0])
    assert summary.late_max == 0.01
    assert summary.errors == ["429: full", "500: first"]


def test_a_run_without_a_completed_request():
    summary = summarise([Answer(Request(0.0, 10), "rejected", 503, latency_s=0.1)])
    assert summary.rows_per_s == 0
    assert summary.latency is None


def test_percentiles():
    found = figures([*range(101), None])
    assert found == {"mean": 50, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert figures([None]) is None
