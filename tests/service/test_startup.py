"""What keeps the service from starting is said in one line, soon and by an exit code; signals end a start."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from service import startup
from service.startup import BAD_SETTING, NO_ADDRESS, UNUSABLE, StartError, bind, check_model, listen
from tests.service.fakes import until
from tests.service.live import ROOT, Process

Launch = Callable[..., Process]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def engines_of(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.popen.pid).children()


# ── Addresses ──────────────────────────────────────────────────────────────────────────────────


def test_a_port_that_is_taken_gives_one_line_and_code_4(launch: Launch, taken: int) -> None:
    process = launch("--port", str(taken))
    assert process.wait() == NO_ADDRESS
    assert process.lines == [f"cannot listen on 127.0.0.1, port {taken}: Address already in use"]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "Cannot assign requested address"),  # an address of documents, nobody's
        ("a..b", "not a host name"),
        ("no-such-host.invalid", ".+"),
    ],
)
def test_an_address_that_is_not_ours_is_refused(host: str, reason: str) -> None:
    with pytest.raises(StartError, match=f"^cannot listen on {re.escape(host)}, port 0: {reason}$") as found:
        bind(host, 0)
    assert found.value.code == NO_ADDRESS


def test_a_name_with_several_addresses_gets_one_port_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        startup,
        "getaddrinfo",
        lambda *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))
            for host in (
                "127.0.0.1",
                "127.0.0.2",
                "127.0.0.1",
                "192.0.2.1",
            )  # the last is not there: left out
        ],
    )
    sockets = bind("localhost", 0)
    names = [each.getsockname() for each in sockets]
    for each in sockets:
        each.close()
    assert names == [("127.0.0.1", names[0][1]), ("127.0.0.2", names[0][1])]


def test_nobody_can_connect_before_there_is_a_server_and_another_one_may_be_first() -> None:
    ours, theirs = bind("127.0.0.1", 0), socket.socket()
    port = ours[0].getsockname()[1]
    with closing(ours[0]), closing(theirs):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        theirs.bind(("127.0.0.1", port))
        theirs.listen()
        with pytest.raises(StartError, match="Address already in use") as found:
            listen(ours, 1)
    assert found.value.code == NO_ADDRESS


# ── Models and runtimes ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("package", ["torch", "openvino"])
def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(startup, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(StartError, match=f"^{package} is not installed") as found:
        check_model(str(ROOT), "openvino")
    assert found.value.code == UNUSABLE


def test_a_runtime_that_nobody_asks_for_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "find_spec", lambda name: None if name == "openvino" else name)
    check_model(str(ROOT), "auto")
    check_model("hf:owner/name", "torch")


def test_a_folder_that_is_not_there_is_found_before_an_engine_is_started(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r": no such folder$"):
        check_model(str(tmp_path / "nowhere"), "auto")
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r": cannot be read \(Not a directory\)$"):
        check_model(str(tmp_path / "file" / "model"), "auto")


def test_an_interpreter_that_leaves_out_docstrings_serves(launch: Launch, tiny_folder: Path) -> None:
    """OpenVINO reads its own."""
    flags = "--model", str(tiny_folder), "--runtime", "openvino", "--max-batch", "1"
    with closing(launch(*flags, PYTHONOPTIMIZE="2").connect()) as client:
        assert client.get("/info").json()["runtime"]["name"] == "openvino"


# ── Signals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_loads_ends_it_at_once(
    launch: Launch, tiny_folder: Path, number: signal.Signals
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    process = launch("--model", str(tiny_folder))
    signal.signal(signal.SIGHUP, before)
    until(lambda: bool(engines_of(process)), "the engine")
    (engine,) = engines_of(process)
    process.popen.send_signal(number)
    assert process.wait() == 0
    assert process.lines == []
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine's end")


def test_an_engine_that_is_killed_while_it_loads_is_said_to_be(launch: Launch, tiny_folder: Path) -> None:
    process = launch("--model", str(tiny_folder))
    until(lambda: bool(engines_of(process)), "the engine")
    engines_of(process)[0].kill()
    assert process.wait() == 1
    (line,) = process.lines
    assert "the engine was ended by SIGKILL while it loaded: often too little memory" in line


def test_every_exit_code_is_documented() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    (table,) = re.findall(r"^\| Exit code \|.*\n\|[-|]+\n((?:\|.*\n)+)", document, re.MULTILINE)
    codes = [int(row.split("|")[1]) for row in table.splitlines()]
    assert codes == [0, 1, BAD_SETTING, UNUSABLE, NO_ADDRESS]
