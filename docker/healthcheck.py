"""Exit 0 when the service in this container is ready, 1 when it is not: the image's HEALTHCHECK."""

import http.client
import os
import sys

# http.client, because urllib would use a proxy from the environment even for this.
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("DDPM_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"no answer: {error}")
if status != 200:
    sys.exit(f"not ready: status {status}")
