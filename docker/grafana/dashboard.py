"""Writes the Grafana dashboard: `python docker/grafana/dashboard.py`, after a change here.

Rate, errors and duration of requests by route; use and saturation of slots, queue and device; streams; the
process that serves HTTP. `$instance` chooses instances, `$rate` the window of rates and quantiles.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    IntervalVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.heatmap import Panel as Heatmap
from grafana_foundation_sdk.builders.heatmap import YAxisConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

OUT = Path(__file__).parent / "dashboards" / "ddpm.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
CHOSEN = 'instance=~"$instance"'
PROBES = "/livez|/readyz|/metrics|/v2/health/.*"
ASKED = f'{CHOSEN}, route!~"{PROBES}"'
"""Requests of clients, and not those that ask every few seconds how the service is."""
QUANTILES = (0.5, 0.95, 0.99)


def rate(metric: str, by: str = "", labels: str = CHOSEN) -> str:
    """The sum of a counter's rates, in total or by some of its labels."""
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{{{labels}}}[$rate]))"


def quantile(q: float, histogram: str, by: str = "", labels: str = CHOSEN) -> str:
    """A quantile of a histogram, over all chosen instances."""
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', groups, labels)})"


def quantiles(histogram: str, labels: str = CHOSEN) -> list[tuple[str, str]]:
    """(query, legend) of each of QUANTILES."""
    return [(quantile(q, histogram, labels=labels), f"p{100 * q:g}") for q in QUANTILES]


def mean(histogram: str) -> str:
    """The mean of what a histogram has observed."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def gauge(name: str, by: str = "") -> str:
    """The sum of a gauge."""
    return f"sum{f' by ({by})' if by else ''} ({name}{{{CHOSEN}}})"


def query(expr: str, legend: str) -> Dataquery:
    """A query; without a format of its own it is drawn over time."""
    return Dataquery().expr(expr).legend_format(legend).range()


def lines(
    title: str, description: str, unit: str, queries: Sequence[tuple[str, str]], *, stack: bool = False
) -> TimeSeries:
    """A panel of lines. queries: (PromQL, legend)."""
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = TimeSeries().title(title).description(description).unit(unit).datasource(SOURCE)
    panel = panel.span(8).height(8).min(0).legend(legend.show_legend(True)).fill_opacity(30 if stack else 5)
    for index, (expr, name) in enumerate(queries):
        panel = panel.with_target(query(expr, name).ref_id(chr(ord("A") + index)))
    return panel


def heatmap(title: str, description: str, unit: str, histogram: str, labels: str = CHOSEN) -> Heatmap:
    """A panel of a histogram's buckets over time."""
    buckets = query(rate(f"{histogram}_bucket", "le", labels), "{{le}}").format(PromQueryFormat.HEATMAP)
    panel = Heatmap().title(title).description(description).datasource(SOURCE).calculate(False)
    return panel.y_axis(YAxisConfig().unit(unit)).span(8).height(8).with_target(buckets.ref_id("A"))


def number(title: str, description: str, unit: str, expr: str, width: int = 4) -> Stat:
    """A panel of one number."""
    panel = Stat().title(title).description(description).unit(unit).datasource(SOURCE).span(width).height(4)
    return panel.with_target(query(expr, "").ref_id("A"))


def overview() -> list[Stat]:
    """What to look at first."""
    failed = rate("ddpm_requests_total", labels=f'{ASKED}, outcome="5xx"')
    asked = rate("ddpm_requests_total", labels=ASKED)
    p95 = quantile(0.95, "ddpm_request_duration_seconds", labels=ASKED)
    model = Stat().title("Model").description("What is loaded, and on which device.").datasource(SOURCE)
    model = model.text_mode(BigValueTextMode.NAME).span(8).height(4)
    name = "{{model}} on {{device}} ({{runtime}}, {{dtype}}), version {{version}}"
    by = "model, device, runtime, dtype, version"
    alerts = 'count(ALERTS{alertname=~"Ddpm.*", alertstate="firing", instance=~"$instance"}) or vector(0)'
    in_use = f"{gauge('ddpm_slots_in_use')} / {gauge('ddpm_slots')}"
    return [
        model.with_target(query(gauge("ddpm_model_info", by), name).ref_id("A")),
        number("Ready", "Instances that accept jobs.", "short", gauge("ddpm_ready")),
        number("Alerts", "Alerts of docker/alerts.yml that fire now.", "short", alerts),
        number("Slots in use", "Share of the slots that jobs have reserved.", "percentunit", in_use),
        number("Images", "Images finished per second.", "short", rate("ddpm_images_generated_total")),
        number("Requests", "Requests answered per second, without probes.", "reqps", asked, 8),
        number(
            "Server errors",
            "Share of answers with a 5xx status.",
            "percentunit",
            f"({failed} or vector(0)) / {asked}",
            8,
        ),
        number("Duration, p95", "Of requests, to the last byte of the answer.", "s", p95, 8),
    ]


def requests() -> list[TimeSeries | Heatmap]:
    """Rate, errors, duration."""
    counter, histogram = "ddpm_requests_total", "ddpm_request_duration_seconds"
    errors = rate(counter, "route, outcome", f'{ASKED}, outcome=~"[45]xx"')
    by_route = [(quantile(0.95, histogram, "route", ASKED), "{{route}}")]
    return [
        lines("Rate by route", "Requests answered.", "reqps", [(rate(counter, "route", ASKED), "{{route}}")]),
        lines(
            "Errors by route",
            "Requests answered with 4xx (the request's fault, or a full queue) or 5xx.",
            "reqps",
            [(errors, "{{route}} {{outcome}}")],
        ).no_value("none"),
        lines("Duration by route, p95", "To the last byte of the answer.", "s", by_route),
        lines("Duration", "Of all routes.", "s", quantiles(histogram, ASKED)),
        heatmap("Duration, all requests", "Requests per second by duration.", "s", histogram, ASKED),
        lines(
            "Probes",
            "Requests for health and metrics.",
            "reqps",
            [(rate(counter, "route", f'{CHOSEN}, route=~"{PROBES}"'), "{{route}}")],
        ),
    ]


def queue() -> list[TimeSeries | Heatmap]:
    """Use and saturation of what jobs wait for."""
    wait = "ddpm_queue_duration_seconds"
    return [
        lines(
            "Slots",
            "Images in flight, and how many may be; beyond it requests get 429.",
            "short",
            [(gauge("ddpm_slots_in_use"), "in use"), (gauge("ddpm_slots"), "capacity")],
        ),
        lines(
            "Slots by client",
            "Images in flight of each API key, by its number.",
            "short",
            [(gauge("ddpm_client_slots_in_use", "client"), "{{client}}")],
            stack=True,
        ),
        lines(
            "Images in flight",
            "In the latest step, or waiting for another one.",
            "short",
            [(gauge("ddpm_samples_running"), "running"), (gauge("ddpm_samples_waiting"), "waiting")],
            stack=True,
        ),
        lines("Wait for the first step", "Of a job.", "s", quantiles(wait)),
        heatmap("Wait for the first step, all jobs", "Jobs per second by wait.", "s", wait),
        lines(
            "Refused",
            "Jobs refused, by the error's code.",
            "ops",
            [(rate("ddpm_rejected_total", "reason"), "{{reason}}")],
        ),
        lines(
            "Refused for want of slots",
            "Jobs refused, by the number of the API key.",
            "ops",
            [(rate("ddpm_client_rejected_total", "client"), "{{client}}")],
        ),
        lines(
            "Failed and cancelled",
            "Jobs that ended without a result after their first step.",
            "ops",
            [
                (rate("ddpm_jobs_failed_total", "reason"), "{{reason}}"),
                (rate("ddpm_cancelled_total"), "cancelled"),
            ],
        ),
    ]


def device() -> list[TimeSeries | Heatmap]:
    """What the engines do."""
    step, rows = "ddpm_step_duration_seconds", "ddpm_batch_rows"
    return [
        lines("Step time", "Of a network call with its sampler update.", "s", quantiles(step)),
        heatmap("Step time, all steps", "Steps per second by duration.", "s", step),
        lines("Batch size", "Mean rows per network call.", "short", [(mean(rows), "rows")]),
        heatmap("Batch size, all steps", "Steps per second by rows.", "short", rows),
        lines(
            "Network evaluations",
            "Rows of all network calls per second; a guided step takes two.",
            "ops",
            [
                (rate("ddpm_network_evaluations_total"), "evaluations"),
                (rate("ddpm_steps_total"), "steps of images"),
            ],
        ),
        lines(
            "Busy",
            "Share of the time in which a step was computed; up to 1 for each device.",
            "percentunit",
            [(rate(f"{step}_sum", "instance"), "{{instance}}")],
        ),
        lines(
            "Images",
            "Images finished per second.",
            "short",
            [(rate("ddpm_images_generated_total", "sampler"), "{{sampler}}")],
        ),
        lines(
            "Engines replaced",
            "Engines that died, and jobs that were run again for it, within the window.",
            "short",
            [
                (f"sum (increase(ddpm_engine_restarts_total{{{CHOSEN}}}[$rate]))", "engines replaced"),
                (f"sum (increase(ddpm_jobs_replayed_total{{{CHOSEN}}}[$rate]))", "jobs run again"),
            ],
        ),
        lines(
            "Images not finite",
            "Images with a NaN or an infinity, within the window.",
            "short",
            [(f"sum (increase(ddpm_nonfinite_total{{{CHOSEN}}}[$rate]))", "images")],
        ),
    ]


def streams() -> list[TimeSeries | Heatmap]:
    """What clients that watch their images get."""
    first = "ddpm_time_to_first_preview_seconds"
    return [
        lines(
            "Open streams",
            "Answers that are sent event by event.",
            "short",
            [(gauge("ddpm_streams_open"), "streams")],
        ),
        lines("First preview", "From a stream's start to its first preview.", "s", quantiles(first)),
        heatmap("First preview, all streams", "Streams per second by time.", "s", first),
    ]


def process() -> list[TimeSeries]:
    """The process that serves HTTP."""
    cpu = rate("process_cpu_seconds_total", "instance")
    since = f"time() - max by (instance) (ddpm_last_step_timestamp_seconds{{{CHOSEN}}} > 0)"
    return [
        lines(
            "Event loop lag",
            "How late the event loop has woken up at worst, in the last minute. Above 0.1 s clients notice.",
            "s",
            [(f"max by (instance) (ddpm_event_loop_lag_seconds{{{CHOSEN}}})", "{{instance}}")],
        ),
        lines(
            "Cores",
            "Of the process that serves HTTP; it can use about one.",
            "short",
            [(cpu, "{{instance}}")],
        ),
        lines(
            "Memory",
            "Resident memory of the process that serves HTTP.",
            "bytes",
            [(gauge("process_resident_memory_bytes", "instance"), "{{instance}}")],
        ),
        lines(
            "Open files",
            "Connections among them, and how many the process may have.",
            "short",
            [(gauge("process_open_fds", "instance"), "{{instance}}")],
        ),
        lines(
            "Since the latest step",
            "Grows while the service is idle; with images in flight it means a stall.",
            "s",
            [(since, "{{instance}}")],
        ),
        lines(
            "Ready",
            "1 while jobs are accepted.",
            "short",
            [(gauge("ddpm_ready", "instance"), "{{instance}}")],
        ),
    ]


ROWS = {
    "Overview": overview,
    "Requests": requests,
    "Queue and slots": queue,
    "Device": device,
    "Streams": streams,
    "Process": process,
}


def dashboard() -> Dashboard:
    """All of it."""
    auto = VariableOption(text="auto", value="$__auto_interval_rate")
    instances = QueryVariable("instance").label("Instance").datasource(SOURCE).multi(True).include_all(True)
    instances = instances.query("label_values(ddpm_ready, instance)")
    instances = instances.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    everyone = VariableOption(selected=True, text=["All"], value=["$__all"])
    # The whole window is shown at about this many points; a rate needs several scrapes, which are 5 s apart.
    window = IntervalVariable("rate").label("Rates over").values("1m,5m,15m,1h").auto(True).step_count(60)
    made = Dashboard("DDPM service").uid("ddpm").tags(["ddpm"]).time("now-30m", "now").refresh("10s")
    made = made.description("Written by docker/grafana/dashboard.py; change it there.").timezone("browser")
    made = made.tooltip(DashboardCursorSync.CROSSHAIR).editable()
    made = made.with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made = made.with_variable(instances.current(everyone))
    made = made.with_variable(window.min_interval("1m").current(auto))
    numbers = count(1)
    for title, panels in ROWS.items():
        made = made.with_row(Row(title).id(next(numbers)))
        for panel in panels():
            made = made.with_panel(panel.id(next(numbers)))
    return made


def main(out: Path = OUT) -> None:
    """Write the dashboard as Grafana reads it."""
    text = JSONEncoder(sort_keys=True, indent=2).encode(dashboard().build())
    out.write_text(text + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
