"""OpenAI's wire format: its own types accept what is sent, and errors say whether to try again."""

from __future__ import annotations

import asyncio
import base64
import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image

from service.engine.messages import Cancelled, Event, Failed, Finished, Picture, Preview, Queued
from service.engine.streams import SequencedEvent
from service.errors import (
    CancelledError,
    ComputeError,
    DeadlineError,
    EngineKilledError,
    InvalidRequestError,
    NonFiniteError,
    QueueFullError,
    ServiceError,
    UnauthorizedError,
)
from service.http.openai import ImagesEventPresenter, ImagesPresenter, openai_error
from service.http.problems import Problem, to_problem
from service.tasks.openai import PreparedImages
from tests.service.tasks.test_openai import edit, generation
from tests.service.tasks.test_sampling import shaped
from tests.service.tasks.test_uploads import noise


def pictures(n: int = 1, channels: int = 1, kind: Any = "xt") -> tuple[Picture, ...]:
    return tuple(Picture(i, 40 + i, kind, noise(8, 8, channels)) for i in range(n))


def response(prepared: PreparedImages, **of: int) -> dict[str, Any]:
    finished = Finished("f00", pictures(**of), 0.0, 0.1)
    answer = asyncio.run(ImagesPresenter(prepared, "tiny").respond(finished))
    assert answer.headers["x-job-id"] == "f00"
    body: dict[str, Any] = json.loads(bytes(answer.body))
    ImagesResponse.model_validate(body, strict=True)
    return body


def events(prepared: PreparedImages, *published: Event) -> list[tuple[str, Any]]:
    """Name and data of what is sent for these events."""
    presenter = ImagesEventPresenter(prepared, "tiny")

    async def sent() -> bytes:
        return b"".join(
            [await presenter.chunk(SequencedEvent(i, event)) for i, event in enumerate(published)]
        )

    found = []
    for block in asyncio.run(sent()).decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])
        found.append((fields.get("event", ""), data))
    return found


def preview(step: int, steps: int, n: int = 1) -> Preview:
    return Preview("f00", step, steps, 5, 0.1, pictures(n, kind="x0"))


def opened(datum: dict[str, Any]) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(datum["b64_json"])))
    image.load()
    return image


# ── Answers ────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_has_every_image_and_says_how_it_was_understood() -> None:
    body = response(generation(n=2, size="24x24", quality="high"), n=2)
    assert [datum["seed"] for datum in body["data"]] == [40, 41]
    assert {datum["revised_prompt"] for datum in body["data"]} == {"dog"}
    assert {key: body[key] for key in ("size", "quality", "background", "output_format")} == {
        "size": "24x24",
        "quality": "high",
        "background": "opaque",
        "output_format": "png",
    }
    enlarged = noise(8, 8, 1)[..., 0].repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(np.asarray(opened(body["data"][0])), enlarged)


def test_an_image_carries_what_makes_it_alone() -> None:
    datum = response(generation(n=2, seed=40), n=2)["data"][1]
    parameters = json.loads(opened(datum).info["parameters"])
    assert parameters.items() >= {"n": 1, "seed": 41, "class_label": "dog", "model": "tiny"}.items()


@pytest.mark.parametrize("quality", ["auto", "hd", "zebra"])
def test_a_quality_that_is_none_is_not_repeated(quality: str) -> None:
    assert "quality" not in response(generation(quality=quality))


def test_a_url_is_a_data_url() -> None:
    asked: dict[str, Any] = {"response_format": "url", "output_format": "webp"}
    (datum,) = response(generation(**asked))["data"]
    assert "b64_json" not in datum
    head, _, text = datum["url"].partition(",")
    assert head == "data:image/webp;base64"
    np.testing.assert_array_equal(np.asarray(opened({"b64_json": text}).convert("L")), noise(8, 8, 1)[..., 0])


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_quality_is_farther_from_the_image(output_format: str) -> None:
    wanted = noise(8, 8, 1)[..., 0].repeat(3, 0).repeat(3, 1).astype(int)
    distance = []
    for quality in (5, 90):
        asked: dict[str, Any] = {
            "output_format": output_format,
            "output_compression": quality,
            "size": "24x24",
        }
        (datum,) = response(generation(**asked))["data"]
        distance.append(np.abs(np.asarray(opened(datum).convert("L")) - wanted).mean())
    assert distance[0] > 2 * distance[1] > 0


def test_opaque_is_put_on_white() -> None:
    known = shaped(4, 8, 8)
    kept = opened(response(generation(known), channels=4)["data"][0])
    np.testing.assert_array_equal(np.asarray(kept), noise(8, 8, 4))
    body = response(generation(known, background="opaque", output_format="png"), channels=4)
    assert body["background"] == "opaque"
    rgba = Image.fromarray(noise(8, 8, 4))
    on_white = Image.alpha_composite(Image.new("RGBA", (8, 8), "white"), rgba).convert("RGB")
    np.testing.assert_array_equal(np.asarray(opened(body["data"][0])), np.asarray(on_white))


# ── Streams ────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_shows_what_was_asked_for_and_no_more() -> None:
    prepared = generation(stream=True, partial_images=2, num_inference_steps=9)
    shown: list[Event] = [Queued("f00", 0, 0.1), *(preview(step, 9) for step in range(1, 10))]
    *partials, completed, done = events(prepared, *shown, Finished("f00", pictures(), 0.0, 0.1))
    assert [name for name, _ in partials] == ["image_generation.partial_image"] * 2
    assert [data["partial_image_index"] for _, data in partials] == [0, 1]
    for _, data in partials:
        ImageGenPartialImageEvent.model_validate(data, strict=True)
    assert completed[0] == completed[1]["type"] == "image_generation.completed"
    ImageGenCompletedEvent.model_validate(completed[1], strict=True)
    assert completed[1]["seed"] == 40
    assert done == ("", "[DONE]")


def test_several_images_are_numbered() -> None:
    prepared = generation(n=2, stream=True, partial_images=1, num_inference_steps=4)
    found = events(prepared, preview(2, 4, 2), preview(4, 4, 2), Finished("f00", pictures(2), 0.0, 0.1))
    assert [(name.partition(".")[2], data["index"]) for name, data in found[:-1]] == [
        ("partial_image", 0),
        ("partial_image", 1),
        ("completed", 0),
        ("completed", 1),
    ]
    assert [data["partial_image_index"] for _, data in found[:2]] == [0, 0]


def test_only_the_last_of_what_is_sent_at_once_has_an_id() -> None:
    prepared = generation(n=2, stream=True)
    presenter = ImagesEventPresenter(prepared, "tiny")
    sent = asyncio.run(presenter.chunk(SequencedEvent(5, Finished("f00", pictures(2), 0.0, 0.1)))).decode()
    first, second, done = sent.split("\n\n")[:-1]
    assert "\nid: " not in first
    assert second.endswith(f"\nid: {prepared.job.spec.id}:5")
    assert done == "data: [DONE]"


def test_an_edit_has_events_of_its_own() -> None:
    prepared = edit(stream=True, partial_images=1, num_inference_steps=10, strength=0.4)
    partial, completed, _ = events(prepared, preview(2, 4), Finished("f00", pictures(), 0.0, 0.1))
    ImageEditPartialImageEvent.model_validate(partial[1], strict=True)
    ImageEditCompletedEvent.model_validate(completed[1], strict=True)


def test_a_failure_in_a_stream_is_an_error_and_its_end() -> None:
    prepared = generation(stream=True)
    ((name, data),) = events(prepared, Failed("f00", NonFiniteError("It is not finite.")))
    assert name == "error"
    assert data["error"] == {
        "message": "It is not finite.",
        "type": "server_error",
        "param": None,
        "code": "non_finite",
    }
    ((name, data),) = events(prepared, Cancelled("f00"))
    assert (name, data["error"]["code"]) == ("error", "cancelled")


# ── Errors ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "status", "kind", "again"),
    [
        (InvalidRequestError("n", "x"), 400, "invalid_request_error", None),
        (UnauthorizedError("x"), 401, "authentication_error", None),
        (QueueFullError("x", 3.0), 429, "rate_limit_error", None),
        (CancelledError("x"), 499, "invalid_request_error", None),
        (ComputeError("x"), 500, "server_error", "false"),
        (NonFiniteError("x"), 500, "server_error", "false"),
        (EngineKilledError("x"), 500, "server_error", "false"),
        (DeadlineError("x"), 504, "server_error", "false"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ServiceError) else None,
)
def test_an_error_is_openais(error: ServiceError, status: int, kind: str, again: str | None) -> None:
    answer = openai_error(to_problem(error), {"Retry-After": "3"})
    assert answer.status_code == status
    assert answer.headers["retry-after"] == "3"
    assert answer.headers.get("x-should-retry") == again
    param = error.field if isinstance(error, InvalidRequestError) else None
    assert json.loads(bytes(answer.body)) == {
        "error": {"message": "x", "type": kind, "param": param, "code": error.code}
    }


def test_an_error_about_no_field_has_no_param() -> None:
    problem = Problem(
        title="x", status=422, detail="x", code="invalid_request", errors=[{"field": "", "message": "x"}]
    )
    assert json.loads(bytes(openai_error(problem, {}).body))["error"]["param"] is None
