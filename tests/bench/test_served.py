"""One model served and kept busy: the row is what the service counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import http, served


@pytest.mark.slow
def test_a_model_is_served_by_its_own_defaults(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WARM_UP_S", 0.1)
    served.main([str(tiny_folder), "--seconds", "0.5", "--rounds", "2"])
    _, _, row = capsys.readouterr().out.splitlines()
    folder, defaults, images, spread, times = row.strip("|").split("|")
    low, high = map(float, spread.split(" … "))
    assert folder == str(tiny_folder)
    assert defaults == "dpmpp_2m, 20 steps, guidance 2"
    assert 0 < low <= float(images) <= high
    assert times == "1.00 ×"
