"""Before anything is loaded: what would keep the service from starting, its address, and signals meanwhile.

Imports nothing but the standard library, so that signals are handled from the first moment on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from errno import EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT
from importlib.util import find_spec
from pathlib import Path
from socket import (
    AF_INET6,
    AI_PASSIVE,
    IPPROTO_IPV6,
    IPV6_V6ONLY,
    SO_REUSEADDR,
    SOCK_STREAM,
    SOL_SOCKET,
    gaierror,
    getaddrinfo,
    socket,
)
from types import FrameType

BAD_SETTING, UNUSABLE, NO_ADDRESS = 2, 3, 4
"""Exit codes: a malformed setting; a model, device or runtime that cannot be used; an address that cannot."""
HUB = "hf:"
"""What the name of a model of the Hub begins with."""


class StartError(Exception):
    """The service cannot start. The message is one line; `code` is the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def hangup_is_ignored() -> bool:
    """Whether SIGHUP was ignored when this process started, as under nohup."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def leave_on_signals(before: Callable[[], None]) -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the process at once, with exit code 0, wherever it is.

    before: called first. An exception instead could be lost in whatever the signal interrupts.
    """

    def leave(_sig: int, _frame: FrameType | None) -> None:
        before()
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is not signal.SIGHUP or not hangup_is_ignored():
            signal.signal(number, leave)


def check_model(model: str, runtime: str) -> None:
    """Look for what an engine would miss only seconds later. Raises StartError.

    model, runtime: as in the settings. What is in a folder, the engine finds out.
    """
    for package in ("torch", *(["openvino"] if runtime == "openvino" else [])):
        if find_spec(package) is None:
            raise StartError(UNUSABLE, f"{package} is not installed: pip install {package}")
    if not model.startswith(HUB):
        try:
            Path(model).stat()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = "no such folder" if missing else f"cannot be read ({error.strerror})"
            raise StartError(UNUSABLE, f"{model}: {problem}") from error


def bind(host: str, port: int) -> list[socket]:
    """Sockets for every address of a host, all at one port; 0 is a free one. Nobody can connect to them yet.

    Raises StartError where that cannot be had.
    """
    where = f"cannot listen on {host}, port {port}"
    with ExitStack() as opened:
        try:
            found = getaddrinfo(host or None, port, type=SOCK_STREAM, flags=AI_PASSIVE)
        except (gaierror, UnicodeError) as error:
            reason = error.strerror if isinstance(error, gaierror) else "not a host name"
            raise StartError(NO_ADDRESS, f"{where}: {reason}") from error
        sockets: list[socket] = []
        absent: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            opening: socket | None = None
            try:
                opening = opened.enter_context(socket(family, kind, protocol))
                opening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
                if family == AF_INET6:
                    opening.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 1)
                at = port or (sockets[0].getsockname()[1] if sockets else 0)
                opening.bind((address[0], at, *address[2:]))
            except OSError as error:
                if error.errno not in (EADDRNOTAVAIL, EAFNOSUPPORT):
                    raise StartError(NO_ADDRESS, f"{where}: {os.strerror(error.errno or 0)}") from error
                if opening is not None:
                    opening.close()
                absent = error  # as `localhost` may have an IPv6 address on a machine without IPv6
            else:
                sockets.append(opening)
        if not sockets:
            reason = os.strerror((absent and absent.errno) or EADDRNOTAVAIL)
            raise StartError(NO_ADDRESS, f"{where}: {reason}") from absent
        opened.pop_all()
    return sockets


def listen(sockets: list[socket], backlog: int) -> None:
    """Let clients connect. Raises StartError where another process has begun to listen there since `bind`."""
    for each in sockets:
        try:
            each.listen(backlog)
        except OSError as error:
            host, port = each.getsockname()[:2]
            reason = os.strerror(error.errno or EADDRINUSE)
            raise StartError(NO_ADDRESS, f"cannot listen on {host}, port {port}: {reason}") from error
