"""What a request may say, and what becomes of it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from service.events import Finished, Picture, Preview, Queued
from service.schemas import (
    DEFAULT_STEPS,
    MAX_SEED,
    Catalogue,
    GenerateRequest,
    Order,
    StreamQuery,
    finished_body,
    preview_body,
    queued_body,
    to_job,
)

from model.checkpoint import Checkpoint
from model.samplers import A_G, SAMPLERS, Plan
from model.schedule import SPACINGS
from service.app import describe_model
from service.errors import InvalidRequestError
from tests.service.fakes import EVERYWHERE, tiny_classifier, tiny_model
from tests.service.live import settings


def catalogue(model: Checkpoint | None = None, **values: Any) -> Catalogue:
    return describe_model(model or tiny_model(), settings(**values))


def order(request: dict[str, Any], known: Catalogue | None = None, streamed: bool = False) -> Order:
    return to_job(GenerateRequest(**request), known or catalogue(), streamed=streamed)


# ── Strictness ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("n", "7"),
        ("n", 1.0),
        ("n", 0),
        ("n", -1),
        ("n", None),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 10**400),
        ("seed", True),
        ("seed", 1.5),
        ("sampler", "euler"),
        ("sampler", ""),
        ("sampler", None),
        ("num_inference_steps", 0),
        ("num_inference_steps", "50"),
        ("eta", float("nan")),
        ("eta", -0.1),
        ("eta", 1.1),
        ("eta", True),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -1.0),
        ("guidance_scale", 101.0),
        ("guidance_sigma_min", -0.1),
        ("guidance_sigma_max", 0.0),
        ("classifier_scale", -1.0),
        ("classifier_scale", 101.0),
        ("timestep_spacing", "even"),
        ("class_label", True),
        ("class_label", 1.0),
        ("class_label", ["cat"]),
        ("deadline_s", 0),
        ("deadline_s", float("nan")),
        ("output_format", "gif"),
        ("scale", 0),
        ("scale", 17),
        ("scale", 2.0),
        ("preview", "all"),
        ("preview_every", 0),
        ("steps", 20),
    ],
)
def test_a_bad_value_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        GenerateRequest(**{field: value})  # type: ignore[arg-type]
    assert {found["loc"][0] for found in refused.value.errors()} == {field}


@pytest.mark.parametrize("text", ['{"eta": NaN}', '{"guidance_scale": Infinity}'])
def test_json_that_is_hardly_json_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate(json.loads(text))


def test_an_integer_will_do_for_a_float() -> None:
    assert GenerateRequest(eta=1, guidance_scale=3, deadline_s=5).guidance_scale == 3.0


@pytest.mark.parametrize(("field", "text", "value"), [("n", "3", 3), ("eta", "0.5", 0.5), ("seed", "0", 0)])
def test_a_query_says_everything_as_text(field: str, text: str, value: object) -> None:
    assert getattr(StreamQuery(**{field: text}), field) == value


@pytest.mark.parametrize(("field", "text"), [("n", "many"), ("eta", "nan"), ("n", "1e3"), ("nn", "1")])
def test_but_not_anything(field: str, text: str) -> None:
    with pytest.raises(ValidationError):
        StreamQuery(**{field: text})


# ── Classes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wanted", [2, "2", "Ankle Boot", "ankle boot", "  ANKLE BOOT "])
def test_a_class_goes_by_name_or_index(wanted: int | str) -> None:
    made = order({"class_label": wanted})
    assert made.job.samples[0].chain.label == 2  # type: ignore[attr-defined]
    assert made.parameters["class_label"] == "Ankle Boot"


@pytest.mark.parametrize(
    "wanted", [3, -1, 10**400, "3", "-1", "9" * 5000, "cow", "", "²", "\ud800", "Ankle  Boot"]
)
def test_others_are_refused_with_a_list(wanted: int | str) -> None:
    with pytest.raises(InvalidRequestError, match=r"cat, dog, Ankle Boot \(0 to 2\)") as refused:
        order({"class_label": wanted})
    assert refused.value.field == "class_label"


def test_a_name_beats_an_index() -> None:
    known = catalogue(tiny_model())
    numbered = Catalogue(**{**vars(known), "class_names": ("2", "1", "0")})
    assert [numbered.label(wanted) for wanted in ("2", "0")] == [0, 2]


def test_an_unconditional_model_has_no_classes() -> None:
    known = catalogue(tiny_model(guided=False, classes=0))
    with pytest.raises(InvalidRequestError, match="unconditional"):
        order({"class_label": 0}, known)
    assert order({}, known).parameters["class_label"] is None


# ── Guidance ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "scale", "rows"),
    [
        ({}, 1.0, 1),
        ({"class_label": "cat"}, 2.0, 2),
        ({"class_label": "cat", "guidance_scale": 1.0}, 1.0, 1),
        ({"class_label": "cat", "guidance_scale": 0.0}, 0.0, 2),
        ({"class_label": "cat", "guidance_scale": 7.5}, 7.5, 2),
        ({"guidance_scale": 1.0}, 1.0, 1),
    ],
)
def test_guidance_of_a_guided_model(request_: dict[str, Any], scale: float, rows: int) -> None:
    made = order({**EVERYWHERE, **request_})
    assert made.parameters["guidance_scale"] == scale
    assert set(made.job.samples[0].chain.plan.rows) == {rows}


def test_guidance_keeps_to_the_middle_noise_levels_by_default() -> None:
    plan = order({"class_label": "cat"}).job.samples[0].chain.plan
    assert isinstance(plan, Plan)
    sigma = np.sqrt(1 / tiny_model().schedule.alphas_cumprod[list(plan.timesteps)] - 1)
    assert plan.rows == tuple(np.where((sigma >= 0.3) & (sigma <= 5), 2, 1))
    assert set(plan.rows) == {1, 2}


def test_guidance_needs_a_class() -> None:
    with pytest.raises(InvalidRequestError, match="class_label") as refused:
        order({"guidance_scale": 2.0})
    assert refused.value.field == "guidance_scale"


def test_guidance_needs_a_null_class() -> None:
    known = catalogue(tiny_model(guided=False))
    assert order({"class_label": 0}, known).parameters["guidance_scale"] == 1.0
    with pytest.raises(InvalidRequestError, match="null class"):
        order({"class_label": 0, "guidance_scale": 2.0}, known)
    with pytest.raises(InvalidRequestError, match="name a class"):
        order({}, known)


def classified(**values: Any) -> Catalogue:
    """What can be asked of a model with a classifier."""
    return catalogue(replace(tiny_model(), classifier=tiny_classifier()), **values)


def test_guidance_by_a_classifier_is_a_column_of_the_plan() -> None:
    made = order({"class_label": "cat", "classifier_scale": 3.0, **EVERYWHERE}, classified())
    plan = made.job.samples[0].chain.plan
    assert isinstance(plan, Plan)
    assert (plan.table[:, A_G] > 0).all()
    assert set(plan.rows) == {1}, "it does not need the unconditional branch"
    assert (made.parameters["classifier_scale"], made.parameters["guidance_scale"]) == (3.0, 1.0)
    asked = {"class_label": "cat", "classifier_scale": 3.0, "guidance_scale": 2.0, **EVERYWHERE}
    both = order(asked, classified())
    assert set(both.job.samples[0].chain.plan.rows) == {2}
    without = order({"class_label": "cat"}, classified()).job.samples[0].chain.plan
    assert isinstance(without, Plan)
    assert not without.table[:, A_G].any()


def test_guidance_may_keep_to_an_interval_of_noise_levels() -> None:
    asked = {"class_label": 0, "guidance_scale": 3.0, "guidance_sigma_min": 0.2, "guidance_sigma_max": 1.0}
    made = order(asked)
    plan = made.job.samples[0].chain.plan
    sigma = np.sqrt(1 / tiny_model().schedule.alphas_cumprod[list(plan.timesteps)] - 1)
    assert plan.rows == tuple(np.where((sigma >= 0.2) & (sigma <= 1.0), 2, 1))
    assert 1 < sum(rows == 2 for rows in plan.rows) < 50
    assert {key: made.parameters[key] for key in asked} == {**asked, "class_label": "cat"}


@pytest.mark.parametrize(
    ("request_", "known", "field"),
    [
        ({"class_label": 0, "classifier_scale": 1.0}, None, "classifier_scale"),
        ({"classifier_scale": 1.0}, "classified", "classifier_scale"),
        ({"guidance_sigma_min": 1.0, "guidance_sigma_max": 1.0}, None, "guidance_sigma_max"),
    ],
)
def test_guidance_that_cannot_be_had_is_refused(
    request_: dict[str, Any], known: str | None, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        order(request_, classified() if known else None)
    assert refused.value.field == field


def test_the_spacing_chooses_the_timesteps() -> None:
    made = {
        kind: order({"timestep_spacing": kind, "num_inference_steps": 4}) for kind in ("leading", "linspace")
    }
    assert made["leading"].job.samples[0].chain.plan.timesteps == (75, 50, 25, 0)
    assert made["linspace"].job.samples[0].chain.plan.timesteps == (99, 66, 33, 0)
    assert made["leading"].parameters["timestep_spacing"] == "leading"
    assert order({}).parameters["timestep_spacing"] == "trailing", "as the model says"


# ── Limits and defaults ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"n": 65}, "n"),
        ({"n": 10**400}, "n"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta"),
    ],
)
def test_beyond_the_limits(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        order(request_)
    assert refused.value.field == field


def test_no_more_images_than_the_queue_holds() -> None:
    known = catalogue(max_queue=4)
    assert len(order({"n": 4}, known).job.samples) == 4
    with pytest.raises(InvalidRequestError, match="At most 4 images"):
        order({"n": 5}, known)


def test_enlarged_pictures_have_a_limit_together() -> None:
    known = catalogue()
    large = Catalogue(**{**vars(known), "shape": (3, 256, 256)})
    assert order({"n": 4, "scale": 8}, large).scale == 8
    assert order({"n": 64}, large).scale == 1  # as they are, there is no such limit
    with pytest.raises(InvalidRequestError, match="16777216 pixels") as refused:
        order({"n": 5, "scale": 8}, large)
    assert refused.value.field == "scale"


def test_the_defaults_are_told() -> None:
    made = order({})
    assert made.parameters == {
        "n": 1,
        "seed": made.job.samples[0].chain.seed,
        "sampler": "dpmpp_2m",
        "num_inference_steps": 20,
        "eta": 0.0,
        "guidance_scale": 1.0,
        "guidance_sigma_min": 0.3,
        "guidance_sigma_max": 5.0,
        "classifier_scale": 0.0,
        "timestep_spacing": "trailing",
        "class_label": None,
        "output_format": "png",
        "scale": 1,
    }
    assert order({}).parameters["seed"] != made.parameters["seed"]


@pytest.mark.parametrize(("sampler", "steps"), DEFAULT_STEPS.items())
def test_every_sampler_has_steps_of_its_own(sampler: str, steps: int) -> None:
    assert order({"sampler": sampler}).parameters["num_inference_steps"] == steps


def test_guidance_within_an_interval_costs_less() -> None:
    asked = {"class_label": "cat", "guidance_sigma_min": 0.5, "guidance_sigma_max": 4.0}
    (sample,) = order(asked).job.samples
    assert set(sample.chain.plan.rows) == {1, 2}
    assert order(asked).parameters["guidance_sigma_max"] == 4.0
    with pytest.raises(InvalidRequestError, match="empty") as refused:
        order({**asked, "guidance_sigma_max": 0.5})
    assert refused.value.field == "guidance_sigma_max"


def test_a_classifier_that_is_not_there_cannot_guide() -> None:
    with pytest.raises(InvalidRequestError, match="no classifier") as refused:
        order({"class_label": "cat", "classifier_scale": 1.0})
    assert refused.value.field == "classifier_scale"


def test_the_spacing_of_timesteps_can_be_chosen() -> None:
    plans = [order({"timestep_spacing": spacing}).job.samples[0].chain.plan for spacing in SPACINGS]
    assert len({plan.timesteps for plan in plans}) == len(SPACINGS)


def test_image_i_has_seed_plus_i() -> None:
    assert [s.chain.seed for s in order({"n": 3, "seed": 40}).job.samples] == [40, 41, 42]
    assert [s.chain.seed for s in order({"n": 2, "seed": MAX_SEED - 1}).job.samples][-1] == MAX_SEED


@pytest.mark.parametrize(("wanted", "allowed"), [(None, 60.0), (5.0, 5.0), (1000.0, 60.0)])
def test_the_deadline_is_the_clients_or_the_houses(wanted: float | None, allowed: float) -> None:
    job = order({"deadline_s": wanted}, catalogue(deadline_s=60.0)).job
    assert job.deadline is not None
    assert job.deadline - job.created == pytest.approx(allowed)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (25, 1), (50, 2), (100, 4)])
def test_about_two_dozen_previews_of_any_chain(steps: int, every: int) -> None:
    job = order({"num_inference_steps": steps}, streamed=True).job
    assert (job.preview, job.preview_every) == ("x0", every)
    assert order({"preview_every": 7}, streamed=True).job.preview_every == 7
    assert order({"preview": "both"}).job.preview == "none"  # nobody would see them


@pytest.mark.parametrize(
    ("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.3), ("ddim", 1.0)]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 99, 100])
def test_whatever_can_be_asked_for_has_a_plan(sampler: str, steps: int, eta: float) -> None:
    made = order({"sampler": sampler, "num_inference_steps": steps, "eta": eta})
    plan = made.job.samples[0].chain.plan
    assert len(plan) == steps
    assert np.isfinite(plan.table).all()  # type: ignore[attr-defined]


# ── Answers ────────────────────────────────────────────────────────────────────────────────────


def picture(index: int, kind: str = "xt") -> Picture:
    return Picture(index, 40 + index, kind, np.full((8, 8, 1), index, np.uint8))


def test_the_answer_to_generate() -> None:
    made = order({"n": 2, "seed": 40, "class_label": 0})
    body = finished_body(Finished(made.job.id, (picture(0), picture(1)), 0.25, 1.5), made, "tiny")
    assert body.keys() == {"id", "model", "images", "parameters", "timings"}
    assert (body["id"], body["model"]) == (made.job.id, "tiny")
    assert body["timings"] == {"queue_s": 0.25, "run_s": 1.5, "total_s": 1.75}
    assert [(image["index"], image["seed"]) for image in body["images"]] == [(0, 40), (1, 41)]
    image = Image.open(BytesIO(base64.b64decode(body["images"][1]["b64_json"])))
    assert json.loads(image.info["parameters"]) == {**made.parameters, "n": 1, "seed": 41, "model": "tiny"}
    json.dumps(body, allow_nan=False)


def test_pictures_are_enlarged_in_answers_and_looks() -> None:
    made = order({"scale": 3}, streamed=True)
    finished = finished_body(Finished(made.job.id, (picture(0),), 0.0, 0.0), made, "tiny")
    look = preview_body(Preview(made.job.id, 1, 50, 980, 1.0, (picture(0, "x0"),)), made)
    for body in (finished, look):
        image = Image.open(BytesIO(base64.b64decode(body["images"][0]["b64_json"])))
        assert image.size == (24, 24)


def test_the_events_of_a_stream() -> None:
    made = order({"seed": 40, "output_format": "webp"}, streamed=True)
    assert queued_body(Queued(made.job.id, 3, 1.23456), made) == {
        "id": made.job.id,
        "position": 3,
        "eta_s": 1.235,
        "seed": 40,
    }
    body = preview_body(Preview(made.job.id, 4, 50, 920, 1.5, (picture(0, "x0"), picture(0, "xt"))), made)
    assert {key: body[key] for key in ("step", "steps", "timestep", "eta_s")} == {
        "step": 4,
        "steps": 50,
        "timestep": 920,
        "eta_s": 1.5,
    }
    assert [(image["kind"], image["media_type"]) for image in body["images"]] == [
        ("x0", "image/webp"),
        ("xt", "image/webp"),
    ]
