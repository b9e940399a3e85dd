from __future__ import annotations

import json

import pytest

from bench import confirm
from bench.simulation import Case, run
from bench.workload import MEAN_EVALUATIONS
from tests.bench.test_report import case

INFO = {"limits": {"max_batch": 4}, "runtime": {"step_seconds": {"1": 0.01, "2": 0.015, "4": 0.025}}}
CAPACITY = 160.0


def real(server, load=0.7):
    return {**case(server, "mix", load, preview=0.125), "info": INFO, "requests": 60}


@pytest.fixture
def content():
    cases = [real("service"), real("service/fifo"), case("plain/ours"), {**real("service"), "load": None}]
    return {"terms": {"seed": 3}, "capacity": {"rows_per_s": CAPACITY}, "cases": cases}


def test_the_same_requests_are_simulated_at_the_batch_size_of_the_service(content):
    latency, first = confirm.simulated(content["cases"][0], content)
    curve = ((1, 0.01), (2, 0.015), (4, 0.025))
    outcomes = run(Case(curve, "mix", "remaining", 4, 0.7, arrivals=60, seed=3))
    assert latency["mean"] == pytest.approx(sum(o.latency for o in outcomes) / 60)
    assert first["max"] == pytest.approx(max(o.first - o.created for o in outcomes))
    assert outcomes[-1].created == pytest.approx(60 * MEAN_EVALUATIONS["mix"] / (0.7 * CAPACITY), rel=0.5)


def test_a_row_for_each_of_our_cases(content, tmp_path, capsys):
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    confirm.main([str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|mix")]
    assert [row[:3] for row in rows] == [["mix", "0.7", "remaining"], ["mix", "0.7", "fifo"]]
    assert {len(row) for row in rows} == {len(confirm.HEADER.split("|"))}
    assert [row[3:6] for row in rows] == [["2.00"] * 3] * 2  # measured
    assert rows[0][6:9] != rows[1][6:9]  # simulated
