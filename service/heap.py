"""The garbage collector, once a process has everything that it keeps for its life."""

from __future__ import annotations

import gc

YOUNG = 10_000
"""Objects that may be made before the collector looks at the young ones; 700 or 2,000 otherwise."""


def freeze_heap() -> None:
    """Let the collector forget what there is now, since it stays, and look less often at the rest.

    Otherwise a collection of all generations, in the middle of requests or steps, visits every module's
    objects, for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
