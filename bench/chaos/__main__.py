"""The service under disturbances, while it works: `python -m bench.chaos`, or `make chaos`.

A real service over two engines, on a tiny network, answers a steady load of every kind of request. Each
disturbance is done again and again; after each one no more is sent, and then

- every request has ended exactly once, with the bytes that it has in a quiet run, unless the disturbance
  says what else may become of it;
- slots, tasks, descriptors, threads and processes are what they were before.

Prints a table; exits with 1 where anything is otherwise. `--without-replay` is the control: it must.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.chaos.disturbances import DISTURBANCES, Disturbance, DisturbanceError, Scene
from bench.chaos.faults import CLASSES, NO_REPLAY, throw
from bench.chaos.load import Load, Outcome, Result, quiet_results
from bench.chaos.service import Held, Service
from bench.soak import tiny_model
from model import checkpoint

BEFORE_S, AFTER_S = 0.3, 0.3
"""How long the load runs around a disturbance."""
SETTLE_S = 15.0
WARM_UP_S = 1.5
SHOWN = 5
"""Faults of a disturbance that are printed."""


@dataclass
class Line:
    """What came out of a disturbance: how often it was done, what became of requests, what was wrong."""

    name: str
    times: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    replayed: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        right = self.outcomes["right"]
        others = ", ".join(f"{count} {how}" for how, count in sorted(self.outcomes.items()) if how != "right")
        cells = (self.name, self.times, self.outcomes.total(), right, others or "–", self.replayed)
        return f"|{'|'.join(map(str, cells))}|{'**no**' if self.faults else 'yes'}|"


def unwanted(outcomes: Sequence[Outcome], disturbance: Disturbance, since: float) -> list[str]:
    """What should not have become of requests. since: `allows` holds for those sent later."""
    return [
        f"{each.kind}: {each.how} {each.detail}".strip()
        for each in outcomes
        if each.how != "right" and not (each.how in disturbance.allows and each.sent >= since)
    ]


async def disturb(scene: Scene, load: Load, disturbance: Disturbance, baseline: Held, line: Line) -> None:
    """Do it once, under load, and note what comes out."""
    begun, replayed = time.monotonic(), scene.service.metrics()["ddpm_jobs_replayed_total"]
    scene.since = 0.0
    load.start()
    await asyncio.sleep(BEFORE_S)
    try:
        await disturbance.act(scene)
    except (DisturbanceError, OSError, TimeoutError) as error:
        line.faults.append(repr(error))
    await asyncio.sleep(AFTER_S)
    outcomes = await load.stop()
    excess = await asyncio.to_thread(scene.service.settle, baseline, SETTLE_S)
    line.faults += unwanted(outcomes, disturbance, scene.since)
    line.faults += [f"more than at the baseline: {name}, {change}" for name, change in excess.items()]
    line.outcomes.update(each.how for each in outcomes)
    again = int(scene.service.metrics()["ddpm_jobs_replayed_total"] - replayed)
    line.replayed += max(0, again)
    line.times += 1
    line.seconds += time.monotonic() - begun


@dataclass(frozen=True)
class Prepared:
    """A service that stands the load alone, what it answers then, and what it holds after it."""

    service: Service
    expected: Mapping[str, Result]
    baseline: Held


async def prepare(service: Service) -> Prepared:
    """Have it answer a while, undisturbed. Raises RuntimeError where that is not as it should be."""
    expected = await quiet_results(service.url)
    load = Load(service.url, expected)
    load.start()
    await asyncio.sleep(WARM_UP_S)
    faults = unwanted(await load.stop(), DISTURBANCES[0], 0.0)
    excess = await asyncio.to_thread(service.settle, None, SETTLE_S)
    if faults or excess:
        raise RuntimeError(f"undisturbed, it does not work: {faults[:SHOWN]} {excess}")
    await asyncio.sleep(AFTER_S)  # until the last connections are closed
    return Prepared(service, expected, await asyncio.to_thread(service.held))


async def run(prepared: Prepared, chosen: Sequence[Disturbance], times: int) -> list[Line]:
    """Do each of them so many times; a line for each, printed as soon as it is there."""
    load = Load(prepared.service.url, prepared.expected)
    scene = Scene(prepared.service, prepared.expected)
    print(
        "|disturbance|times|requests|right bytes|otherwise|jobs replayed|as it should be|\n|---|" + "--:|" * 6
    )
    lines = []
    for disturbance in chosen:
        line = Line(disturbance.name)
        for _ in range(times):
            await disturb(scene, load, disturbance, prepared.baseline, line)
        if disturbance.replays and not line.replayed:
            line.faults.append("no job was run again: the disturbance has hit nothing")
        print(line, flush=True)
        for fault in line.faults[:SHOWN]:
            print(f"    {fault}", file=sys.stderr, flush=True)
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown. Returns 1 where something is not as it should be."""
    parser = argparse.ArgumentParser("python -m bench.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="how often each is done")
    parser.add_argument("--short", action="store_true", help="only those of the short form")
    parser.add_argument(
        "--only", action="append", metavar="NAME", choices=[each.name for each in DISTURBANCES]
    )
    parser.add_argument("--without-replay", action="store_true", help="the control: must fail")
    args = parser.parse_args(arguments)
    chosen = [each for each in DISTURBANCES if each.short or not args.short]
    chosen = [each for each in chosen if args.only is None or each.name in args.only]
    begun = time.monotonic()
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        checkpoint.save(model, tiny_model(class_names=CLASSES))
        service = Service(model, Path(folder))
        if args.without_replay:
            throw(service.folder, NO_REPLAY, "")
        try:
            prepared = asyncio.run(prepare(service))
            print(f"At the baseline: {prepared.baseline}\n")
            lines = asyncio.run(run(prepared, chosen, args.times))
        finally:
            service.stop()
    wrong = [line.name for line in lines if line.faults]
    print(f"\n{time.monotonic() - begun:.0f} s. Not as it should be: {', '.join(wrong) or 'nothing'}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
