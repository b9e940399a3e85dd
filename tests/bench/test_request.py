"""The engine that answers at once, served and measured."""

from __future__ import annotations

import pytest

from bench import request


def test_every_kind_of_answer_has_a_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "ROUNDS", 1)
    monkeypatch.setattr(request, "LOOPS", ("asyncio",))
    request.main(["--size", "8", "--channels", "1", "--seconds", "0.3"])
    *_, row = capsys.readouterr().out.splitlines()
    name, *numbers = row.strip("|").split("|")
    assert name.startswith("asyncio, ")
    assert len(numbers) == 2 * len(request.KINDS)
    assert all(float(number) > 0 for number in numbers)


def test_so_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    request.main(["--size", "8", "--parts", "--seconds", "0.01"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) > 8
    assert all(float(row.strip("|").split("|")[1]) > 0 for row in rows)
