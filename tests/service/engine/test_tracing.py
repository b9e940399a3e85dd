"""Spans of jobs and of their requests, as a real OTLP receiver gets them from a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from service.engine import tracing
from service.engine.messages import Cancelled, Failed, Finished, Terminal
from service.engine.tracing import JobSpan
from service.errors import NonFiniteError
from tests.service.fakes import PATIENCE_S, job_of, until
from tests.service.live import ROOT, Process, Serve, sse
from tests.service.receiver import Receiver

PARENT = "0af7651916cd43dd8448eb211c80319c"
STATUS_ERROR = 2


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as started:
        yield started


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tiny_folder: Path) -> Iterator[tuple[Process, httpx.Client]]:
    """A service that traces, and a client of it."""
    process = Process(
        ["--model", str(tiny_folder), "--device", "cpu", "--log-format", "json", "--stream-grace-s", "0"],
        {
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_SERVICE_NAME": "ddpm",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "NO_PROXY": "127.0.0.1",
        },
    )
    try:
        with closing(process.connect()) as client:
            yield process, client
            process.popen.send_signal(signal.SIGTERM)
            assert process.wait() == 0
    finally:
        process.stop()


def line_of(process: Process, request_id: str) -> dict[str, Any]:
    """The access log's line of a request."""

    def found() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in list(process.lines) if line.startswith("{")]
        return [
            line for line in lines if line["request_id"] == request_id and line["logger"] == "service.access"
        ]

    until(found, f"the line of {request_id}")
    return found()[0]


def test_a_request_has_a_span_with_the_time_it_waited_and_was_computed(
    traced: tuple[Process, httpx.Client], receiver: Receiver
) -> None:
    process, client = traced
    headers = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01", "X-Request-ID": "first"}
    headers["Authorization"] = "Bearer a-key"
    body = {"n": 2, "num_inference_steps": 3, "seed": 1}
    answer = client.post("/generate", json=body, headers=headers)
    assert answer.status_code == 200

    spans = receiver.wait_for(PARENT, {"POST /generate", "job", "queue", "compute"})
    request, job, queue, compute = (spans[name] for name in ("POST /generate", "job", "queue", "compute"))
    assert request.resource["service.name"] == "ddpm"
    assert request.attributes["http.route"] == "/generate"
    assert request.attributes["http.response.status_code"] == 200
    assert request.parent == "b7ad6b7169203331"
    assert job.parent == request.id
    assert queue.parent == compute.parent == job.id

    assert job.attributes["ddpm.job.id"] == answer.headers["X-Job-ID"]
    assert job.attributes["ddpm.job.images"] == 2
    assert job.attributes["ddpm.job.steps"] == 3
    assert job.attributes["ddpm.job.network_evaluations"] >= 6
    assert request.start <= job.start == queue.start <= queue.end == compute.start < compute.end
    assert compute.end <= job.end + 5_000_000 <= request.end + 10_000_000  # clocks are read to a millisecond
    timings = answer.json()["timings"]
    assert (queue.end - queue.start) / 1e9 == pytest.approx(timings["queue_s"], abs=2e-3)
    assert (compute.end - compute.start) / 1e9 == pytest.approx(timings["run_s"], abs=2e-3)

    assert "a-key" not in str([span.attributes for span in receiver.spans])
    line = line_of(process, "first")
    assert (line["trace_id"], line["span_id"]) == (PARENT, request.id)
    assert line["job_id"] == answer.headers["X-Job-ID"]


def test_the_span_of_a_stream_lasts_as_long_as_the_stream(
    traced: tuple[Process, httpx.Client], receiver: Receiver
) -> None:
    process, client = traced
    trace = "1" * 32
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-ID": "stream"}
    with client.stream("GET", "/stream", params={"num_inference_steps": 5}, headers=headers) as response:
        assert [event.name for event in sse(response)][-1] == "completed"
    spans = receiver.wait_for(trace, {"GET /stream", "job", "compute"})
    assert spans["compute"].end <= spans["GET /stream"].end + 5_000_000
    assert "job_id" in line_of(process, "stream")


def test_a_refused_request_has_no_job(traced: tuple[Process, httpx.Client], receiver: Receiver) -> None:
    _, client = traced
    trace = "2" * 32
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    assert client.post("/generate", json={"n": 0}, headers=headers).status_code == 422
    spans = receiver.wait_for(trace, {"POST /generate"})
    assert spans["POST /generate"].attributes["http.response.status_code"] == 422
    assert spans["POST /generate"].status != STATUS_ERROR  # the client's mistake is not the service's


def test_a_deadline_that_passes_is_an_error_of_the_job(
    traced: tuple[Process, httpx.Client], receiver: Receiver
) -> None:
    _, client = traced
    trace = "3" * 32
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    body = {"num_inference_steps": 100, "n": 64, "sampler": "ddpm", "deadline_s": 0.001}
    assert client.post("/generate", json=body, headers=headers).status_code == 504
    spans = receiver.wait_for(trace, {"POST /generate", "job"})
    assert spans["POST /generate"].status == spans["job"].status == STATUS_ERROR
    assert spans["job"].attributes["error.type"] == "deadline_exceeded"
    assert "compute" not in spans


def test_a_client_that_leaves_its_stream_cancels_the_job(
    traced: tuple[Process, httpx.Client], receiver: Receiver
) -> None:
    process, client = traced
    trace = "6" * 32
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-ID": "left"}
    params: dict[str, str | int] = {"num_inference_steps": 100, "n": 64, "sampler": "ddpm"}
    with client.stream("GET", "/stream", params=params, headers=headers) as response:
        assert response.status_code == 200
    spans = receiver.wait_for(trace, {"GET /stream", "job"})
    assert spans["job"].attributes["ddpm.job.cancelled"] is True
    assert spans["job"].status != STATUS_ERROR
    assert line_of(process, "left")["status"] == 200
    levels = {json.loads(line)["level"] for line in list(process.lines) if line.startswith("{")}
    assert levels == {"info"}, process.log


def test_probes_are_not_traced(traced: tuple[Process, httpx.Client], receiver: Receiver) -> None:
    _, client = traced
    for path in ("/livez", "/readyz", "/metrics", "/info"):
        headers = {"traceparent": f"00-{'4' * 32}-b7ad6b7169203331-01"}
        assert client.get(path, headers=headers).status_code == 200
    receiver.wait_for("4" * 32, {"GET /info"})
    assert {span.name for span in receiver.spans if span.parent == "b7ad6b7169203331"} >= {"GET /info"}
    assert not {"GET /livez", "GET /readyz", "GET /metrics"} & {span.name for span in receiver.spans}


def test_what_is_not_sent_yet_is_sent_at_the_end(
    launch: Callable[..., Process], receiver: Receiver, tiny_folder: Path
) -> None:
    process = launch(
        "--model", str(tiny_folder), "--device", "cpu",
        FASTAPI_OTEL_AUTO_CONFIGURE="true",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_BSP_SCHEDULE_DELAY="3600000",
        NO_PROXY="127.0.0.1",
    )  # fmt: skip
    trace = "5" * 32
    with closing(process.connect()) as client:
        client.get("/info", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        assert not receiver.of(trace)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert {"GET /info"} <= receiver.of(trace).keys()


# ── Without a receiver ─────────────────────────────────────────────────────────────────────────


def test_nothing_is_recorded_where_nothing_is_configured(serve: Serve) -> None:
    server = serve()
    assert server.client.post("/generate", json={"num_inference_steps": 2}).status_code == 200
    assert JobSpan.begin(job_of("a", [1])) is None


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What has ended, of a request that is being traced."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    with provider.get_tracer("test").start_as_current_span("request"):
        yield exporter
    provider.shutdown()


def ended(memory: InMemorySpanExporter, event: Terminal) -> ReadableSpan:
    span = JobSpan.begin(job_of(event.job_id, [1]))
    assert span is not None
    span.replayed()
    span.end(event)
    assert memory.get_finished_spans()[-1].name == "job"
    return memory.get_finished_spans()[-1]


def test_a_span_says_that_its_job_was_run_again(memory: InMemorySpanExporter) -> None:
    span = ended(memory, Finished("a", (), 1.0, 2.0))
    assert [event.name for event in span.events] == ["replayed"]
    assert [each.name for each in memory.get_finished_spans()] == ["queue", "compute", "job"]


def test_a_span_says_why_its_job_failed(memory: InMemorySpanExporter) -> None:
    span = ended(memory, Failed("a", NonFiniteError("a NaN"), started=True))
    assert span.attributes is not None
    assert span.attributes["error.type"] == "non_finite"
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "a NaN")


def test_a_cancelled_job_is_no_error(memory: InMemorySpanExporter) -> None:
    span = ended(memory, Cancelled("a"))
    assert span.attributes is not None
    assert span.attributes["ddpm.job.cancelled"] is True
    assert span.status.status_code is StatusCode.UNSET


def test_without_the_switch_nothing_that_sends_spans_is_imported() -> None:
    program = (
        "import sys\n"
        "from service.app import create_app\n"
        "from service.settings import Settings\n"
        "create_app(Settings(_env_file=None))\n"
        "sys.exit('opentelemetry.sdk' in sys.modules or 'opentelemetry.exporter' in sys.modules)"
    )
    blank = {"FASTAPI_OTEL_AUTO_CONFIGURE": ""}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | blank, timeout=PATIENCE_S
    )
    assert ran.returncode == 0


def test_an_engine_knows_nothing_of_tracing() -> None:
    program = "import sys, service.engine.process; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=PATIENCE_S).returncode == 0
