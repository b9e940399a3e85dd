"""What noise costs, by this code and by other code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import noise

QUICK = ["--rounds", "1", "--seconds", "0.01"]


def cells(printed: str) -> list[list[str]]:
    return [line.strip("|").split("|") for line in printed.splitlines()]


def test_every_way_has_its_time_beside_that_of_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "noise.py").write_text(  # 0.2 s for each call
        "from time import process_time\n"
        "def normals(seeds, steps, shape):\n"
        "    end = process_time() + 0.2\n"
        "    while process_time() < end:\n"
        "        pass\n"
    )
    monkeypatch.setattr(noise, "STEPS", ((1, (10, 10, 10)),))
    assert noise.main([*QUICK, "--before", str(tmp_path)]) == 0
    head, _, row = cells(capsys.readouterr().out)
    assert head == ["ns a number", noise.OURS, noise.TENSORS, noise.NUMPY, noise.BEFORE]
    assert row[0] == "1 of 10×10×10"
    ours, tensors, numpys, before = map(float, row[1:])
    assert all(0 < each < before for each in (ours, tensors, numpys))
    assert before == pytest.approx(0.2e9 / 1000, rel=0.3)


def test_a_checkout_without_noise_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        noise.seconds_a_step(noise.BEFORE, tmp_path, 1, (1, 8, 8), 0.01)
