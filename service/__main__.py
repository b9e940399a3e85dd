"""`python -m service`: read settings, start the engines, run the server.

Exit codes: 0 after an orderly stop, 1 when the engine failed, 2 for a bad setting, 3 for a model or a device
that cannot be used, 4 for an address that cannot be listened on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.startup import BAD_SETTING, StartError, bind, check_model, leave_on_signals

if TYPE_CHECKING:
    from service.engine.connection import ProcessConnection
    from service.engine.messages import EngineConfig

    Engines = dict[EngineConfig, ProcessConnection]

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, program: str = "python -m service") -> int:
    """Start the service as the environment and the command line say: that of the process, or these arguments.

    program: what its help calls it.
    """
    engines: Engines = {}

    def kill() -> None:
        for engine in [*engines.values()]:
            engine.kill()

    # Until the server handles them: nothing has begun, and what is being loaded is not waited for.
    leave_on_signals(kill)
    try:
        return _start(arguments, program, engines)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.code
    finally:
        kill()


def _start(arguments: Sequence[str] | None, program: str, engines: Engines) -> int:
    """What takes no time comes first, and what takes longest goes on meanwhile. Returns the exit code.

    engines: gets those that are started, until the application has them. Raises StartError.
    """
    from service.settings import SettingsError, read, unknown_variables

    try:
        settings = read(arguments, program)
    except SettingsError as error:
        raise StartError(BAD_SETTING, str(error)) from error
    from service.engine.connection import ProcessConnection
    from service.telemetry import configure_logging

    configure_logging(settings.log_format)
    for line in unknown_variables(settings):
        logger.warning("%s", line)
    sockets = bind(settings.host, settings.port)
    check_model(settings.model, settings.runtime)
    # Before this process imports what it serves with: an engine takes longer to be ready, so it goes first.
    for config in settings.engine_configs():
        engines[config] = ProcessConnection(config)
    from service.app import create_app
    from service.server import serve

    for engine in engines.values():
        if (code := engine.wait_until_loaded()) is not None:
            return code  # it has said why

    app = create_app(settings, lambda config: engines.pop(config, None) or ProcessConnection(config))
    return serve(app, app.state.ddpm, settings, sockets)


if __name__ == "__main__":
    sys.exit(main())
