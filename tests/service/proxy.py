"""Between a client and the service: a line that can be cut, and a proxy with a path of its own."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


class Line:
    """Forwards TCP connections to an address until they are cut. New ones are always accepted."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self.address)
                self._ends += [here, there]
                for pair in ((here, there), (there, here)):
                    self._threads.append(threading.Thread(target=_copy, args=pair, daemon=True))
                    self._threads[-1].start()

    def cut(self) -> None:
        """End all connections."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for end in self._ends:
            end.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class Proxy:
    """An HTTP proxy that serves an upstream below a prefix, which it strips or not."""

    def __init__(self, upstream: str, prefix: str, *, strip: bool, headers: dict[str, str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path != prefix and not self.path.startswith(f"{prefix}/"):
                    self.send_error(404, "This is not below the prefix")
                    return
                path = self.path.removeprefix(prefix) if strip else self.path
                kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                with (
                    httpx.Client(base_url=upstream, timeout=60, verify=False) as client,
                    client.stream(
                        self.command, path or "/", headers={**kept, **headers}, content=body
                    ) as answer,
                ):
                    self.send_response(answer.status_code)
                    for name, value in answer.headers.items():
                        if name not in ("transfer-encoding", "connection"):
                            self.send_header(name, value)
                    self.end_headers()
                    for chunk in answer.iter_raw():
                        self.wfile.write(chunk)
                        self.wfile.flush()

            do_POST = do_GET  # noqa: N815 (the base's name)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()
