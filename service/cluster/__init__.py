"""Models and their replicas behind one address: `serve run service.cluster:app`.

Needs the extra `cluster` (Ray Serve). A front answers (service/cluster/front.py), and each model is a
deployment whose replicas are services (service/cluster/replica.py). These have the settings of their
environment, as `python -m service` has, but for host and port, which are Ray's.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

ARGUMENTS = ("models", "num_replicas", "num_gpus", "fronts")


def build(arguments: Mapping[str, str] | None = None) -> Any:
    """The application, as Ray Serve takes it: also `serve run service.cluster:build num_replicas=4`.

    models: `SOURCE,…` or `name=SOURCE,…`, each as `DDPM_MODEL` has one; absent: that of the environment.
    num_replicas: of each model, a number or `auto`. num_gpus: of each replica. fronts: how many answer.
    Raises ModuleNotFoundError where Ray is not installed, and ValueError for arguments that make no sense.
    """
    from ray import serve

    from service.cluster.front import Front
    from service.cluster.naming import models_of
    from service.cluster.options import front_options, replica_options
    from service.cluster.replica import Replica
    from service.settings import Settings

    given = dict(arguments or {})
    if unknown := sorted(set(given) - set(ARGUMENTS)):
        raise ValueError(f"{', '.join(unknown)}: arguments are {', '.join(ARGUMENTS)}")
    replicas, gpus = given.get("num_replicas", "1"), float(given.get("num_gpus", 0))
    number = replicas if replicas == "auto" else int(replicas)
    settings = Settings()
    shared: dict[str, str] = {}
    if settings.resume_secret is None:
        shared["resume_secret"] = secrets.token_hex(32)
    models = models_of(given["models"]) if "models" in given else {"": ""}
    handles = {}
    for name, source in models.items():
        named = {"model": source, "served_model_name": name} if source else {}
        deployment = serve.deployment(
            name=name or "ddpm",
            num_replicas=number,
            ray_actor_options={"num_gpus": gpus} if gpus else {},
            **replica_options(settings),
        )
        handles[name] = deployment(Replica).bind(**shared, **named)
    front = serve.deployment(
        name="front", num_replicas=int(given.get("fronts", 1)), **front_options(settings)
    )
    return front(Front).bind(handles)


def __getattr__(name: str) -> Any:
    if name == "app":
        return build()
    raise AttributeError(name)
