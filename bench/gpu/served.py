"""The service on the device that `bench.gpu` checks and measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bench.gpu.scale import SHIPPED, Scale


@contextmanager
def served(scale: Scale, **settings: object) -> Iterator[tuple[str, int]]:
    """The service on the device: its address, and its process."""
    from bench.servers import SERVICE, Model, running  # httpx, and the service's settings

    environment = Model(SHIPPED, "torch").environment("ours") | {"DDPM_DEVICE": scale.device}
    environment |= {"DDPM_STREAM_GRACE_S": "0", "DDPM_MAX_QUEUE": "512"}
    if scale.simulated:
        settings = {"max_batch": 2, **settings}
    environment |= {f"DDPM_{name.upper()}": str(value) for name, value in settings.items()}
    with running(SERVICE, environment, scale.start_s) as server:
        yield server.endpoint.url.removesuffix("/generate"), server.popen.pid
