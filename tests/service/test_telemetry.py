"""Metrics as Prometheus reads them, log lines, and the middleware around every request."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.telemetry import JsonFormatter, Telemetry, configure_logging, request_id, trace_ids

DOCUMENTED = {
    "ddpm_requests_total": ["route", "outcome"],
    "ddpm_request_duration_seconds": ["route"],
    "ddpm_queue_duration_seconds": [],
    "ddpm_time_to_first_preview_seconds": [],
    "ddpm_images_generated_total": ["sampler"],
    "ddpm_steps_total": [],
    "ddpm_streams_open": [],
    "ddpm_network_evaluations_total": [],
    "ddpm_slots": [],
    "ddpm_slots_in_use": [],
    "ddpm_client_slots_in_use": ["client"],
    "ddpm_client_rejected_total": ["client"],
    "ddpm_jobs_failed_total": ["reason"],
    "ddpm_jobs_replayed_total": [],
    "ddpm_step_duration_seconds": [],
    "ddpm_batch_rows": [],
    "ddpm_samples_running": [],
    "ddpm_samples_waiting": [],
    "ddpm_rejected_total": ["reason"],
    "ddpm_cancelled_total": [],
    "ddpm_nonfinite_total": [],
    "ddpm_last_step_timestamp_seconds": [],
    "ddpm_event_loop_lag_seconds": [],
    "ddpm_model_info": ["model", "runtime", "device", "dtype", "version"],
    "ddpm_engine_restarts_total": [],
    "ddpm_ready": [],
}


def families(text: str) -> dict[str, Any]:
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family
        for family in text_string_to_metric_families(text)
        if family.name.startswith("ddpm_")  # what every process has is prometheus-client's
    }


def test_every_documented_metric_is_there_and_no_other() -> None:
    telemetry = Telemetry()
    found = families(telemetry.render().decode())
    assert found.keys() == DOCUMENTED.keys()
    assert all(family.documentation for family in found.values())
    assert "_created" not in telemetry.render().decode()


def test_labels() -> None:
    instruments = [value for value in vars(Telemetry()).values() if hasattr(value, "_labelnames")]
    labels = {f"{i._name}{'_total' * (i._type == 'counter')}": list(i._labelnames) for i in instruments}
    assert labels == DOCUMENTED


def test_two_apps_do_not_share_counts() -> None:
    first, second = Telemetry(), Telemetry()
    first.cancelled.inc()
    assert second.registry.get_sample_value("ddpm_cancelled_total") == 0


# ── Logs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test leaves a request in hand behind."""
    before = request_id.get(), trace_ids.get()
    yield
    request_id.set(before[0])
    trace_ids.set(before[1])


def test_a_log_line_is_one_json_object() -> None:
    request_id.set("abc")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("a.b", logging.ERROR, "f", 1, "it %s", ("broke",), None)
        record.exc_info = (type(error), error, error.__traceback__)
    record.color_message = "it \x1b[1mbroke"
    record.job_id = "j"
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("error", "a.b", "it broke")
    assert (line["request_id"], line["job_id"]) == ("abc", "j")
    assert "ValueError: two\nlines" in line["exception"]
    assert datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(record.created, abs=1e-3)
    assert line.keys() == {"time", "level", "logger", "message", "request_id", "job_id", "exception"}


def test_a_log_line_of_a_traced_request_has_the_ids_of_its_span() -> None:
    trace_ids.set(("1" * 32, "2" * 16))
    record = logging.LogRecord("a", logging.INFO, "f", 1, "hello", (), None)
    line = json.loads(JsonFormatter().format(record))
    assert (line["trace_id"], line["span_id"]) == ("1" * 32, "2" * 16)


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_log_goes_to_standard_error(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()  # basicConfig(force) would close those of the test runner
    try:
        configure_logging(style)
        logging.getLogger("x").info("hello")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    line = capsys.readouterr().err.strip()
    assert "hello" in line
    assert line.startswith("{") == (style == "json")
