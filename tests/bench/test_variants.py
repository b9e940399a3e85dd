from __future__ import annotations

import pytest
import torch

from bench import variants
from bench.roofline import inputs
from bench.variants import VARIANTS, calibration
from model import checkpoint
from model.runtimes import OpenVinoRuntime, TorchRuntime

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
pytest.importorskip("openvino")


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("int8")])
def test_every_variant_is_the_same_network(name, tiny_folder):
    model = checkpoint.load(tiny_folder)
    x, _, _ = inputs(model, 5)
    t, y = torch.tensor([0, 1, 500, 998, 999]), torch.tensor([0, 10, 3, 3, 9])
    out = VARIANTS[name](model, "float32").forward(x, t, y)
    torch.testing.assert_close(out, TorchRuntime(model).forward(x, t, y), rtol=1e-3, atol=1e-4)


def test_calibration_is_what_the_network_sees(tiny_folder, monkeypatch):
    monkeypatch.setattr(variants, "CALIBRATION", 100)
    rows = calibration(checkpoint.load(tiny_folder))
    assert {len(row) for row in rows} == {3}
    assert {tuple(row[0].shape[:1]) for row in rows} == {(1,)}
    assert len(rows) == 100
    assert len({int(t) for _, t, _ in rows}) > 25
    assert {int(y) for _, _, y in rows} == set(range(11))


def test_the_table(tiny_folder, capsys):
    assert VARIANTS["shipped"] is OpenVinoRuntime
    wanted = ["--variant", "table of projections", "--rounds", "2", "--seconds", "0", "--rows", "2"]
    variants.main(["--model", str(tiny_folder), "--dtype", "float32", *wanted])
    lines = capsys.readouterr().out.splitlines()[-2:]
    shipped, table = (line.split("|")[1:-1] for line in lines)
    assert (shipped[0], shipped[2]) == ("shipped", "100.0%")
    assert table[0] == "table of projections"
    assert float(table[1]) > 0
    assert float(table[4].rstrip("%")) < 0.1
