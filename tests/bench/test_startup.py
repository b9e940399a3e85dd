from __future__ import annotations

import pytest

from bench import startup

pytestmark = pytest.mark.slow


def test_the_whole_and_its_parts(tiny_folder, capsys):
    pytest.importorskip("openvino")
    startup.main(["--model", str(tiny_folder), "--rounds", "1"])
    printed = capsys.readouterr().out
    assert float(printed.split()[3]) > 0.5
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    assert (rows[0][0], rows[-1][0]) == ("import torch", "meanwhile: import the API")
    assert all(float(seconds) >= 0 for _, seconds in rows)
    assert sum(float(seconds) for _, seconds in rows) > 0.5


def test_a_service_that_ends_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3"):
        startup.start_to_ready(tmp_path)
