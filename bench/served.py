"""Images per second through HTTP of several models, side by side: `python -m bench.served FOLDER FOLDER …`.

Each folder is served by a process of its own, with its own defaults. In every round each of them is kept busy
in turn by the same clients, whose request leaves all but --request open; the others have nothing to do then.
The medians are printed, and each as a multiple of the first folder's in the same round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.http import kept_busy, rate
from bench.servers import SERVICE, Model, running

CLIENTS = 6
REQUEST = {"n": 4, "class_label": 0}


def images_per_second(url: str, request: Mapping[str, Any], seconds: float) -> float:
    """Images that a service finishes per second while clients keep it busy."""
    with kept_busy(url, "application/json", request, CLIENTS):
        return rate(url, "ddpm_images_generated_total", seconds)


def defaults_of(url: str, request: Mapping[str, Any]) -> str:
    """How the service answers such a request."""
    answer = httpx.post(f"{url}/generate", json=request, trust_env=False, timeout=60.0).raise_for_status()
    used = answer.json()["parameters"]
    return f"{used['sampler']}, {used['num_inference_steps']} steps, guidance {used['guidance_scale']:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.served", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--request", type=json.loads, default=REQUEST, help="body of every request, in JSON")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args(arguments)
    with ExitStack() as stack:
        urls = []
        for folder in args.folders:
            server = stack.enter_context(running(SERVICE, Model(folder).environment("ours")))
            urls.append(server.endpoint.url.removesuffix("/generate"))
        rates = [
            [images_per_second(url, args.request, args.seconds) for url in urls] for _ in range(args.rounds)
        ]
        print("|model|by default|images/s|min and max|of the first in the same round|")
        print("|---|---|--:|---|--:|")
        for place, (folder, url) in enumerate(zip(args.folders, urls, strict=True)):
            found = [rounds[place] for rounds in rates]
            times = median(rounds[place] / rounds[0] for rounds in rates)
            spread = f"{min(found):.1f} … {max(found):.1f}"
            defaults = defaults_of(url, args.request)
            print(f"|{folder}|{defaults}|{median(found):.1f}|{spread}|{times:.2f} ×|")


if __name__ == "__main__":
    main()
