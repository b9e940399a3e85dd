"""The garbage collector of a process that serves."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from service.heap import YOUNG, freeze_heap
kept = [[] for _ in range(5000)]
freeze_heap()
assert gc.get_freeze_count() > 5000
assert gc.get_threshold()[0] == YOUNG
cycle = []
cycle.append(cycle)
del cycle
assert gc.collect() > 0
"""


def test_what_is_there_is_frozen_and_what_comes_later_is_collected() -> None:
    """In a process of its own, since it holds for all of one."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
