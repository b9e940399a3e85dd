"""A job's span, inside the span that FastAPI makes of its request where OpenTelemetry is configured.

POST /generate            the request, until the last byte of its answer
└── job                   from its submission to its last event; it may outlive the request
    ├── queue             until its first step
    └── compute           from there until its last step is read
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode
from opentelemetry.util.types import AttributeValue

from service.engine.jobs import JobSpec
from service.engine.messages import Cancelled, Failed, Finished, Terminal

tracer = trace.get_tracer("service.engine")
"""Records nothing unless something configures OpenTelemetry."""


@dataclass(frozen=True)
class JobSpan:
    """The span of a job in flight. started: Unix time in nanoseconds."""

    span: Span
    started: int

    @staticmethod
    def begin(spec: JobSpec) -> JobSpan | None:
        """The span of a job that the current request submits; None where that is not recorded."""
        if not trace.get_current_span().is_recording():
            return None
        attributes: dict[str, AttributeValue] = {
            "ddpm.job.id": spec.id,
            "ddpm.job.sampler": spec.sampler,
            "ddpm.job.images": len(spec.stages[-1].chains),
            "ddpm.job.steps": sum(max(len(each.plan) for each in stage.chains) for stage in spec.stages),
            "ddpm.job.network_evaluations": spec.evaluations,
        }
        started = time.time_ns()
        return JobSpan(tracer.start_span("job", attributes=attributes, start_time=started), started)

    def replayed(self) -> None:
        """Its engine has died, and it begins again."""
        self.span.add_event("replayed")

    def end(self, event: Terminal) -> None:
        """It has ended, with this event."""
        match event:
            case Finished():
                self._add_parts(event.queue_s, event.run_s)
            case Failed(_, error):
                self.span.set_attribute("error.type", error.code)
                self.span.set_status(StatusCode.ERROR, error.detail)
            case Cancelled():
                self.span.set_attribute("ddpm.job.cancelled", True)
        self.span.end()

    def _add_parts(self, queue_s: float, run_s: float) -> None:
        """The time that the job waited, and the time that it was computed."""
        context = trace.set_span_in_context(self.span)
        begun = self.started + int(queue_s * 1e9)
        parts = ("queue", self.started, begun), ("compute", begun, begun + int(run_s * 1e9))
        for name, start, end in parts:
            tracer.start_span(name, context=context, start_time=start).end(end_time=end)
