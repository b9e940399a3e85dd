from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from model.evaluation.anomaly_page import markdown

REPORT: dict[str, Any] = {
    "model": "ramps",
    "weights_sha256": "0123",
    "command": "python -m model.evaluation.anomaly --model ramps",
    "runtime": "torch float32",
    "shape": [1, 8, 8],
    "timesteps": 1000,
    "terms": 50,
    "train": {"images": 500, "bits_per_dim": [2.5, 0.04]},
    "test": {
        "images": 400,
        "bits_per_dim": [2.75, 0.05],
        "prior": [0.00002, 0.0],
        "decoder": [1.25, 0.03],
        "error_by_subset": 0.015,
    },
    "detection": [
        {
            "set": "digits",
            "images": 120,
            "bits_per_dim": [1.5, 0.02],
            "auc": {"bits": [0.05, 0.01], "distance": [0.8, 0.02], "typicality": [0.99, 0.004]},
        }
    ],
    "curve": {
        "timestep": [float(t) for t in range(24, -1, -1)],
        "rate": [0.1 * i for i in range(25)],
        "rmse": [float(t) for t in range(24, -1, -1)],
    },
    "bound_and_flow": {
        "images": 24,
        "terms": 100,
        "steps": 64,
        "checked": 8,
        **{
            key: [0.01 * i, 0.001]
            for i, key in enumerate(
                ("bound", "decoder", "rate", "finer", "flow_rate", "rate_above_flow", "finer_above_flow",
                 "flow_with_decoder", "flow_uniform"), 1
            )
        },
        "above_in_every_image": True,
        "twice_the_steps": {"noised": [0.0012, 0.0001]},
    },
}  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all numbers."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [found for key, inner in enumerate(value) for found in leaves(inner, (*path, key))]
    return [path]


NOT_REPORTED = {("test", key, 1) for key in ("prior", "decoder")}
"""Errors of parts of the bound: only their means are reported."""
REPORTED = [path for path in leaves(REPORT) if path[0] != "curve" and path not in NOT_REPORTED]


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: ".".join(map(str, path)))
def test_everything_that_was_found_is_on_the_page(path: tuple[Any, ...]) -> None:
    changed = copy.deepcopy(REPORT)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = f"{old}x" if isinstance(old, str) else (not old if isinstance(old, bool) else old + 3)
    assert markdown(changed) != markdown(REPORT)


def test_the_curve_is_thinned_and_keeps_its_ends() -> None:
    page = markdown(REPORT)
    assert "| 24 | 0.000 | 24.0 |" in page
    assert "| 0 | 2.400 | 0.0 |" in page
    rows = page.split("| timestep | rate")[1].split("\n\n")[0].splitlines()
    assert len(rows) == 2 + 10


def test_the_parts_of_the_bound_add_up_to_it() -> None:
    assert "**2.750 ± 0.050 bits per dimension**" in markdown(REPORT)
    assert "1.500 for the steps down" in " ".join(markdown(REPORT).split())
    assert json.loads(json.dumps(REPORT)) == REPORT
