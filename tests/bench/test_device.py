"""The table of a simulated device, small."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from bench import device
from bench.servers import ROOT

SMALL = ["--rows", "2", "--step-ms", "20", "--size", "8", "--seconds", "0.3"]


def shares(printed: str) -> list[list[float]]:
    rows = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")][2:]
    return [[float(cell.rstrip("%")) for cell in cells] for _, *cells in rows]


def test_every_layer_has_a_share() -> None:
    """In a process of its own, which is tuned, and in which torch's compiler stays loaded."""
    command = [sys.executable, "-m", "bench.device", *SMALL]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    printed = ran.stdout
    found = shares(printed)
    assert [len(row) for row in found] == [2] * 5
    assert all(0 < share <= 115 for row in found for share in row)
    used = [line for line in printed.splitlines() if line.startswith("of a core, ")]
    assert len(used) == 2
    for line in used:
        kept = r"API \d+%, engine \d+%, clients \d+%, /livez at most \d+ ms, \d+ \+ \d+ MiB"
        assert len(re.findall(kept, line)) == 2


def test_a_layer_alone_on_two_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main([*SMALL, "--only", "json", "--sampler", "ddpm", "--devices", "2"]) == 0
    printed = capsys.readouterr().out
    ((share,),) = shares(printed)
    assert 50 < share <= 115
    assert "each of 2 devices' 100 rows/s" in printed
    assert re.search(r"engine \d+% \+ \d+%", printed)


def test_nothing_is_measured_before_the_service_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Readyz(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) == 3 else 503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its base's name)
            pass

    with HTTPServer(("127.0.0.1", 0), Readyz) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            device.await_ready(url)
            assert asked == ["/readyz"] * 3
            monkeypatch.setattr(device, "READY_S", 0.2)
            with pytest.raises(RuntimeError, match="did not become ready"):
                device.await_ready(url)
        finally:
            server.shutdown()
            thread.join()


def test_an_unknown_layer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        device.main([*SMALL, "--only", "json,everything"])
    assert "no such layer: everything" in capsys.readouterr().err


def test_the_api_does_without_torch() -> None:
    code = "import sys, bench.device; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
