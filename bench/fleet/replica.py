"""A replica in virtual time: the service's scheduler, or a server that runs batches to completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bench.simulation import Curve, RunToCompletion
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec
from service.engine.scheduler import Batch, Scheduler

Batching = Literal["steps", "requests"]
"""Who runs is decided for each step; or a batch, once formed, runs to its end, as in Triton or LitServe."""


@dataclass(eq=False, slots=True)
class Replica:
    """A scheduler, and what has come for it since its last step.

    name: its place among all that there ever were. started: when its device was ordered. evaluations: what
    remains for all its requests. ongoing: those requests.
    rows: of a step that served all of them. batch: of the step in progress, if there is one.
    report: its evaluations, its requests and when that was, as routers have last heard it.
    """

    name: int
    engine: Scheduler | RunToCompletion
    started: float
    evaluations: int = 0
    ongoing: int = 0
    rows: int = 0
    inbox: list[JobSpec] = field(default_factory=list)
    batch: Batch | None = None
    alive: bool = True
    draining: bool = False
    report: tuple[float, int, float] = (0.0, 0, 0.0)

    def accept(self, spec: JobSpec) -> None:
        """Take a request; it joins at the next step."""
        self.inbox.append(spec)
        self.evaluations += spec.evaluations
        self.ongoing += 1
        self.rows += sum(chain.plan.evaluations[0] for chain in spec.stages[0].chains)

    def begin(self, now: float) -> Batch | None:
        """Begin a step with whatever has come; None when there is nothing to do."""
        for spec in self.inbox:
            self.engine.add(spec, now)
        self.inbox.clear()
        batch = self.engine.schedule(now)
        self.batch = batch if batch.samples else None
        return self.batch

    def end(self) -> list[str]:
        """End the step in progress. Returns the ids of the requests that are finished."""
        assert self.batch is not None
        batch, finished = self.batch, []
        for job in self.engine.commit(batch.samples):
            if self.engine.stage_done(job):
                self.engine.finish(job)
                finished.append(job.id)
        self.rows -= sum(each.chain.plan.evaluations[0] for each in batch.samples if each.step == each.steps)
        self.evaluations -= batch.size
        self.ongoing -= len(finished)
        self.batch = None
        return finished


def engine_of(batching: Batching, curve: Curve, max_batch_size: int = 0) -> Scheduler | RunToCompletion:
    """An idle engine. max_batch_size: the curve's knee where it is 0, as in the service."""
    times = StepTimes(curve)
    size = max_batch_size or times.knee()
    return Scheduler(size, times) if batching == "steps" else RunToCompletion(size)
