"""Ray Serve with `@serve.batch`, one replica.

python -m bench.peers.ray_ PORT
"""

# No `from __future__ import annotations`: Ray Serve looks at the annotations of __call__.

import os
import sys

import ray
from ray import serve
from starlette.requests import Request

from bench.peers.pipeline import MAX_BATCH, Wanted, in_groups, load

CORES = len(os.sched_getaffinity(0))


# More requests than a batch in the replica, so that the next batch is there when one ends.
@serve.deployment(num_replicas=1, max_ongoing_requests=4 * MAX_BATCH, ray_actor_options={"num_cpus": CORES})
class Diffusion:
    """A batch of requests in, a batch of answers out."""

    def __init__(self) -> None:
        self.pipeline = load()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)
    async def compute(self, batch: list[Wanted]) -> list[list[str]]:
        """Compute a batch; requests differ in steps and guidance."""
        return in_groups(self.pipeline, batch)

    async def __call__(self, request: Request) -> dict[str, list[str]]:
        """Answer one request."""
        return {"images": await self.compute(Wanted(**await request.json()))}


if __name__ == "__main__":
    ray.init(num_cpus=CORES, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    application = Diffusion.bind()  # type: ignore[attr-defined]  # the decorator made a deployment of it
    serve.run(application, blocking=True)
