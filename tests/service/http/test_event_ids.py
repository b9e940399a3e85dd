"""Signed ids of events, and streams that go on where their job is not known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest

from service.engine.streams import Position
from service.http.event_ids import EventIds, parse
from tests.service.fakes import until
from tests.service.live import Serve, Sse, Threaded, settings, sse
from tests.service.tasks.test_sampling import capabilities, prepare

SECRET = "a secret that replicas share"
IDS = EventIds(SECRET.encode(), "model, runtime")
STREAM = "/stream?n=2&sampler=ddpm&num_inference_steps=12&preview_every=1"


def test_a_signed_id_leads_to_the_same_job() -> None:
    prepared = prepare({"n": 3, "sampler": "ddim", "eta": 0.5})  # the seed is drawn
    found = IDS.continued(IDS.of(prepared).at(7, 6), capabilities())
    assert found is not None
    again, after = found
    assert after == Position(7, 6)
    assert again.spec.id == prepared.spec.id
    assert again.parameters == prepared.parameters


def test_without_a_secret_ids_are_plain() -> None:
    prepared = prepare({})
    assert EventIds().of(prepared).at(3, 2) == f"{prepared.spec.id}:3"
    assert EventIds().continued(IDS.of(prepared).at(3, 2), capabilities()) is None
    assert parse(IDS.of(prepared).at(3, 2)) == parse(f"{prepared.spec.id}:3") == (prepared.spec.id, 3)


def test_a_forged_id_leads_nowhere() -> None:
    prepared = prepare({"seed": 1})
    signed = IDS.of(prepared).at(3, 2)
    assert IDS.continued(signed, capabilities()) is not None
    for place in range(len(signed)):
        other = "0" if signed[place] != "0" else "1"
        assert IDS.continued(signed[:place] + other + signed[place + 1 :], capabilities()) is None
    others = EventIds(b"another secret, as long"), EventIds(SECRET.encode(), "other weights")
    forged = [*(ids.of(prepared).at(3, 2) for ids in others), "", ":", "::::", signed + "é", signed[:-1]]
    assert [IDS.continued(each, capabilities()) for each in forged] == [None] * len(forged)


def test_nothing_comes_after_the_last_event() -> None:
    assert IDS.continued(IDS.of(prepare({})).at(30, None), capabilities()) is None


def test_what_does_not_fit_into_a_header_is_not_signed() -> None:
    seeds = [2**52 + place for place in range(64)]
    assert 1000 < len(IDS.of(prepare({"seed": seeds})).at(3, 2)) < 2200
    many = prepare({"seed": seeds, "class_label": [capabilities().class_names[0]] * 64})
    assert IDS.of(many).at(3, 2) == f"{many.spec.id}:3"


def test_a_secret_is_long() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        settings(resume_secret="short")


# ── Two services that share a secret ───────────────────────────────────────────────────────────


@contextmanager
def events(server: Threaded, last: str = "") -> Iterator[Iterator[Sse]]:
    headers = {"last-event-id": last} if last else {}
    with server.client.stream("GET", STREAM if not last else "/stream", headers=headers) as response:
        assert response.status_code == 200
        yield sse(response)


def same(event: Sse) -> tuple[str, str, Any]:
    """What does not depend on when an event was made."""
    data = {name: value for name, value in event.data.items() if name not in ("eta_s", "timings")}
    return event.name, event.id, json.dumps(data, sort_keys=True)


def test_a_stream_goes_on_at_another_service_with_the_same_events(serve: Serve) -> None:
    first, second = serve(resume_secret=SECRET), serve(resume_secret=SECRET)
    with events(first) as all_of_it:
        begun = list(islice(all_of_it, 6))
        last = begun[-1].id
        rest = list(all_of_it)
    with events(second, last) as elsewhere:
        assert [same(event) for event in elsewhere] == [same(event) for event in rest]
    assert [event.name for event in rest][-1] == "completed"
    # It is known there now, and ends as any stream does.
    for server in (first, second):
        over = server.client.get("/stream", headers={"last-event-id": rest[-1].id})
        assert over.status_code == 204


def test_a_forged_or_a_plain_id_starts_no_chain(serve: Serve) -> None:
    first, second = serve(resume_secret=SECRET), serve(resume_secret=SECRET)
    with events(first) as all_of_it:
        signed = next(all_of_it).id
    plain = ":".join(signed.split(":")[:2])
    for forged in (plain, signed[:-1], signed.replace(":0:", ":1:"), signed + "x", "x" * 3000):
        assert second.client.get("/stream", headers={"last-event-id": forged}).status_code == 204
    assert second.metric("ddpm_network_evaluations_total") == 0
    assert second.client.get("/stream", headers={"last-event-id": signed}).status_code == 200
    until(lambda: second.state.engine.idle)
    assert second.metric("ddpm_network_evaluations_total") > 0


def test_a_full_service_refuses_a_stream_that_began_elsewhere(serve: Serve) -> None:
    first, second = serve(resume_secret=SECRET), serve(resume_secret=SECRET, max_queue=2)
    with events(first) as all_of_it:
        signed = next(all_of_it).id
    second.gate.shut()
    second.submit(prepare({"seed": 1}).spec)
    answer = second.client.get("/stream", headers={"last-event-id": signed})
    assert (answer.status_code, "retry-after" in answer.headers) == (429, True)


def test_a_secret_is_not_shown() -> None:
    chosen = settings(resume_secret=SECRET)
    assert SECRET not in f"{chosen!r}{chosen.model_dump_json()}"
