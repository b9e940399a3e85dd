"""The service over two engines that can be made to fail: `python -m bench.chaos.api PORT MODEL FOLDER`.

The switch `no-replay` is the control: with it a job whose engine dies fails, and the run must notice.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from msgspec.structs import replace

from bench.chaos import faults
from service.app import create_app
from service.engine import worker
from service.engine.client import EngineClient
from service.engine.connection import ProcessConnection
from service.engine.messages import Failed
from service.errors import EngineKilledError
from service.server import serve
from service.settings import Settings
from service.startup import bind
from service.telemetry import configure_logging

STALL_S, GRACE_S = 3.0, 1.0
TASKS = "/chaos/tasks"
"""Says how many tasks the event loop has."""


def main() -> int:
    """Serve until told to stop. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.chaos.api", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="where the switches are")
    args = parser.parse_args()
    faults.follow_clock(args.folder)
    configure_logging("text")
    # Engines die here far more often than where the service would rightly give up.
    worker.WINDOW_S = 0.0
    _replay_unless(args.folder / faults.NO_REPLAY)
    settings = Settings(
        _env_file=None,
        port=args.port,
        model=str(args.model),
        device="cuda:0,cuda:1",  # which only count: both are this processor
        max_batch=8,
        max_queue=512,
        stall_s=STALL_S,
        stream_grace_s=GRACE_S,
        access_log=False,
    )
    command = (sys.executable, "-m", "bench.chaos.engine", str(args.folder))
    app = create_app(settings, lambda config: ProcessConnection(replace(config, device="cpu"), command))

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    app.add_api_route(TASKS, tasks, include_in_schema=False)
    return serve(app, app.state.ddpm, settings, bind(settings.host, settings.port))


def _replay_unless(switch: Path) -> None:
    replayed = EngineClient._replayed

    def replayed_or_failed(self: EngineClient, job_id: str) -> None:
        if switch.exists():
            self._deliver(Failed(job_id, EngineKilledError("Replay is off."), started=True))
        else:
            replayed(self, job_id)

    EngineClient._replayed = replayed_or_failed  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
