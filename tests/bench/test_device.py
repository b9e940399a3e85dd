"""The table of a simulated device, small."""

from __future__ import annotations

import pytest

from bench import device


def test_every_layer_has_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main(["--rows", "2", "--step-ms", "20", "--size", "8", "--seconds", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|`") or "clients" in line]
    assert len(rows) == 5
    shares = [float(cell.rstrip("%")) for _, *cells in rows for cell in cells]
    assert all(0 < share <= 110 for share in shares)
