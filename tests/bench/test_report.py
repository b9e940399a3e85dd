from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from bench import report
from bench.load import Answer, summarise
from bench.workload import Request


def case(server, workload="mix", load=0.7, *, preview=None, timeouts=0, latency_s=2.0):
    request = Request(1.0, 50)
    answers = [
        Answer(request, "done", 200, latency_s=latency_s, first_byte_s=0.25, first_preview_s=preview)
    ] * 4
    if preview:
        answers = [Answer(request, "done", 200, "", 0.0, 2.0, 0.25, preview, 0.5, 1.0)] * 4
    answers += [Answer(request, "timeout", 0, latency_s=60.0)] * timeouts
    usage = {"seconds": 10.0, "cpu_s": 15.0, "mean_bytes": 1e8, "peak_bytes": 2e8}
    figures = {"offered": 91.4, "ready_s": 3.0, "pace": 0.98, **asdict(summarise(answers)), "usage": usage}
    return {"server": server, "workload": workload, "load": load, **figures}


@pytest.fixture
def content():
    return {
        "terms": {"seconds": 120.0, "patience_s": 60.0, "burst_s": 20.0},
        "machine": {
            "cpu": "Some CPU (avx2)",
            "cores": 2,
            "memory_gib": 23.5,
            "system": "Linux 6",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "ray": "2.60.0"},
        },
        "capacity": {"batch_size": 4, "rows_per_s": 200.0, "runtime": "openvino", "dtype": "float32"},
        "cases": [
            case("plain/ours", timeouts=1),
            case("service", preview=0.125),
            case("service", load=1.5, latency_s=9.0),
            case("service", "uniform"),
            case("service", "uniform", None),
            {"server": "ray/ours", "workload": "mix", "load": 0.7, "error": "no answer came\nlog"},
        ],
    }


def cells(text, title):
    """The lines of a table, by their first cell."""
    lines = text.partition(f"#### {title}\n")[2].strip().split("\n\n")[0].splitlines()
    return {line.split("|")[1]: line.split("|")[1:-1] for line in lines}


def test_a_table_for_each_workload_and_load(content):
    text = report.markdown(content)
    titles = [line for line in text.splitlines() if line.startswith("#### ")]
    assert titles[1:3] == ["#### uniform, load 0.7", "#### uniform, all at once"]
    assert titles[3:] == ["#### mix, load 0.7", "#### mix, load 1.5"]
    here = cells(text, "mix, load 0.7")
    assert list(here)[2:] == ["service", "plain/ours", "ray/ours"]  # in the order of the servers
    header, service = here["server"], here["service"]
    assert len({len(line) for line in here.values() if line is not here["-"]}) == 1
    named = dict(zip(header, service, strict=True))
    assert named["requests"] == "4"
    assert named["offered rows/s"] == "91"
    assert (named["p50"], named["p99"]) == ("2.00", "2.00")
    assert named["first preview p50 / p95"] == "0.12 / 0.12"
    assert named["ETA error"] == "33 % / 33 %"  # estimated 1 s at 0.5 s, took until 2 s
    assert (named["CPU"], named["memory (MB)"]) == ("1.5", "200")


def test_what_timed_out_makes_lower_bounds(content):
    here = cells(report.markdown(content), "mix, load 0.7")
    named = dict(zip(here["server"], here["plain/ours"], strict=True))
    assert named["p95"].startswith("≥ ")
    assert named["timed out"] == "1"
    assert (named["first preview p50 / p95"], named["ETA error"]) == ("–", "–")


def test_a_server_that_did_not_start_is_reported(content):
    here = cells(report.markdown(content), "mix, load 0.7")
    assert here["ray/ours"][1] == "did not start: no answer came"


def test_the_machine_is_described(content):
    text = report.markdown(content)
    assert "Some CPU (avx2), 2 cores, 23.5 GiB, Linux 6, Python 3.11.7; torch 2.13.0, ray 2.60.0." in text
    assert "200 rows of network calls a second" in text


def test_throughput_in_a_burst(content):
    here = cells(report.markdown(content), "Rows per second, all requests at once (share of capacity)")
    assert here["service"] == ["service", "67 (33 %)", "–"]  # 200 rows in 3 s
    assert here["plain/ours"][1] == "–"


def test_errors_of_servers_are_listed(content):
    content["cases"][1]["errors"] = ["500: out of\nmemory"]
    assert "- service, mix, load 0.7: `500: out of memory`" in report.markdown(content)


def test_the_same_results_give_the_same_files(content, tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    report.main([str(tmp_path)])
    first = (tmp_path / "comparison.md").read_text(), (tmp_path / "comparison.svg").read_bytes()
    assert first[1].startswith(b"<?xml")
    report.main([str(tmp_path)])
    assert ((tmp_path / "comparison.md").read_text(), (tmp_path / "comparison.svg").read_bytes()) == first


def test_a_line_for_the_terminal(content):
    assert report.line(content["cases"][0]).startswith("4 of 5, ")
    assert report.line(content["cases"][0]).endswith(", 1 timeouts")
    assert "p95 2.00 s" in report.line(content["cases"][1])
    assert report.line(content["cases"][-1]) == "no answer came\nlog"
