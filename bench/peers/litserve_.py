"""LitServe with its batching of requests.

python -m bench.peers.litserve_ PORT
"""

# No `from __future__ import annotations`: LitServe looks at the annotations of decode_request.

import sys
from typing import Any

import litserve

from bench.peers.pipeline import MAX_BATCH, Wanted, in_groups, load


class Diffusion(litserve.LitAPI):
    """A batch of requests in, a batch of answers out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe passes it
        """Load the model, once per worker."""
        self.pipeline = load()

    def decode_request(self, request: dict[str, Any]) -> Wanted:
        """Read one request."""
        return Wanted(**request)

    def predict(self, batch: list[Wanted]) -> list[list[str]]:
        """Compute a batch; requests differ in steps and guidance."""
        return in_groups(self.pipeline, batch)

    def encode_response(self, output: list[str]) -> dict[str, list[str]]:
        """Answer one request."""
        return {"images": output}


if __name__ == "__main__":
    api = Diffusion(max_batch_size=MAX_BATCH, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
