"""The same requests with the same seeds get the answers that golden.json has.

`python -m tests.golden` writes that file; it is written anew only where answers are meant to change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from tests.golden.app import MODELS
from tests.golden.comparison import differences
from tests.golden.record import FILE, Record, answer, serving
from tests.golden.requests import Ask, all_requests

GOLDEN: dict[str, Record] = json.loads(FILE.read_text())
ASKS = all_requests()
Ready = Callable[[Ask], httpx.Client]


@pytest.fixture(scope="module")
def client() -> Iterator[Ready]:
    """The client of the model that a request is for. Each is served from its first request on."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        running: dict[str, httpx.Client] = {}

        def of(ask: Ask) -> httpx.Client:
            if ask.model not in running:
                running[ask.model] = stack.enter_context(serving(ask.model))
            return running[ask.model]

        yield of


def found(ask: Ask, record: Record) -> list[str]:
    return differences(GOLDEN[ask.name], record, summed=ask.path == "/score")


def test_the_file_has_every_request():
    assert GOLDEN.keys() == ASKS.keys()
    assert {ask.model for ask in ASKS.values()} == MODELS.keys()
    for name, ask in ASKS.items():
        assert len(GOLDEN[name].get("looks", ())) == ask.looks


@pytest.mark.parametrize("name", ASKS)
def test_an_answer_is_the_golden_one(name: str, client: Ready):
    ask = ASKS[name]
    differing = found(ask, answer(client(ask), ask))
    assert not differing, "\n".join(differing[:10])


# ── Controls: what is compared can differ, and is seen to ──────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["generate ddim", "edit by default", "interpolate as a picture", "score by many terms"]
)
def test_another_seed_is_seen(name: str, client: Ready):
    ask = ASKS[name]
    assert ask.body is not None
    record = answer(client(ask), replace(ask, body={**ask.body, "seed": ask.body["seed"] + 1}))
    _set_seed(record, ask.body["seed"])  # so that only what the seed has made differs
    assert found(ask, record)


def _set_seed(value: Any, seed: int) -> None:
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _set_seed(each, seed)
    if isinstance(value, dict) and "seed" in value:
        value["seed"] = seed


def changed(name: str, *path: str | int, to: Any) -> list[str]:
    """What is found where the golden answer itself comes back, but for one place."""
    record = deepcopy(GOLDEN[name])
    assert not found(ASKS[name], record)
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != to
    place[path[-1]] = to
    return found(ASKS[name], record)


def test_another_place_is_seen():
    assert changed("generate ddpm", "body", "images", 0, "picture", "pixels", to="0")
    assert changed("generate ddpm", "body", "images", 0, "picture", "parameters", "eta", to=0.5)
    assert changed("generate ddpm", "body", "parameters", "scale", to="1")
    assert changed("generate a sheet, 0", "picture", "pixels", to="0")
    assert changed("refused: no images", "fields", to=["seed"])
    assert changed("watch x0", "completed", "parameters", "n", to=3)
    assert changed("watch x0", "queued", "seed", to=4)
    assert changed("watch one that breaks", "error", "code", to="internal")


def test_sums_may_differ_by_little():
    scored, place = "score by many terms", ("body", "scores", 0, "bits_per_dim")
    bits = GOLDEN[scored]["body"]["scores"][0]["bits_per_dim"]
    assert not changed(scored, *place, to=bits * (1 + 5e-7))
    assert changed(scored, *place, to=bits * (1 + 2e-6))
    made, place = "interpolate by default", ("body", "images", 1, "lambda")
    assert changed(made, *place, to=0.125 * (1 + 5e-7))


@pytest.mark.parametrize("name", ["watch x0", "watch a score, both"])
def test_a_look_may_be_missing_unless_it_is_the_last(name: str):
    ask, record = ASKS[name], deepcopy(GOLDEN[name])
    first = next(place for place in record["looks"] if place.startswith("step 1 "))
    last = next(place for place in record["looks"] if place.startswith(f"step {record['steps']} "))
    look = record["looks"].pop(first)
    assert not found(ask, record)
    record["looks"]["step 0 t 0 image 0 x0"] = look
    assert found(ask, record)
    del record["looks"]["step 0 t 0 image 0 x0"]
    record["looks"][last]["picture"]["pixels"] = look["picture"]["pixels"]
    assert found(ask, record)
    del record["looks"][last]
    assert found(ask, record)
