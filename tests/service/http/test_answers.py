"""Each wire format adds up measurements away from the event loop; what is quick is made at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from service.engine.messages import Finished, Measurement
from service.engine.streams import SequencedEvent
from service.http import answers
from service.http.answers import EventPresenter, JsonPresenter, PicturePresenter
from service.http.bodies import Tiles
from service.tasks.generate import GenerateRequest, prepare_generate
from tests.service.tasks.test_sampling import capabilities

NOTHING = Finished("job", (), 0.0, 0.0)
MEASURED = Finished("job", (), 0.0, 0.0, ((Measurement(3, 0.5, 0.25),),))


class Watched:
    """Bodies that note which thread they are made on."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def completed(self, *_: object) -> dict[str, Any]:
        self.threads.append(threading.get_ident())
        return {}

    def tiles(self, *_: object) -> Tiles:
        self.threads.append(threading.get_ident())
        return Tiles([np.zeros((1, 1, 1), np.uint8)], {})


@pytest.mark.parametrize(("result", "inline"), [(NOTHING, True), (MEASURED, False)], ids=["none", "some"])
@pytest.mark.parametrize("wire_format", ["json", "picture", "events"])
def test_measurements_are_added_up_on_another_thread(
    wire_format: str, result: Finished, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    monkeypatch.setattr(answers, "bodies_of", lambda _: watched)
    prepared = prepare_generate(GenerateRequest(), capabilities())

    async def present() -> None:
        if wire_format == "json":
            await JsonPresenter(prepared, "tiny").respond(result)
        elif wire_format == "picture":
            await PicturePresenter(prepared, "tiny", "image/png").respond(result)
        else:
            await EventPresenter(prepared, "tiny").chunk(SequencedEvent(1, result))

    asyncio.run(present())
    (thread,) = watched.threads
    assert (thread == threading.get_ident()) == inline
