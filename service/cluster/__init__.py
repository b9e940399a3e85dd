"""The service as replicas of one deployment, behind one address: `serve run service.cluster:app`.

Needs the extra `cluster` (Ray Serve). A replica has the settings of its environment, as `python -m service`
has, but for host and port, which are Ray's.
"""

from __future__ import annotations

from typing import Any


def build(arguments: dict[str, str] | None = None) -> Any:
    """The application, as Ray Serve takes it: also `serve run service.cluster:build num_replicas=4`.

    arguments: `num_replicas`, a number or `auto`. Raises ModuleNotFoundError where Ray is not installed.
    """
    from ray import serve

    from service.cluster.options import replica_options
    from service.cluster.replica import Replica
    from service.settings import Settings

    replicas = (arguments or {}).get("num_replicas", "1")
    number = replicas if replicas == "auto" else int(replicas)
    return serve.deployment(name="ddpm", num_replicas=number, **replica_options(Settings()))(Replica).bind()


def __getattr__(name: str) -> Any:
    if name == "app":
        return build()
    raise AttributeError(name)
