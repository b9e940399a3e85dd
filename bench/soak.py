"""Memory over many requests: does the service keep anything of those that have ended?

`python -m bench.soak` starts the service with a tiny network of random weights, so that requests are many and
not long, and sends 100,000 of them: JSON answers, streams that are read to their end, and streams whose
client disconnects after the first event. It prints the service's resident memory as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from bench.servers import SERVICE, Model, Server, running
from model import checkpoint
from model.checkpoint import Checkpoint
from model.schedule import NoiseSchedule
from model.unet import UNet, UNetConfig

CLIENTS = 8
MEASUREMENTS = 20
"""Of the memory: lines of the table."""


def tiny_model(size: int = 8, channels: int = 1, class_names: tuple[str, ...] = ()) -> Checkpoint:
    """A network of a few thousand random weights; with class names it has a null class too."""
    config = UNetConfig(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=None,
        num_class_embeds=len(class_names) + 1 if class_names else None,
    )
    scheduler = {"num_train_timesteps": 1000, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_diffusers(scheduler)
    null_class = len(class_names) if class_names else None
    return Checkpoint("tiny", UNet(config).eval(), schedule, scheduler, class_names, null_class)


async def request(client: httpx.AsyncClient, number: int) -> None:
    """Send a request of the kind that its number selects. Raises httpx.HTTPStatusError when it is refused."""
    kind = number % 10
    steps = 20 if kind == 9 else 2
    body = {"num_inference_steps": steps, "sampler": "ddpm", "preview_every": 1, "class_label": "a"}
    accept = "application/json" if kind < 7 else "text/event-stream"
    async with client.stream("POST", "/generate", json=body, headers={"Accept": accept}) as answer:
        answer.raise_for_status()
        async for _ in answer.aiter_raw():
            if kind == 9:
                return  # and the connection is closed with most of it unread


async def soak(server: Server, requests: int) -> list[tuple[int, int]]:
    """(requests done, resident bytes) at the start and MEASUREMENTS times after it."""
    process = psutil.Process(server.popen.pid)
    measured = [(0, process.memory_info().rss)]
    numbers = count(1)
    url = server.endpoint.url.removesuffix("/generate")
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False) as client:

        async def work() -> None:
            while (number := next(numbers)) <= requests:
                await request(client, number)
                if number % max(1, requests // MEASUREMENTS) == 0:
                    measured.append((number, process.memory_info().rss))
                    print(f"|{number:,}|{measured[-1][1] / 1e6:.1f}|", flush=True)

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown, and what the second half of the requests added."""
    parser = argparse.ArgumentParser("python -m bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), tiny_model(class_names=("a", "b")))
        # A stream that its client has left is forgotten at once.
        environment = {**Model(Path(folder)).environment("ours"), "DDPM_STREAM_GRACE_S": "0"}
        with running(SERVICE, environment) as server:
            print("|requests|resident MB|\n|--:|--:|")
            measured = asyncio.run(soak(server, args.requests))
    (middle, before), (end, after) = measured[len(measured) // 2], measured[-1]
    print(f"\nThe second half added {(after - before) / (end - middle):.0f} bytes a request.")


if __name__ == "__main__":
    main()
