"""Which replica of a model gets a request, by Ray Serve's own choice or by the session that it names.

Without a session: Ray's power of two choices, on how many requests each has; docs/scale.md compares it with
others. With one (`X-Session-ID`): always the same replica as long as it is there, which has the job that a
reader comes back to.
"""

from __future__ import annotations

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from service.cluster.policies import ranked


class SessionRouter(PowerOfTwoChoicesRequestRouter):
    """Power of two choices, but for requests of a session."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas by rank: the next one only where the one before takes no more."""
        session = pending_request.metadata.session_id if pending_request is not None else ""
        if not session:
            found: list[list[RunningReplica]] = await super().choose_replicas(
                candidate_replicas, pending_request
            )
            return found
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in ranked(session, list(by_name))]
