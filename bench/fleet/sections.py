"""The questions that docs/scale.md answers, each as a table; `points` has what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np

from bench.fleet.arrivals import MEAN_EVALUATIONS, MEAN_IMAGES, Diurnal, Flash, Rate, arrivals, constant
from bench.fleet.scaling import Scaling
from bench.fleet.simulation import Fleet, Result, Routing, simulate
from bench.simulate import table
from bench.simulation import CURVES

ROUTINGS: tuple[Routing, ...] = ("random", "ray", "requests", "work")
OTHERS: tuple[Routing, ...] = ("work of all", "known work", "known rows")
REPORTING = ("requests", "work", "work of all")
LOADS = (0.5, 0.7, 0.9)
OBJECTIVE_S = {"gpu": 2.0, "cpu": 8.0}
"""Objectives for p95, in seconds, by curve: chains of 250 steps take 1.25 and 1.98 s alone."""


@dataclass
class Study:
    """How much is simulated. scale: of the full length of every run. price: of a device for an hour."""

    scale: float = 1.0
    seed: int = 0
    price: float = 1.0
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    largest: int = 10_000

    def run(self, fleet: Fleet, load: float, requests: int, shape: Rate = constant) -> Result:
        """A run at a share of the capacity, long enough for so many requests at the usual rate."""
        rate = load * fleet.capacity * fleet.replicas
        duration = requests * self.scale * MEAN_EVALUATIONS / rate
        return simulate(replace(fleet, seed=self.seed), arrivals(rate, duration, self.seed, shape))

    def draw(self, line: str, x: float, y: float) -> None:
        """Add a point to a line of the plot."""
        self.points.setdefault(line, []).append((x, y))


def cells(result: Result) -> list[str]:
    """Mean, p50, p95 and p99 of the latency."""
    seconds = result.latency
    return [f"{seconds.mean():.2f}", *(f"{np.percentile(seconds, p):.2f}" for p in (50, 95, 99))]


def p95(result: Result) -> float:
    """Of the latency, in seconds."""
    return float(np.percentile(result.latency, 95))


def routing(study: Study) -> str:
    """Latency by load, routing and number of replicas."""
    rows: list[Sequence[object]] = []
    for name, curve in CURVES.items():
        for count, requests in ((1, 3000), (2, 3000), (10, 6000), (100, 8000)):
            for load in LOADS:
                for how in ROUTINGS if count > 1 else ROUTINGS[:1]:
                    result = study.run(Fleet(curve, count, how), load, requests)
                    rows.append([name, count, load, how, len(result.created), *cells(result)])
                    study.draw(f"{name}, {count}|{how}", load, float(result.latency.mean()))
    return table("routing", "curve|replicas|load|routing|requests|mean|p50|p95|p99", rows)


def limits(study: Study) -> str:
    """What routers could do that knew more, and what old reports cost: 10 replicas at 0.9."""
    rows: list[Sequence[object]] = []
    for name, curve in CURVES.items():
        for how in (*ROUTINGS, *OTHERS):
            for report_s in (10.0, 1.0) if how in REPORTING else (10.0,):
                result = study.run(Fleet(curve, 10, how, report_s=report_s), 0.9, 6000)
                rows.append([name, how, f"{report_s:g}" if how in REPORTING else "–", *cells(result)])
    return table("limits: 10 replicas, load 0.9", "curve|routing|report every, s|mean|p50|p95|p99", rows)


def large(study: Study) -> str:
    """A thousand and ten thousand replicas, for as many requests as can be simulated in minutes."""
    rows: list[Sequence[object]] = []
    for count, requests in ((1000, 40_000), (10_000, 150_000)):
        for how in ROUTINGS[:2] if count > 1000 else ROUTINGS:
            fleet = Fleet(CURVES["gpu"], min(count, study.largest), how)
            result = study.run(fleet, 0.9, requests)
            virtual = f"{result.created[-1]:.1f}"
            rows.append([fleet.replicas, how, len(result.created), virtual, *cells(result)])
    return table("large, gpu, load 0.9", "replicas|routing|requests|arrive within, s|mean|p50|p95|p99", rows)


def objective(study: Study) -> str:
    """The fewest replicas whose p95 meets an objective at a number of images per second."""
    rows: list[Sequence[object]] = []
    for name, images_per_s in (("gpu", 40), ("gpu", 200), ("cpu", 4), ("cpu", 40)):
        curve, limit = CURVES[name], OBJECTIVE_S[name]
        rate = images_per_s * MEAN_EVALUATIONS / MEAN_IMAGES
        least = count = max(1, ceil(rate / Fleet(curve).capacity))
        while True:
            fleet = Fleet(curve, count, "ray")
            result = study.run(fleet, rate / (fleet.capacity * count), 5000)
            if p95(result) <= limit or count > 3 * least:
                break
            count += max(1, count // 20)
        load = rate / (count * fleet.capacity)
        cost = study.price * count / images_per_s / 3600 * 1e6
        rows.append(
            [name, images_per_s, f"{limit:g}", least, count, f"{load:.2f}", *cells(result), f"{cost:.0f}"]
        )
    header = "curve|images/s|p95 ≤, s|for the rate alone|replicas|load|mean|p50|p95|p99|cost of 10⁶ images"
    return table(f"objective, at {study.price:g} a device-hour", header, rows)


def scalings(ongoing: float, seconds: float) -> dict[str, Scaling | None]:
    """What is compared. ongoing, seconds: targets, of requests and of work, for a replica."""
    fast = Scaling(upscale_delay_s=5, look_back_s=5, push_s=2, downscale_delay_s=60, upper=40)
    return {
        "none": None,
        "Ray's default, 2 requests": Scaling(upper=40),
        "Ray's default delays": Scaling(target=ongoing, upper=40),
        "requests, short delays": replace(fast, target=ongoing),
        "work, Ray's default delays": Scaling("work", seconds, upper=40),
        "work, short delays": replace(fast, measure="work", target=seconds),
    }


def targets(study: Study, fleet: Fleet, load: float) -> tuple[float, float]:
    """Ongoing requests and seconds of work of a replica at a load: the same size for both measures."""
    watched = replace(fleet, scaling=Scaling(lower=fleet.replicas, upper=fleet.replicas))
    result = study.run(watched, load, 4000)
    last = result.ended.max()
    ongoing = result.in_system / last / fleet.replicas
    return ongoing, result.mean_work / fleet.replicas / fleet.capacity


def flash(study: Study) -> str:
    """A flash crowd: four times the rate for two minutes."""
    rows: list[Sequence[object]] = []
    base = Fleet(CURVES["cpu"], 4, "ray")
    ongoing, seconds = targets(study, base, 0.6)
    for startup_s in (10.0, 60.0):
        for name, scaling in scalings(ongoing, seconds).items():
            own = scaling and replace(scaling, lower=4)
            fleet = replace(base, scaling=own, startup_s=startup_s)
            # 600 s, of which the crowd takes the third and the fourth minute.
            rate = 0.6 * fleet.capacity * 4
            length = 600 * study.scale
            shape = Flash(length / 5, length / 5)
            result = simulate(fleet, arrivals(rate, length, study.seed, shape))
            inside = (result.created >= length / 5) & (result.created < 2 * length / 5)
            crowd = float(np.percentile(result.latency[inside], 95))
            most = max(count for _, count in result.replicas)
            hours = result.device_s / 3600
            rows.append([f"{startup_s:g}", name, *cells(result), f"{crowd:.2f}", most, f"{hours:.2f}"])
            if startup_s == 10:
                centres = (np.arange(30) + 0.5) * length / 30
                for at in centres:
                    near = np.abs(result.created - at) < length / 60
                    if near.any():
                        study.draw(f"flash|{name}", float(at), float(result.latency[near].mean()))
    title = f"flash crowd, targets {ongoing:.1f} requests, {seconds:.2f} s of work"
    header = "start-up, s|autoscaling|mean|p50|p95|p99|p95 of the crowd|most replicas|device-hours"
    return table(title, header, rows)


def day(study: Study) -> str:
    """A day of half an hour, fixed for its peak and scaled."""
    rows: list[Sequence[object]] = []
    base = Fleet(CURVES["cpu"], 4, "ray", startup_s=30)
    ongoing, seconds = targets(study, base, 0.6)
    rate, length = 0.6 * base.capacity * 4, 1800 * study.scale
    requests = arrivals(rate, length, study.seed, Diurnal(length))
    images = sum(each.images for each in requests)
    for name, scaling in scalings(ongoing, seconds).items():
        count = 4 if scaling else 7
        label = name if scaling else "none, 7 replicas"
        result = simulate(replace(base, replicas=count, scaling=scaling), requests)
        hours = result.device_s / 3600
        cost = study.price * hours / images * 1e6
        rows.append([label, *cells(result), f"{hours:.2f}", f"{cost:.0f}"])
    header = "autoscaling|mean|p50|p95|p99|device-hours|cost of 10⁶ images"
    return table(f"day, at {study.price:g} a device-hour", header, rows)


def batching(study: Study) -> str:
    """Steps that choose their rows anew, against batches that run to completion."""
    rows: list[Sequence[object]] = []
    for name, curve in CURVES.items():
        for load in (0.3, 0.5, 0.7, 0.8, 0.9):
            for kind in ("steps", "requests"):
                fleet = Fleet(curve, 4, "ray", kind, 0 if kind == "steps" else 32 if name == "gpu" else 16)
                result = study.run(replace(fleet, max_ongoing=10**6), load, 6000)
                drained = f"{result.ended.max() / result.created[-1]:.2f}"
                rows.append([name, load, kind, *cells(result), drained])
                study.draw(f"batching, {name}|{kind}", load, p95(result))
    header = "curve|load|batching|mean|p50|p95|p99|last end / last arrival"
    return table("batching: 4 replicas", header, rows)


def loss(study: Study) -> str:
    """Replicas that are lost with all they were doing, and replaced."""
    rows: list[Sequence[object]] = []
    base = Fleet(CURVES["cpu"], 10, "ray")
    for load in (0.5, 0.7, 0.9):
        for lost in (0, 1, 3):
            for startup_s in (10.0, 60.0) if lost else (10.0,):
                fleet = replace(base, startup_s=startup_s, losses=(60.0 * study.scale,) * lost)
                result = study.run(fleet, load, 6000)
                again = int((result.attempts > 1).sum())
                share = f"{result.lost / result.evaluations.sum():.2%}"
                rows.append([load, lost, f"{startup_s:g}" if lost else "–", *cells(result), again, share])
    header = "load|lost|start-up, s|mean|p50|p95|p99|requests begun again|work lost"
    return table("loss: 10 replicas, cpu", header, rows)


SECTIONS = {made.__name__: made for made in (routing, limits, large, objective, flash, day, batching, loss)}
