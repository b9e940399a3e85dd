"""`python -m service`: read settings, load the model, run the server.

Exit codes: 0 after an orderly stop, 1 when the engine failed, 2 for a bad setting, 3 for a model or a device
that cannot be used.
"""

from __future__ import annotations

import os
import sys

from model import checkpoint, runtimes
from service.app import create_app
from service.server import serve
from service.settings import SettingsError, read
from service.telemetry import configure_logging


def main() -> int:
    """Start the service as the environment and the command line say."""
    try:
        settings = read()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings.log_format)
    try:
        runtimes.check_available(settings.runtime, settings.device)
        model = checkpoint.load(settings.model)
    except (checkpoint.CheckpointError, runtimes.RuntimeUnavailableError) as error:
        print(error, file=sys.stderr)
        return 3
    app = create_app(model, settings)
    code = serve(app, app.state.ddpm, settings)
    if not app.state.ddpm.engine.join(1.0):
        os._exit(code)  # Python aborts when it is torn down under a thread that is inside the network
    return code


if __name__ == "__main__":
    sys.exit(main())
