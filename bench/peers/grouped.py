"""FastAPI and a queue: the oldest waiting image and others of its kind, of any request, run to completion.

The strongest peer without step-level batching: it never waits for a batch to fill, and a batch never holds
images of different lengths.

    uvicorn bench.peers.grouped:app
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from bench.peers.pipeline import MAX_BATCH, Wanted, load

pipeline = load()
waiting: list[tuple[Wanted, asyncio.Future[str]]] = []
arrived = asyncio.Event()


async def work() -> None:
    """Form a batch, run it in a thread, hand out its images; for ever."""
    while True:
        await arrived.wait()
        kind = waiting[0][0].kind
        batch = [item for item in waiting if item[0].kind == kind][:MAX_BATCH]
        waiting[:] = [item for item in waiting if item not in batch]
        if not waiting:
            arrived.clear()
        try:
            images = await asyncio.to_thread(pipeline, [wanted for wanted, _ in batch])
        except Exception as error:  # noqa: BLE001 - every request of the batch gets the error, and the next batch runs
            for _, done in batch:
                if not done.done():
                    done.set_exception(error)
            continue
        for (_, done), image in zip(batch, images, strict=True):
            if not done.done():
                done.set_result(image)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001 - FastAPI passes it
    """Have the worker run as long as the app does."""
    worker = asyncio.create_task(work())
    yield
    worker.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/generate")
async def generate(wanted: Wanted) -> dict[str, list[str]]:
    """Put the images of a request in the queue and wait for all of them."""
    loop = asyncio.get_running_loop()
    mine = [(image, loop.create_future()) for image in wanted.each()]
    waiting.extend(mine)
    arrived.set()
    return {"images": list(await asyncio.gather(*(done for _, done in mine)))}
