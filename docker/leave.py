"""Take a worker of Ray out of the fleet before its pod is stopped: the preStop hook of docker/kubernetes/ray.

`leave.py SECONDS` tells Ray that this node will be gone in so many seconds, and waits until it has none of
Ray Serve's replicas: they are moved to other nodes or, where none has room, end when they have finished what
they have. It exits with 0 then, and with 1 where Ray cannot be told or replicas remain. Further arguments go
to `ray drain-node`.
"""

import subprocess
import sys
import time
from pathlib import Path

TITLE = b"ray::ServeReplica:"
TOLD_S = 30
LOOK_S = 0.5


def replicas() -> list[str]:
    """Ids of the processes of this container that are replicas."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if process.read_bytes().startswith(TITLE):
                found.append(process.parent.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


def main(seconds: int, *arguments: str) -> str | None:
    """Leave. Returns what went wrong."""
    until = time.monotonic() + seconds
    ray = Path(sys.executable).parent / "ray"
    command = [
        ray,
        "drain-node",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=the pod is stopped",
    ]
    told = [*command, f"--deadline-remaining-seconds={seconds}", *arguments]
    try:
        subprocess.run(told, check=True, timeout=min(TOLD_S, seconds))
    except (subprocess.SubprocessError, OSError) as error:
        return f"Ray cannot be told: {error}"
    while left := replicas():
        if time.monotonic() > until:
            return f"replicas remain: {', '.join(left)}"
        time.sleep(LOOK_S)
    return None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
