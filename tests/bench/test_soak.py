import pytest

from bench import soak

pytestmark = pytest.mark.slow


def test_memory_is_measured_on_the_way(capsys):
    soak.main(["--requests", "40"])
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if line[1:2].isdigit()]
    assert sorted(int(row[1]) for row in rows) == list(range(2, 41, 2))
    assert all(float(row[2]) > 50 and float(row[5]) > 50 for row in rows)  # the API's and the engine's
    assert all(int(cell) > 0 for row in rows for cell in (*row[3:5], *row[6:8]))
    assert "bytes a request in the API" in printed
