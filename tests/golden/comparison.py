"""Where an answer differs from the golden one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TOLERANCE = 1e-6
"""Relative, of what is summed over pixels: machines sum in other orders."""


def differences(golden: Mapping[str, Any], found: Mapping[str, Any], *, summed: bool) -> list[str]:
    """A line for each place where they differ; none when the answer is the golden one.

    Of a stream's looks some may be missing, but not those of the last step. summed: whether numbers that are
    not whole only have to agree within TOLERANCE.
    """
    tolerance = TOLERANCE if summed else 0.0
    rest, other = ({key: value[key] for key in value.keys() - {"looks"}} for value in (golden, found))
    lines = _differences(rest, other, "", tolerance)
    looks, seen = golden.get("looks", {}), found.get("looks", {})
    last = max(map(_step, looks), default=0)
    lines += [f"looks: no {place}" for place in looks if _step(place) == last and place not in seen]
    for place in seen:
        if place not in looks:
            lines.append(f"looks: {place} is not in the golden file")
        else:
            lines += _differences(looks[place], seen[place], f"looks/{place}", tolerance)
    return lines


def _step(place: str) -> int:
    return int(place.split()[1])


def _differences(golden: Any, found: Any, place: str, tolerance: float) -> list[str]:
    if type(golden) is not type(found):
        return [f"{place}: {found!r} in place of {golden!r}"]
    if isinstance(golden, Mapping):
        lines = [f"{place}/{key}: missing" for key in golden.keys() - found.keys()]
        lines += [f"{place}/{key}: new" for key in found.keys() - golden.keys()]
        for key in golden.keys() & found.keys():
            lines += _differences(golden[key], found[key], f"{place}/{key}", tolerance)
        return lines
    if isinstance(golden, Sequence) and not isinstance(golden, str):
        if len(golden) != len(found):
            return [f"{place}: {len(found)} entries in place of {len(golden)}"]
        lines = []
        for i, (one, other) in enumerate(zip(golden, found, strict=True)):
            lines += _differences(one, other, f"{place}/{i}", tolerance)
        return lines
    if isinstance(golden, float) and math.isclose(golden, found, rel_tol=tolerance, abs_tol=0.0):
        return []
    return [] if golden == found else [f"{place}: {found!r} in place of {golden!r}"]
