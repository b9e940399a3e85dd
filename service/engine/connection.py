"""An engine's process and the socket to it, as the API's end holds them."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from signal import SIGKILL, Signals
from socket import MSG_PEEK, SO_RCVBUF, SO_SNDBUF, SOL_SOCKET, socket, socketpair
from typing import Protocol

from service.engine.messages import Command, EngineConfig, Report
from service.engine.wire import read_report, to_bytes

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "service.engine.process")
BUFFER = 4 << 20


class Connection(Protocol):
    """An engine that has been started."""

    async def receive(self) -> Report | None:
        """The next report; None once it has ended."""

    def send(self, command: Command) -> None:
        """Hand over a command; does not wait."""

    def kill(self) -> None:
        """End it now."""

    async def wait(self) -> int:
        """Its exit code, once it has ended."""


def environment() -> dict[str, str]:
    """The variables of an engine's process.

    It imports from where this process does, not from the folder that it happens to be started in. It does
    not leave out docstrings, which OpenVINO reads, or assertions.
    """
    path = os.pathsep.join(each for each in sys.path if each)
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
    return {**ours, "PYTHONPATH": path}


class ProcessConnection:
    """An engine in a process of its own, started by making this. command: is given a file descriptor."""

    def __init__(self, config: EngineConfig, command: Sequence[str] = COMMAND) -> None:
        ours, theirs = socketpair()
        for end in (ours, theirs):
            end.setsockopt(SOL_SOCKET, SO_SNDBUF, BUFFER)
            end.setsockopt(SOL_SOCKET, SO_RCVBUF, BUFFER)
        with theirs, ExitStack() as stack:
            stack.callback(ours.close)
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment(),
            )
            stack.pop_all()
        with suppress(ConnectionError):  # it has ended already, which is found where it is waited for
            ours.sendall(to_bytes(config))
        self._socket: socket = ours
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._unsent: list[bytes] = []

    def wait_until_loaded(self) -> int | None:
        """Wait until the engine has its model. Returns an exit code if it ends without: its own, or 1."""
        with suppress(ConnectionResetError):  # it ended before it had read its config
            if self._socket.recv(1, MSG_PEEK):
                return None
        code = self._process.wait()
        if code < 0:  # nobody else says so
            cause = "often too little memory" if -code == SIGKILL else "a fault in a library, or somebody's"
            logger.error("the engine was ended by %s while it loaded: %s", Signals(-code).name, cause)
        return max(1, code)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def receive(self) -> Report | None:
        """The next report; None once the process has ended."""
        if self._ends is None:
            self._ends = await asyncio.open_unix_connection(sock=self._socket, limit=BUFFER)
        return await read_report(self._ends[0])

    def send(self, command: Command) -> None:
        """Hand over a command; an engine that has died does not get it.

        What is sent in one turn of the event loop goes together: the engine is woken once.
        """
        assert self._ends is not None, "nothing is sent before the first report"
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(to_bytes(command))

    def _flush(self) -> None:
        if self._ends is not None:
            self._ends[1].write(b"".join(self._unsent))
        self._unsent.clear()

    def kill(self) -> None:
        """End the process."""
        self._process.kill()

    async def wait(self) -> int:
        """The exit code, once the process has ended. Closes the connection, which ends it too."""
        if self._ends is not None:
            self._ends[1].close()
        else:
            self._socket.close()
        return await asyncio.to_thread(self._process.wait)
