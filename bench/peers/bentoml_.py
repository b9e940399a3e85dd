"""BentoML with its adaptive batching.

bentoml serve bench.peers.bentoml_:Diffusion
"""

from __future__ import annotations

from typing import Any

import bentoml

from bench.peers.pipeline import MAX_BATCH, Wanted, in_groups, load


@bentoml.service(workers=1, traffic={"timeout": 600})
class Diffusion:
    """A batch of requests in, a batch of answers out."""

    def __init__(self) -> None:
        self.pipeline = load()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=600_000)
    def generate(self, requests: list[dict[str, Any]]) -> list[dict[str, list[str]]]:
        """Compute a batch; requests differ in steps and guidance."""
        answers = in_groups(self.pipeline, [Wanted(**each) for each in requests])
        return [{"images": images} for images in answers]
