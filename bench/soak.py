"""Memory over many requests: does the service keep anything of those that have ended?

`python -m bench.soak` starts the service with a tiny network of random weights, so that requests are many and
not long, and sends 100,000 of them: JSON answers, streams that are read to their end, and streams whose
client disconnects after the first event. It prints what the service holds as it goes, the API process and
the engine's apart: resident memory, threads and descriptors.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
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
        sample_size=(size, size),
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


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident: int
    threads: int
    descriptors: int

    @classmethod
    def by(cls, process: psutil.Process) -> Held:
        """What it holds now."""
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_threads(), process.num_fds())


Measured = tuple[int, tuple[Held, ...]]
"""Requests done, and what the API process and the engine's held then."""


async def soak(server: Server, requests: int) -> list[Measured]:
    """What is held at the start and MEASUREMENTS times after it."""
    api = psutil.Process(server.popen.pid)
    processes = (api, *api.children(recursive=True))
    numbers = count(1)
    url = server.endpoint.url.removesuffix("/generate")

    def measure(number: int) -> Measured:
        return number, tuple(Held.by(process) for process in processes)

    measured = [measure(0)]
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False) as client:

        async def work() -> None:
            while (number := next(numbers)) <= requests:
                await request(client, number)
                if number % max(1, requests // MEASUREMENTS) == 0:
                    measured.append(measure(number))
                    print(_line(measured[-1]), flush=True)

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return measured


def _line(measured: Measured) -> str:
    number, held = measured
    cells = (f"{each.resident / 1e6:.1f}|{each.threads}|{each.descriptors}" for each in held)
    return f"|{number:,}|{'|'.join(cells)}|"


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
            print("|requests|API: MB|threads|descriptors|engine: MB|threads|descriptors|\n|" + "--:|" * 7)
            measured = asyncio.run(soak(server, args.requests))
    (middle, before), (end, after) = measured[len(measured) // 2], measured[-1]
    added = [
        (there.resident - here.resident) / (end - middle) for here, there in zip(before, after, strict=True)
    ]
    print(f"\nThe second half added {added[0]:.0f} bytes a request in the API, {added[1]:.0f} in the engine.")


if __name__ == "__main__":
    main()
