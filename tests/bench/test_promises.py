"""What is announced and promised at arrival, and what comes of it, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np

from bench.promises import OneByOne, Unsuspecting, announced, with_deadlines
from bench.simulation import CURVES, Case
from service.engine.scheduler import Scheduler

BASE = Case(CURVES["cpu"], arrivals=300, load=1.5)


def test_all_that_is_accepted_with_a_deadline_is_in_time() -> None:
    together, one_by_one = with_deadlines(BASE), with_deadlines(BASE, OneByOne)
    assert all(
        promised.ended <= (promised.spec.deadline or inf) for promised in together if promised.accepted
    )
    assert sum(promised.accepted for promised in together) > 100
    assert all(promised.computed == 0 for promised in together if not promised.accepted)
    # Looked at one by one, a part of the work is for nothing.
    assert sum(promised.computed for promised in one_by_one if promised.ended == inf) > 0.05 * sum(
        promised.computed for promised in one_by_one
    )


def test_the_announced_time_allows_for_requests_to_come() -> None:
    case = replace(BASE, load=2.0)
    late = {
        kind: np.percentile([promised.latency - promised.eta for promised in announced(case, kind)], 95)
        for kind in (Scheduler, Unsuspecting)
    }
    assert late[Scheduler] < 0.3 * late[Unsuspecting]


def test_a_request_without_slots_is_not_accepted() -> None:
    done = with_deadlines(replace(BASE, load=100.0, policy="fifo"))
    assert not any(promised.accepted for promised in done if not promised.slots_free)
