"""A server of one repository that speaks as much of the Hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "someone/tiny-cats"


@dataclass
class Hub:
    """commits: the files of each, by path. branches: the commit of each. requests: the paths asked for."""

    commits: dict[str, Mapping[str, bytes]]
    branches: dict[str, str]
    url: str = ""
    gated: bool = False
    requests: list[str] = field(default_factory=list)

    @property
    def downloaded(self) -> set[str]:
        """The files that were asked for."""
        return {path.split("/", 5)[5] for path in self.requests if "/resolve/" in path}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        self.requests.append(path)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            del parts[:2]
        if "/".join(parts[:2]) != REPOSITORY:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        kind, revision, *rest = parts[2:]
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.commits[commit]
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return as_json({"id": REPOSITORY, "sha": commit, "siblings": siblings})
        if kind == "tree":
            return as_json([entry(name, content) for name, content in files.items()])
        name = "/".join(rest)
        described = entry(name, files[name])
        etag = described["lfs"]["oid"] if "lfs" in described else described["oid"]
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]


def as_json(content: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in a listing. Weights are kept by Git LFS, all else by git."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    described: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith((".safetensors", ".bin")):
        digest = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return described


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as a commit has them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on a port of this machine, which `hub.url` then names. Connections do not outlive it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(urlsplit(self.path).path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
