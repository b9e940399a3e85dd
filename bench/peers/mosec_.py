"""Mosec with its dynamic batching.

python -m bench.peers.mosec_ --address 127.0.0.1 --port PORT --timeout 600000
"""

from __future__ import annotations

from typing import Any

import mosec

from bench.peers.pipeline import MAX_BATCH, Wanted, in_groups, load


class Diffusion(mosec.Worker):
    """A batch of requests in, a batch of answers out."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline = load()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, list[str]]]:
        """Compute a batch; requests differ in steps and guidance."""
        answers = in_groups(self.pipeline, [Wanted(**each) for each in data])
        return [{"images": images} for images in answers]


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(Diffusion, num=1, max_batch_size=MAX_BATCH, max_wait_time=10, timeout=600)
    server.run()
