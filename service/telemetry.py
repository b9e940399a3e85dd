"""Prometheus metrics, the log, and what its lines say of the request in hand. Imports nothing of ours."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.msgspec import MsgspecFormatter

disable_created_metrics()

# From a step of one row on a fast GPU to one of a large batch on a slow CPU.
STEP_BUCKETS = (
    0.001,
    0.002,
    0.004,
    0.008,
    0.012,
    0.016,
    0.024,
    0.032,
    0.048,
    0.064,
    0.096,
    0.128,
    0.256,
    0.5,
    1,
    2,
)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


class Telemetry:
    """Every metric of the service, on a registry of its own so that tests and apps do not share counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ddpm_requests_total", "Requests answered.", ["route", "outcome"], registry=registry
        )
        self.request_duration = Histogram(
            "ddpm_request_duration_seconds",
            "Time from a request's first byte to the last of its answer.",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.queue_duration = Histogram(
            "ddpm_queue_duration_seconds",
            "Time a job waited for its first step.",
            buckets=(0.001, *REQUEST_BUCKETS),
            registry=registry,
        )
        self.first_preview = Histogram(
            "ddpm_time_to_first_preview_seconds",
            "Time from a stream's start to its first preview.",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.images = Counter(
            "ddpm_images_generated_total", "Images finished.", ["sampler"], registry=registry
        )
        self.streams = Gauge("ddpm_streams_open", "Answers sent event by event just now.", registry=registry)
        self.steps = Counter("ddpm_steps_total", "Steps of single images.", registry=registry)
        self.evaluations = Counter(
            "ddpm_network_evaluations_total",
            "Rows of all network calls: two for a guided step, one for any other.",
            registry=registry,
        )
        self.step_duration = Histogram(
            "ddpm_step_duration_seconds",
            "Time of a network call with its table update.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "ddpm_batch_rows", "Rows per network call.", buckets=ROW_BUCKETS, registry=registry
        )
        self.slots = Gauge("ddpm_slots", "Images that may be in flight at once.", registry=registry)
        self.slots_in_use = Gauge(
            "ddpm_slots_in_use", "Slots that jobs in flight have reserved.", registry=registry
        )
        self.client_slots = Gauge(
            "ddpm_client_slots_in_use", "Of these, how many a client has.", ["client"], registry=registry
        )
        self.client_rejected = Counter(
            "ddpm_client_rejected_total",
            "Jobs of a client refused for want of slots.",
            ["client"],
            registry=registry,
        )
        self.running = Gauge("ddpm_samples_running", "Images in the latest step.", registry=registry)
        self.waiting = Gauge("ddpm_samples_waiting", "Unfinished images not in it.", registry=registry)
        self.rejected = Counter("ddpm_rejected_total", "Jobs refused.", ["reason"], registry=registry)
        self.cancelled = Counter("ddpm_cancelled_total", "Jobs stopped before their end.", registry=registry)
        self.failed = Counter(
            "ddpm_jobs_failed_total",
            "Jobs that failed after their first step.",
            ["reason"],
            registry=registry,
        )
        self.replayed = Counter(
            "ddpm_jobs_replayed_total", "Jobs run again since their engine had died.", registry=registry
        )
        self.nonfinite = Counter(
            "ddpm_nonfinite_total", "Images that came out not finite.", registry=registry
        )
        self.last_step = Gauge(
            "ddpm_last_step_timestamp_seconds", "Unix time of the latest step.", registry=registry
        )
        self.loop_lag = Gauge(
            "ddpm_event_loop_lag_seconds",
            "How late the event loop has woken up at worst, in the last minute.",
            registry=registry,
        )
        self.model = Gauge(
            "ddpm_model_info",
            "1, with what is loaded as labels.",
            ["model", "runtime", "device", "dtype", "version"],
            registry=registry,
        )
        self.restarts = Counter(
            "ddpm_engine_restarts_total", "Engines that died and were replaced.", registry=registry
        )
        self.ready = Gauge("ddpm_ready", "1 while new work is taken.", registry=registry)
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


request_id: ContextVar[str] = ContextVar("request_id", default="-")
submitted_job: ContextVar[str | None] = ContextVar("submitted_job", default=None)
"""The id of the job that the request in hand has submitted."""
owner: ContextVar[str] = ContextVar("owner", default="")
"""Whom the request in hand is counted for: a number of an API key, or an address."""
trace_ids: ContextVar[tuple[str, str] | None] = ContextVar("trace_ids", default=None)
"""(trace id, span id) of the request, where requests are traced."""


class JsonFormatter(MsgspecFormatter):
    """One JSON object per line."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's messages, for a terminal
            timestamp="time",
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Add what is known of the request in hand."""
        line = {"time": None, **log_data, "level": log_data["level"].lower(), "request_id": request_id.get()}
        if (ids := trace_ids.get()) is not None:
            line["trace_id"], line["span_id"] = ids
        return line


def configure_logging(style: str) -> None:
    """Send the root logger to standard error, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
