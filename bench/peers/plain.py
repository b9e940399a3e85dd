"""FastAPI and a pipeline: one request at a time, in the thread pool, the others waiting at a lock.

uvicorn bench.peers.plain:app
"""

from __future__ import annotations

from threading import Lock

from fastapi import FastAPI

from bench.peers.pipeline import Wanted, load

app = FastAPI()
pipeline = load()
lock = Lock()


@app.post("/generate")
def generate(wanted: Wanted) -> dict[str, list[str]]:
    """Compute all images of a request in one batch."""
    with lock:
        return {"images": pipeline(wanted.each())}
