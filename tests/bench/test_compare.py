from __future__ import annotations

import json

import pytest

from bench import compare, report
from bench.compare import Case, Results, Terms, TermsError, cases
from bench.workload import MEAN_EVALUATIONS
from tests.bench.test_report import case

TERMS = Terms("weights/mine", "auto", "auto", 10.0, 60.0, 0)
FIGURES = {
    "batch_size": 2,
    "rows_per_s": 100.0,
    "by_batch_size": {},
    "runtime": "openvino",
    "dtype": "float32",
}


@pytest.fixture
def ran(monkeypatch):
    """The cases that were run, by a stand-in; those whose servers are in `broken` do not start."""
    ran: list[Case] = []
    monkeypatch.setattr(compare, "measure_capacity", lambda terms, seconds: FIGURES)

    def run(each, terms, capacity):
        ran.append(each)
        return {"error": "no"} if each.server in BROKEN else case(each.server, each.workload, each.load)

    monkeypatch.setattr(compare, "run", run)
    BROKEN.clear()
    return ran


BROKEN: set[str] = set()


def arguments(folder, *more):
    servers = ["--server", "service", "--server", "plain/ours"]
    return ["--out", str(folder), "--load", "0.5", "--load", "burst", *servers, *more]


def test_what_is_done_is_not_done_again(ran, tmp_path):
    compare.main(arguments(tmp_path, "--workload", "mix"))
    assert ran == [Case(server, "mix", load) for load in (0.5, None) for server in ("service", "plain/ours")]
    ran.clear()
    compare.main(arguments(tmp_path))
    assert {each.workload for each in ran} == {"uniform"}
    assert len(json.loads((tmp_path / "comparison.json").read_text())["cases"]) == 8
    assert "#### uniform, all at once" in (tmp_path / "comparison.md").read_text()


def test_what_was_done_before_an_interruption_is_kept(ran, tmp_path, monkeypatch):
    whole = compare.run

    def interrupted(each, terms, capacity):
        if each.load is None:
            raise KeyboardInterrupt
        return whole(each, terms, capacity)

    monkeypatch.setattr(compare, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments(tmp_path, "--workload", "mix"))
    monkeypatch.setattr(compare, "run", whole)
    ran.clear()
    compare.main(arguments(tmp_path, "--workload", "mix"))
    assert {each.load for each in ran} == {None}


def test_a_failed_case_is_tried_again(ran, tmp_path):
    BROKEN.add("plain/ours")
    compare.main(arguments(tmp_path, "--workload", "mix"))
    assert "did not start" in (tmp_path / "comparison.md").read_text()
    BROKEN.clear()
    ran.clear()
    compare.main(arguments(tmp_path, "--workload", "mix"))
    assert {each.server for each in ran} == {"plain/ours"}
    assert "did not start" not in (tmp_path / "comparison.md").read_text()


def test_results_on_other_terms_are_not_mixed(ran, tmp_path):
    compare.main(arguments(tmp_path))
    with pytest.raises(SystemExit, match="other terms"):
        compare.main(arguments(tmp_path, "--patience", "10"))


def test_a_file_is_read_back(tmp_path):
    path = tmp_path / "comparison.json"
    first = Results(path, TERMS)
    assert first.once("capacity", lambda: {"rows": 3}) == {"rows": 3}
    first.add(Case("service", "mix", 0.7), {"done": 1})
    second = Results(path, TERMS)
    assert second.once("capacity", lambda: {"rows": 4}) == {"rows": 3}
    assert second.has(Case("service", "mix", 0.7))
    assert not second.has(Case("service", "mix", 0.9))
    with pytest.raises(TermsError):
        Results(path, Terms("weights/other", "auto", "auto", 10.0, 60.0, 0))


def test_every_load_has_the_same_requests():
    few, many = (TERMS.requests(Case("service", "mix", load), 200.0) for load in (0.5, 1.5))
    assert 0 < len(few) < len(many)
    assert [each.evaluations for each in few] == [each.evaluations for each in many[: len(few)]]
    assert few[-1].created == pytest.approx(TERMS.seconds, rel=0.8)


def test_a_burst_sends_everything_at_once_and_waits_for_it():
    burst = Case("service", "mix", None)
    requests = TERMS.requests(burst, 200.0)
    assert {each.created for each in requests} == {0.0}
    assert len(requests) == round(200.0 * TERMS.burst_s / MEAN_EVALUATIONS["mix"])
    assert TERMS.patience(burst) > TERMS.patience(Case("service", "mix", 1.5)) == TERMS.patience_s


def test_load_by_load():
    found = list(cases(["a", "b"], ["mix"], [0.7, 0.3]))
    assert found == [Case(server, "mix", load) for load in (0.7, 0.3) for server in ("a", "b")]


@pytest.mark.slow
def test_our_service_for_real(tiny_folder, tmp_path):
    shared = ["--out", str(tmp_path), "--model", str(tiny_folder), "--server", "service"]
    compare.main([*shared, "--quick", "--workload", "mix", "--load", "0.02", "--seconds", "3"])
    content = json.loads((tmp_path / "comparison.json").read_text())
    (found,) = content["cases"]
    assert found["done"] == found["requests"] > 0, found["errors"]
    assert found["latency"]["mean"] >= found["first_preview"]["mean"] > 0
    assert found["eta_error"]
    assert found["usage"]["peak_bytes"] > 1e8
    assert report.markdown(content) == (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("paces", "found", "waits"),
    [([0.9], 0.9, 0), ([0.5, 0.6, 0.95, 0.2], 0.95, 2), ([0.5] * 100, 0.5, compare.PATIENCE_FOR_PACE)],
)
def test_a_case_waits_for_a_machine_that_is_not_slowed_down(paces, found, waits):
    waited: list[float] = []
    assert compare.steady(iter(paces).__next__, waited.append) == found
    assert len(waited) == waits
