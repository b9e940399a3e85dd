"""What Ray Serve is told of a replica."""

from __future__ import annotations

import warnings

from service.cluster.options import replica_options
from service.settings import Settings


def test_there_is_room_for_whoever_has_a_slot_and_time_for_whoever_has_a_deadline() -> None:
    settings = Settings(_env_file=None, max_queue=500, deadline_s=120.0)
    options = replica_options(settings)
    assert options["max_ongoing_requests"] >= 2 * 500
    assert options["graceful_shutdown_timeout_s"] > 120.0
    assert options["max_queued_requests"] == 500


def test_ray_takes_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own use of pydantic
        from ray.serve.schema import DeploymentSchema
    options = replica_options(Settings(_env_file=None))
    schema = DeploymentSchema(name="ddpm", **options)
    assert {name: getattr(schema, name) for name in options} == options
