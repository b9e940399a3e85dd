"""What runs once on a GPU, as far as it can be tried without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest

from bench import wheels
from bench.gpu import __main__ as gpu
from bench.gpu import networks
from bench.gpu.checks import bits
from bench.gpu.networks import compiled, operations, product_limit, rates
from bench.gpu.report import markdown
from bench.gpu.scale import CELEBAHQ_256, REAL, SHIPPED, SIMULATED, Scale
from bench.gpu.sections import SECTIONS
from bench.roofline import CIFAR10_32
from bench.roofline import operations as of_a_model
from model import checkpoint
from model.unet import UNetConfig
from tests.model.conftest import tiny_checkpoint

RECORDED: dict[str, Any] = {
    "simulated": False,
    "sections": {
        "machine": {
            "seconds": 3.2,
            "found": {"card": "NVIDIA H100", "driver": "580, 1980 MHz", "torch": "2.11"},
        },
        "bits": {"seconds": 9.0, "found": {"noise is the host's": True, "float32: recorded is eager": False}},
        "rates, ours": {
            "seconds": 60.0,
            "error": "not done after 60 s",
            "log": "…",
            "found": {
                "operations": 2_000_000_000,
                "tf32/product": 400e12,
                "tf32/recorded/1": 2000.0,
                "tf32/recorded/64": 100_000.0,
                "tf32/eager/64": 50_000.0,
                "float16/error": "OutOfMemoryError: full",
            },
        },
        "engine": {
            "seconds": 20.0,
            "found": {
                "by default/step times": [[1, 0.001], [64, 0.002]],
                "by default/engine/ddpm": 12_345.6,
                "by default/engine/dpmpp_2m": 0.1234,
            },
        },
        "http": {"seconds": 0.0, "error": "no time was left", "found": {}},
    },
}


def test_a_report_has_every_figure_and_what_is_missing() -> None:
    text = markdown(json.loads(json.dumps(RECORDED)))
    assert text.startswith("# NVIDIA H100, driver 580, 1980 MHz, torch 2.11")
    assert "- float32: recorded is eager: **no**" in text
    assert "**Not all of it: not done after 60 s.**" in text
    assert "|precision|way|1|64|" in text
    assert "|tf32|recorded|2,000 (1%)|100,000 (50%)|" in text
    assert "|tf32|eager||50,000 (25%)|" in text
    assert "- matrix products, tf32: 400.0 TFLOP/s" in text
    assert "- float16 ended early: OutOfMemoryError: full" in text
    assert "|by default|1: 1.00 ms, 64: 2.00 ms|" in text
    assert "|by default/engine|12,346|0.123|" in text
    assert "no time was left" in text


def test_a_report_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RECORDED))
    assert gpu.main(["--report", str(path)]) == 0
    assert capsys.readouterr().out.strip() == markdown(RECORDED).strip()


def test_a_section_in_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--simulated", "--only", "machine", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["sections"]["machine"]["found"]["card"] == "none: simulated"
    assert "[" in capsys.readouterr().out
    assert out.with_suffix(".md").read_text() == markdown(results)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("print('nothing works'); raise SystemExit(5)", "it ended with 5"),
    ],
)
def test_what_a_section_found_before_it_ended_is_kept(
    code: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    notes = "import sys, pathlib; pathlib.Path(sys.argv[-2]).write_text('{\"a\": 1}')"
    program.write_text(f"#!{sys.executable}\n{notes}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    record = gpu.section_apart("machine", 1.0, simulated=True)
    assert record["error"] == error
    assert record["found"] == {"a": 1}
    assert record["seconds"] < 10
    assert ("nothing works" in record["log"]) == ("5" in error)


def test_figures_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> Iterator[tuple[str, float]]:
        yield "first", 1.5
        raise ValueError("nothing more")

    monkeypatch.setitem(SECTIONS, "machine", (failing, 1.0))
    with pytest.raises(ValueError, match="nothing more"):
        gpu.run_section("machine", simulated=False, notes=tmp_path / "notes.json")
    assert json.loads((tmp_path / "notes.json").read_text()) == {"first": 1.5}


def test_an_unknown_section_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "limits", lambda: {"machine": 1.0})
    with pytest.raises(SystemExit):
        gpu.main(["--only", "machine; luck"])
    assert "no such section: luck" in capsys.readouterr().err


@pytest.mark.parametrize("over", [["--total-s", "1"], ["--spent-s", "600"]])
def test_nothing_begins_once_the_time_is_over(
    over: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "limits", lambda: {"machine": 40.0})
    out = tmp_path / "gpu.json"
    assert gpu.main([*over, "--out", str(out)]) == 1
    assert json.loads(out.read_text())["sections"]["machine"]["error"] == "no time was left"


def test_the_sections_fit_into_one_call_in_order_of_worth() -> None:
    assert next(iter(SECTIONS)) == "machine"
    assert gpu.TOTAL_S <= 540
    assert all(limit <= 125 for _, limit in SECTIONS.values())


def test_checks_hold_on_the_simulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, "model", lambda *_: tiny_checkpoint(num_class_embeds=11))
    found = dict(bits(SIMULATED))
    assert found["noise is the host's"]
    assert found["float32: recorded is eager"]
    assert found["float32: largest difference from the CPU"] < 1e-4


def test_rates_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, "model", lambda *_: tiny_checkpoint())
    found = dict(rates(replace(SIMULATED, product=64), "cifar10-32"))
    assert set(found) == {"operations", "float32/product", "float32/recorded/1", "float32/eager/1"}
    assert all(value > 0 for value in found.values())


def test_a_rate_that_fails_is_noted_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(precision: str, scale: Any) -> float:
        if precision == "tf32":
            raise RuntimeError("no such unit")
        return product_limit("float32", scale)

    monkeypatch.setattr(networks, "product_limit", limit)
    monkeypatch.setattr(Scale, "model", lambda *_: tiny_checkpoint())
    scale = replace(SIMULATED, product=64, precisions=("tf32", "float32"))
    found = {}
    for name, value in rates(scale, "cifar10-32"):
        found[name] = value
        if name == "float32/eager/1":
            break
    assert found["tf32/error"] == "RuntimeError: no such unit"
    assert "float32/recorded/1" in found


def test_a_compiled_network_has_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, "model", lambda *_: tiny_checkpoint())
    found = dict(compiled(replace(SIMULATED, rows={"ours": (1, 2, 64)})))
    figures = ("seconds to compile", "compiled/2", "compiled and recorded/2")
    assert list(found) == [f"ours/float32/{figure}" for figure in figures]
    assert all(value > 0 for value in found.values())


def test_every_network_is_compiled_in_every_precision_in_order_of_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one(_: Scale, name: str, precision: str) -> Iterator[tuple[str, float]]:
        yield f"{name}/{precision}", 1.0
        if precision == "tf32":
            raise RuntimeError("no such unit")

    monkeypatch.setattr(networks, "_compiled", one)
    found = dict(compiled(replace(REAL, device="cpu")))
    assert [name for name, value in found.items() if value == 1.0] == [
        f"{network}/{precision}"
        for precision in ("bfloat16", "float16", "tf32", "float32")
        for network in ("ours", "cifar10-32", "celebahq-256")
    ]
    assert found["celebahq-256/tf32/error"] == "RuntimeError: no such unit"
    found = dict(compiled(replace(SIMULATED, compile_s=0.0)))
    assert found == {"no time was left for": [f"{name}/float32" for name in SIMULATED.rows]}


def test_operations_are_counted_without_computing_any() -> None:
    tiny = tiny_checkpoint()
    attention = 4 * (2 * 2 * 16 * 16 * 16)  # four layers of it, which a CPU's own kernel hides from the count
    assert operations(cast("UNetConfig", tiny.unet.config)) - of_a_model(tiny) in (0, attention)
    assert 11e9 < operations(CIFAR10_32) < 14e9
    assert 450e9 < operations(CELEBAHQ_256) < 550e9


def test_the_published_shapes_have_the_published_sizes() -> None:
    import torch

    from model.unet import UNet

    with torch.device("meta"):
        sizes = [sum(p.numel() for p in UNet(config).parameters()) for config in (CIFAR10_32, CELEBAHQ_256)]
    assert sizes == [35_746_307, 113_673_219]


def test_the_simulation_does_a_little_of_everything() -> None:
    assert SIMULATED.configs().keys() == REAL.configs().keys() == REAL.rows.keys() - {"ours"}
    assert checkpoint.load(SHIPPED).unet.config == REAL.model("ours").unet.config


# ── Wheels ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_taken_along_does_without_torch() -> None:
    found = wheels.closure(wheels.roots())
    assert {"fastapi", "pydantic-core", "diffusers", "pytest", "httpx", "uvloop", "h11"} <= found.keys()
    assert not found.keys() & {"torch", "numpy", "openvino", "triton", "sympy"}
    assert not any(name.startswith("nvidia") for name in found)


def test_a_wheel_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(folder: Path, python: str, packages: list[str]) -> bool:
        assert python == "3.15"
        return not any(each.startswith("uvloop==") for each in packages)

    monkeypatch.setattr(wheels, "fetch", fetch)
    assert wheels.main([str(tmp_path / "wheels"), "--python", "3.15"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("no wheel")] == [
        f"no wheel: uvloop=={version('uvloop')} (3.15)"
    ]
    assert "fastapi>=" in (tmp_path / "wheels" / "roots.txt").read_text()
