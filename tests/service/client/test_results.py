"""Answers as values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.client import ClientError, Job, Preview
from service.client.results import Image, outcome, pause_s, to_event, to_job, to_result, to_scores

TIMINGS = {"queue_s": 0.0, "run_s": 0.1, "total_s": 0.1}


def image(index: int, **more: Any) -> dict[str, Any]:
    return {"index": index, "seed": 7 + index, "b64_json": "AAEC", "media_type": "image/png", **more}


def answer(images: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    return {"id": "a1", "model": "m", "images": images, "parameters": parameters, "timings": TIMINGS}


def test_each_image_has_its_class() -> None:
    one = to_result(answer([image(0), image(1)], class_label="dog"))
    assert [each.class_label for each in one.images] == ["dog", "dog"]
    several = to_result(answer([image(0), image(1)], class_label=["dog", None]))
    assert [each.class_label for each in several.images] == ["dog", None]
    own = to_result(answer([image(0, class_label="cat")], class_label="dog"))
    assert own.images[0].class_label == "cat"


def test_a_preview_has_the_classes_that_were_asked_for() -> None:
    data = {"step": 1, "steps": 2, "timestep": 9, "eta_s": 0.1, "images": [image(1, kind="x0")]}
    event = to_event("preview", data, ["cat", "dog"])
    assert isinstance(event, Preview)
    assert (event.images[0].class_label, event.images[0].kind) == ("dog", "x0")


@pytest.mark.parametrize(
    ("media_type", "suffix"),
    [("image/png", ".png"), ("image/jpeg", ".jpg"), ("image/webp", ".webp"), ("application/x-npy", ".npy")],
)
def test_an_image_is_written_as_it_came(tmp_path: Path, media_type: str, suffix: str) -> None:
    found = Image(0, 7, None, b"bytes", media_type)
    assert found.suffix == suffix
    found.save(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == b"bytes"


def test_a_finished_job_has_its_answer_inside_or_is_it() -> None:
    body = answer([image(0)])
    inside = to_job({"id": "a1", "state": "finished", "result": body})
    itself = to_job(body)
    assert (inside.state, itself.state) == ("finished", "finished")
    assert inside.result == itself.result == to_result(body)
    assert outcome(inside) == inside.result


def test_a_finished_job_may_have_scores() -> None:
    score = {
        "index": 0,
        "seed": 7,
        "bits_per_dim": 1.5,
        "standard_error": 0.0,
        "prior": 0.1,
        "terms": [],
        "rate_distortion": [],
        "guesses": [image(0)],
        "typicality": None,
    }
    body = {"id": "a1", "model": "m", "scores": [score], "parameters": {}, "timings": TIMINGS}
    job = to_job({"id": "a1", "state": "finished", "result": body})
    assert job.result == to_scores(body)
    assert to_scores(body).scores[0].bits_per_dim == 1.5


def test_a_job_without_a_result_has_no_outcome() -> None:
    with pytest.raises(ClientError, match="cancelled"):
        outcome(Job("a1", "cancelled"))


@pytest.mark.parametrize(("eta_s", "pause"), [(None, 0.1), (0.0, 0.1), (0.7, 0.7), (60.0, 2.0)])
def test_the_pause_follows_the_time_that_is_left(eta_s: float | None, pause: float) -> None:
    assert pause_s(Job("a1", "running", eta_s=eta_s)) == pause
