"""Where the time from the process's start to readiness goes.

`python -m bench.startup` starts the service a few times for the whole. For the parts it does the same things
one after another in fresh processes, one for the engine's and one for the API's; the service does some of
them in parallel, and both processes start at once, so they add up to more.
"""

# Imports are part of what is measured: they are where they are timed.
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any


def parts(folder: Path) -> dict[str, float]:
    """Seconds of the engine's parts, in order. To be called once, in a process that has imported nothing."""
    taken: dict[str, float] = {}
    begun = time.perf_counter()

    def done(name: str) -> None:
        nonlocal begun
        taken[name] = time.perf_counter() - begun
        begun = time.perf_counter()

    import torch  # noqa: F401

    done("import torch")
    import service.engine.process  # noqa: F401

    done("import the rest of the engine")
    import openvino  # noqa: F401

    done("import openvino")
    from model import checkpoint

    model = checkpoint.load(folder)
    done("load the weights")
    from model.runtimes import OpenVinoRuntime, keep_torch_off
    from service.engine.warmup import cpu_batch_sizes

    runtime = OpenVinoRuntime(model, "auto")
    keep_torch_off(runtime)
    done("convert the network")
    runtime.prepare(cpu_batch_sizes())
    done("compile its shapes in parallel")
    runtime = OpenVinoRuntime(model, "auto")
    begun = time.perf_counter()
    for size in cpu_batch_sizes():
        runtime.prepare([size])
    done("not done: compile one after another")
    with TemporaryDirectory() as cache:
        for name in ("", "not done: compile from a cache on disk"):
            runtime = OpenVinoRuntime(model, "auto")
            runtime._options["CACHE_DIR"] = cache  # no option of the service: it does not pay
            begun = time.perf_counter()
            runtime.prepare(cpu_batch_sizes())
            done(name)
    del taken[""]
    return taken


def api_parts() -> dict[str, float]:
    """Seconds of the API's, likewise."""
    begun = time.perf_counter()
    import service.app
    import service.server  # noqa: F401

    return {"meanwhile: import the API": time.perf_counter() - begun}


def start_to_ready(folder: Path) -> float:
    """Seconds until /readyz answers 200. Raises RuntimeError when it never does."""
    import httpx

    from bench.servers import ROOT, SERVICE, Model, free_port

    port, begun = free_port(), time.monotonic()
    argv, environment = SERVICE.argv(port), Model(folder).environment("ours")
    popen = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False) as client:
            while popen.poll() is None:
                try:
                    if client.get("/readyz").status_code == 200:
                        return time.monotonic() - begun
                except httpx.TransportError:
                    pass
                time.sleep(0.02)
        raise RuntimeError(f"the service ended with {popen.returncode}")
    finally:
        popen.terminate()
        popen.wait()


def in_a_fresh_process(folder: Path, whose: str) -> dict[str, float]:
    """The parts of the engine or the API, in a process of their own."""
    command = [sys.executable, "-m", "bench.startup", "--parts", whose, "--model", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.startup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--parts", choices=("engine", "api"), help="in this process alone, as one line for programs"
    )
    args = parser.parse_args(arguments)
    if args.parts:
        print(json.dumps(parts(args.model) if args.parts == "engine" else api_parts()))
        return
    whole = [start_to_ready(args.model) for _ in range(args.rounds)]
    found = [
        in_a_fresh_process(args.model, "engine") | in_a_fresh_process(args.model, "api")
        for _ in range(args.rounds)
    ]
    print(f"Start to ready: {median(whole):.2f} s (median of {args.rounds})\n")
    print("|part|seconds|\n|---|--:|")
    for name in found[0]:
        print(f"|{name}|{median(each[name] for each in found):.2f}|")


if __name__ == "__main__":
    main()
