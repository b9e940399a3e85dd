"""Policies and batch widths compared: the service's own scheduler, driven through traces in virtual time.

    python -m bench.simulate                      # every table, as Markdown (minutes)
    python -m bench.simulate --only widths        # one of them; --quick: a small version of all, in seconds
    python -m bench.simulate --out docs           # also docs/scheduling-tables.md and docs/scheduling.svg
    python -m bench.simulate --curve info.json    # the step times that a running service's /info reports

A step of r rows takes what the curve says, a request joins at the first step boundary after it came, and
nothing else takes time. Arrivals are Poisson, drawn from a seeded Philox generator, the same for every policy
and width. Every run lasts until all its jobs have ended. Load 1 is the most rows per second on the curve.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np

from service.events import Event, Finished, Picture
from service.jobs import Chain, Job, Sample
from service.scheduler import Draw, Policy, Scheduler, StepPlan, StepTimes

Curve = tuple[tuple[int, float], ...]
"""(rows, seconds of a step), by rows."""
CURVES: dict[str, Curve] = {
    # Measured: two cores, float32.
    "cpu": ((1, 0.0087), (2, 0.0144), (4, 0.031), (8, 0.062), (16, 0.121)),
    # Assumed: nearly flat.
    "gpu": tuple((rows, 0.005 + 0.003 * (rows - 1) / 31) for rows in (1, 2, 4, 8, 16, 32)),
}
WORKLOADS = ("uniform", "mix")
POLICIES = ("remaining", "fifo", "sharing", "peer")
LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
TURNS = {2: "2", 4: "4", 8: "8", 16: "16", 64: "64", 10**9: "never"}
EMPTY = np.empty((0, 0, 1), np.uint8)
GUIDED = 0.3  # share of the mix's requests whose images cost two rows


@dataclass(frozen=True)
class Course:
    """A chain and its plan in one; only length and cost matter here."""

    steps: int
    rows: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    @property
    def plan(self) -> Course:
        """Itself."""
        return self

    @property
    def timesteps(self) -> Sequence[int]:
        """Any will do."""
        return range(self.steps)


class RunToCompletion:
    """THE PEER, no part of the service: a batch is formed, then run to its end before the next one is.

    The batch is the oldest waiting image and those behind it with as many steps, up to `width` rows.
    A kind peer: a request's images may be spread over batches, guided and unguided ones share a batch, and it
    never waits for a batch to fill up.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._jobs: set[str] = set()
        self._waiting: list[Sample] = []
        self._batch: list[Sample] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, now: float) -> list[Event]:  # noqa: ARG002 - the scheduler's interface
        """Take a job in, behind those that are there."""
        self._jobs.add(job.id)
        self._waiting += job.samples
        return []

    def schedule(self, now: float) -> StepPlan:  # noqa: ARG002 - the scheduler's interface
        """Go on with the batch, or form the next one."""
        free = self.width
        others: list[Sample] = []
        if not self._batch:
            for sample in self._waiting:
                fits = sample.steps == self._waiting[0].steps and sample.chain.rows <= free
                (self._batch if fits else others).append(sample)
                free -= sample.chain.rows if fits else 0
            self._waiting = others
        return StepPlan(tuple(self._batch), sum(sample.chain.rows for sample in self._batch))

    def commit(self, plan: StepPlan, now: float, draw: Draw) -> list[Event]:  # noqa: ARG002 - the same
        """Advance the batch by a step; after its last, end the jobs that lack no other image."""
        for sample in plan.samples:
            sample.row += 1
            sample.job.remaining -= sample.chain.rows
        if plan.samples[0].remaining:
            return []
        self._batch = []
        over = {sample.job.id: sample.job for sample in plan.samples if not sample.job.remaining}
        self._jobs -= over.keys()
        return [Finished(job_id, (), 0.0, now - job.created) for job_id, job in over.items()]


@dataclass(eq=False)
class Outcome:
    """How a job fared, in seconds of the virtual clock."""

    created: float
    chain: Chain  # each of its images
    images: int
    ahead_rows: int  # still to be done at its arrival, for it and the jobs there
    ahead_steps: int  # of the longest chain among them
    cost: int  # rows of the widest
    first: float = 0.0  # end of the first step that advanced it
    ended: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of network calls that it took."""
        return len(self.chain.plan) * self.images * self.chain.rows

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last image."""
        return self.ended - self.created

    def slowdown(self, curve: Curve) -> float:
        """Latency over the least that it takes with the machine to itself, at any width."""
        widths = {min(rows, self.images * self.chain.rows) for rows, _ in curve if rows >= self.chain.rows}
        return self.latency / (self.rows * min(StepTimes(curve).at(rows) / rows for rows in widths))

    def bound(self, width: int, turn: int, times: StepTimes) -> float:
        """Most seconds it takes under `remaining`, whatever comes later; proved in docs/scheduling.md."""
        full = max(1, width - self.cost + 1)
        turns = int(self.ahead_rows / full + self.ahead_steps * (1 - 1 / full))
        return (turn * turns + 1) * times.at(max(width, self.cost))


def read_curve(path: Path) -> Curve:
    """Take `runtime.step_seconds`, {rows: seconds}, from a file with the answer of /info."""
    seconds = json.loads(path.read_text())["runtime"]["step_seconds"]
    return tuple(sorted((int(rows), float(value)) for rows, value in seconds.items()))


def request(name: str, created: float, steps: int, images: int = 1, rows: int = 1) -> Job:
    """Build a job of `images` chains of `steps` steps and `rows` rows, that arrives at `created` seconds."""
    job = Job(name, "ddim", created=created)
    for seed in range(images):
        job.add(Course(steps, rows, seed))
    return job


def trace(workload: str, rows_per_s: float, arrivals: int, seed: int) -> list[Job]:
    """Draw `arrivals` jobs that ask for `rows_per_s` rows of network calls a second on average."""
    rng = np.random.Generator(np.random.Philox(seed))
    gaps = rng.exponential(size=arrivals)
    if workload == "uniform":
        return [request(str(i), float(t), 50) for i, t in enumerate(np.cumsum(gaps) * 50 / rows_per_s)]
    steps = rng.choice([20, 50, 250], size=arrivals, p=[0.7, 0.25, 0.05])
    images = rng.integers(1, 8, size=arrivals, endpoint=True)
    rows = 1 + (rng.random(arrivals) < GUIDED)
    created = np.cumsum(gaps) * (39 * 4.5 * (1 + GUIDED)) / rows_per_s  # the means of steps, images and rows
    columns = zip(created.tolist(), steps.tolist(), images.tolist(), rows.tolist(), strict=True)
    return [request(str(i), *columns_i) for i, columns_i in enumerate(columns)]


def draw(sample: Sample, kind: str) -> Picture:
    """Return an empty picture."""
    return Picture(sample.index, sample.chain.seed, kind, EMPTY)


def drive(serving: Scheduler | RunToCompletion, jobs: Iterable[Job], times: StepTimes) -> list[Outcome]:
    """Run jobs, given in order of arrival, until all have ended; their outcomes in the same order."""
    now, coming = 0.0, list(jobs)[::-1]
    outcomes: dict[str, Outcome] = {}
    there: dict[str, Job] = {}
    while coming or len(serving):
        while coming and coming[-1].created <= now:
            job = coming.pop()
            there[job.id] = job
            serving.add(job, now)
            chains = [other.samples[0].chain for other in there.values()]
            work = sum(other.remaining for other in there.values())
            ahead = work, max(len(chain.plan) for chain in chains), max(chain.rows for chain in chains)
            outcomes[job.id] = Outcome(job.created, chains[-1], len(job.samples), *ahead)
        plan = serving.schedule(now)
        if not plan.samples:
            now = coming[-1].created
            continue
        now += times.at(plan.rows)
        for outcome in {sample.job.id: outcomes[sample.job.id] for sample in plan.samples}.values():
            outcome.first = outcome.first or now
        for event in serving.commit(plan, now, draw):
            if isinstance(event, Finished):
                outcomes[event.job_id].ended = now
                del there[event.job_id]
    return list(outcomes.values())


@dataclass(frozen=True)
class Case:
    """One run. load: share of capacity; width: most rows of a step, 0 for the usual one."""

    curve: Curve
    workload: str = "mix"
    policy: str = "remaining"
    width: int = 0
    load: float = 0.7
    turn: int = 8
    arrivals: int = 1000
    seed: int = 0

    @property
    def rows(self) -> int:
        """The width; the usual one is the curve's knee, as in the service, and at least 16 for the peer."""
        return self.width or max(StepTimes(self.curve).knee(), 16 if self.policy == "peer" else 1)

    @property
    def capacity(self) -> float:
        """The most rows per second at any of the curve's points."""
        return max(rows / seconds for rows, seconds in self.curve)

    def drive(self, jobs: Iterable[Job]) -> list[Outcome]:
        """Run these jobs under the case's policy, width and turn."""
        times = StepTimes(self.curve)
        if self.policy == "peer":
            return drive(RunToCompletion(self.rows), jobs, times)
        return drive(Scheduler(self.rows, times, cast("Policy", self.policy), self.turn), jobs, times)


@cache
def run(case: Case) -> list[Outcome]:
    """Simulate the case's trace; asked again, the same answer comes from memory."""
    return case.drive(trace(case.workload, case.load * case.capacity, case.arrivals, case.seed))


def cells(outcomes: Sequence[Outcome], shown: str) -> list[str]:
    """Format seconds, one for each word: mean, p50 … p100 of latency; first, firstp95: to the first step."""
    numbers = []
    for word in shown.split():
        values = [o.first - o.created if word.startswith("first") else o.latency for o in outcomes]
        percent = word.rpartition("p")[2]
        numbers.append(np.percentile(values, float(percent)) if percent.isdigit() else np.mean(values))
    return [f"{x:.2f}" for x in numbers]


def worst(outcomes: Sequence[Outcome], curve: Curve) -> str:
    """Format the largest slowdown."""
    return f"{max(o.slowdown(curve) for o in outcomes):.1f}"


def table(title: str, header: str, rows: Iterable[Sequence[object]]) -> str:
    """Lay out a Markdown table, its header's cells parted by |."""
    lines = [header, "|".join("-" * len(header.split("|"))), *("|".join(map(str, row)) for row in rows)]
    return "\n".join([f"#### {title}", "", *(f"|{line}|" for line in lines), ""])


def grid(title: str, cases: Iterable[Case], label: str, shown: str, steps: tuple[int, ...] = (0,)) -> str:
    """Lay out a row for each case, named by its fields `label`, and a column for each policy.

    With `steps`, a row for each case and the requests of so many steps.
    """
    rows = []
    for case, of in ((case, of) for case in cases for of in steps):
        runs = [run(replace(case, policy=policy)) for policy in POLICIES]
        kept = [[o for o in done if of in (0, len(o.chain.plan))] for done in runs]
        names = [*(getattr(case, name) for name in label.split()), *([of, len(kept[0])] if of else [])]
        rows.append([*names, *(" / ".join(cells(outcomes, shown)) for outcomes in kept if outcomes)])
    header = [*label.split(), *(["steps", "requests"] if steps[0] else []), *POLICIES]
    return table(f"{title}: {shown.replace(' ', ' / ')}", "|".join(header), rows)


def policies(base: Case) -> str:
    """Everything about every policy at one load."""
    shown, rows = "mean p50 p95 p99 first firstp95", []
    for case in (replace(base, workload=w, policy=p) for w in WORKLOADS for p in POLICIES):
        done = run(case)
        rate = sum(o.rows for o in done) / (max(o.ended for o in done) - done[0].created)
        last = worst(done, case.curve), f"{rate / case.capacity:.3f}"
        rows.append([case.workload, case.policy, case.rows, *cells(done, shown), *last])
    header = "workload|policy|width|mean|p50|p95|p99|first step mean|first step p95|worst slowdown|throughput"
    return table(f"policies, load {base.load}", header, rows)


def loads(base: Case) -> str:
    """Compare the policies over the load."""
    cases = (replace(base, workload=w, load=x) for w in WORKLOADS for x in LOADS)
    return grid("loads", cases, "workload load", "mean p95")


def widths(base: Case) -> str:
    """Compare the policies at equal widths."""
    cases = (replace(base, workload=w, width=rows) for w in WORKLOADS for rows, _ in base.curve[1:])
    return grid(f"widths, load {base.load}", cases, "workload width", "mean p95 p99")


def classes(base: Case) -> str:
    """Show who pays, by the steps of the request."""
    return grid(f"classes, load {base.load}", [base], "workload", "mean p99 p100", steps=(20, 50, 250))


def turns(base: Case) -> str:
    """Vary how often a step goes in order of arrival, at the given load and above capacity."""
    rows = []
    for case in (replace(base, load=x, turn=turn) for x in (base.load, 1.2) for turn in TURNS):
        done = run(case)
        nearest = max(o.latency / o.bound(case.rows, case.turn, StepTimes(case.curve)) for o in done)
        shown = *cells(done, "mean p95 p99 p100"), worst(done, case.curve), f"{nearest:.3f}"
        rows.append([case.load, TURNS[case.turn], *shown])
    return table("turns, mix", "load|turn|mean|p95|p99|p100|worst slowdown|largest latency / bound", rows)


def starvation(base: Case) -> str:
    """Show a large job amid small ones that ask for 1.2 of capacity until half as long again as its bound."""
    rows, rate = [], 1.2 * base.capacity / 20
    for images, steps in ((64, 50), (1, 250)) if base.arrivals > 100 else ((4, 50),):
        times = StepTimes(base.curve)
        stream = 1.5 * Outcome(0.0, Course(steps), images, images * steps, steps, 1).bound(
            base.rows, 8, times
        )
        for case in [replace(base, turn=t) for t in TURNS] + [replace(base, policy=p) for p in POLICIES[1:]]:
            small = trace("uniform", 50 * rate, int(stream * rate), base.seed)
            jobs = [request("large", 0.0, steps, images), *(request(j.id, j.created, 20) for j in small)]
            large, *others = case.drive(jobs)
            shown = f"{large.latency:.1f}", f"{stream:.1f}", len(others), worst([large], case.curve)
            name = case.policy
            if name == "remaining":
                limit = large.bound(case.rows, case.turn, times)
                name += f", turn {TURNS[case.turn]}" + (f", bound {limit:.1f}" if limit < 1e6 else "")
            rows.append([f"{images}×{steps}", name, *shown, *cells(others, "mean")])
    return table("starvation", "large|policy|latency|stream|small|slowdown|mean of the small", rows)


def behind(base: Case) -> str:
    """Show one image (50 steps) asked for when 64 others are a tenth done."""
    rows = []
    for case in (replace(base, policy=p, width=w) for p in POLICIES for w in sorted({base.rows, 4, 16})):
        both = [(0.0, 64), (320 / case.capacity, 1)]
        runs = ([request(str(n), at, 50, n) for at, n in asked] for asked in (both[1:], both, both[:1]))
        (one,), (with_one, after), (many,) = map(case.drive, runs)
        times = (f"{o.latency:.2f}" for o in (one, after, many, with_one))
        rows.append([case.policy, case.width, *times])
    return table("behind", "policy|width|1 image alone|behind 64|64 images alone|with 1 arriving", rows)


SECTIONS = {made.__name__: made for made in (policies, loads, widths, classes, turns, starvation, behind)}


def plot(bases: dict[str, Case], path: Path) -> None:
    """Draw p95 over the load, a panel for each workload and curve."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scheduling"  # the same bytes every time
    from matplotlib import pyplot as plt

    size = 10, 4 * len(bases)
    figure, axes = plt.subplots(len(bases), 2, figsize=size, squeeze=False, layout="constrained")
    panels = zip(axes.flat, ((name, workload) for name in bases for workload in WORKLOADS), strict=True)
    for panel, (name, workload) in panels:
        for policy in POLICIES:
            case = replace(bases[name], workload=workload, policy=policy)
            p95 = [float(*cells(run(replace(case, load=x)), "p95")) for x in LOADS]
            line = "o:" if policy == "peer" else "o-"
            panel.semilogy(LOADS, p95, line, label=f"{policy}, width {case.rows}")
        panel.set(title=f"{name}, {workload}", xlabel="load (share of capacity)", ylabel="p95 latency (s)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser("python -m bench.simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curve", action="append", help="cpu, gpu or a file with /info's answer; repeatable")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a table; repeatable")
    parser.add_argument("--load", type=float, default=0.7, help="share of capacity, where a table has one")
    parser.add_argument("--width", type=int, default=0, help="most rows of a step (0: the curve's knee)")
    parser.add_argument("--arrivals", type=int, default=1000, help="requests of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--quick", action="store_true", help="20 arrivals, and a small large job")
    parser.add_argument("--out", type=Path, help="folder for scheduling-tables.md and scheduling.svg")
    args = parser.parse_args(arguments)
    arrivals = 20 if args.quick else args.arrivals
    usual = Case((), width=args.width, load=args.load, arrivals=arrivals, seed=args.seed)
    bases = {}
    for name in args.curve or CURVES:
        curve = CURVES[name] if name in CURVES else read_curve(Path(name))
        bases[Path(name).stem] = replace(usual, curve=curve)
    texts = []
    for name, base in bases.items():
        points = ", ".join(f"{rows}: {seconds * 1e3:.1f}" for rows, seconds in base.curve)
        facts = f"capacity {base.capacity:.0f} rows/s; usual width {base.rows}; {arrivals} arrivals a run"
        head = f"Step times in ms by rows: {points}; {facts}, seed {args.seed}, all served to the end."
        texts.append(f"### {name}\n\n{head} Times in seconds.\n")
        print(texts[-1], flush=True)
        for section in args.only or SECTIONS:
            texts.append(SECTIONS[section](base))
            print(texts[-1], flush=True)
    if args.out:
        (args.out / "scheduling-tables.md").write_text("\n".join(texts))
        plot(bases, args.out / "scheduling.svg")


if __name__ == "__main__":
    main()
