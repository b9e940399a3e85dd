"""`python -m service`: read settings, start the engines, run the server.

Exit codes: 0 after an orderly stop, 1 when the engine failed, 2 for a bad setting, 3 for a model or a device
that cannot be used.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from service.engine.worker import ProcessConnection
from service.settings import SettingsError, read, unknown_variables
from service.telemetry import configure_logging

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, program: str = "python -m service") -> int:
    """Start the service as the environment and the command line say: that of the process, or these arguments.

    program: what its help calls it.
    """
    try:
        settings = read(arguments, program)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings.log_format)
    for line in unknown_variables(settings):
        logger.warning("%s", line)
    # Before this process imports what it serves with: an engine takes longer to be ready, so it goes first.
    started = {config: ProcessConnection(config) for config in settings.engine_configs()}
    from service.app import create_app
    from service.server import serve

    try:
        for engine in started.values():
            if (code := engine.wait_until_loaded()) is not None:
                return code  # it has said why
    except KeyboardInterrupt:
        return 0  # nothing had begun; the engines end with this process
    app = create_app(settings, lambda config: started.pop(config, None) or ProcessConnection(config))
    return serve(app, app.state.ddpm, settings)


if __name__ == "__main__":
    sys.exit(main())
