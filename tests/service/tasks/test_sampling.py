"""The fields that requests share: what is refused, what is filled in, and the plans that come of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from pydantic import ValidationError

from model.checkpoint import Checkpoint
from model.samplers import COLUMNS, SAMPLERS
from model.schedule import SPACINGS
from service.engine.warmup import model_info
from service.errors import InvalidRequestError
from service.http.info import describe
from service.http.state import capabilities_of
from service.tasks.generate import GenerateRequest, StreamQuery, prepare_generate
from service.tasks.sampling import DEFAULT_STEPS, MAX_NUMBER, MAX_SEED, ModelCapabilities, PreparedRequest
from tests.service.fakes import EVERYWHERE, fake_info, tiny_classifier, tiny_model
from tests.service.live import settings


def capabilities(model: Checkpoint | None = None, **values: Any) -> ModelCapabilities:
    return capabilities_of(model_info(model or tiny_model()), settings(**values))


def prepare(request: dict[str, Any], known: ModelCapabilities | None = None) -> PreparedRequest:
    return prepare_generate(GenerateRequest(**request), known or capabilities())


# ── Formats of pictures ────────────────────────────────────────────────────────────────────────


def shaped(*shape: int) -> ModelCapabilities:
    return structs.replace(capabilities(), shape=shape)


@pytest.mark.parametrize(
    ("channels", "default"), [(1, "png"), (2, "npy"), (3, "png"), (4, "png"), (5, "npy"), (12, "npy")]
)
def test_the_format_that_holds_so_many_channels_is_the_default(channels: int, default: str) -> None:
    made = prepare({}, shaped(channels, 8, 8))
    assert made.output_format == made.parameters["output_format"] == default
    assert prepare({"output_format": "webp"}, shaped(channels, 8, 8)).output_format == "webp"


def test_a_jpeg_of_what_is_transparent_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no transparency") as refused:
        prepare({"output_format": "jpeg"}, shaped(4, 8, 8))
    assert refused.value.field == "output_format"
    assert prepare({"output_format": "jpeg"}, shaped(5, 8, 8)).output_format == "jpeg"


def test_an_enlarged_sheet_counts_all_its_channels() -> None:
    assert prepare({"scale": 8}, shaped(3, 512, 512)).scale == 8
    with pytest.raises(InvalidRequestError, match="at most") as refused:
        prepare({"scale": 8}, shaped(5, 512, 512))
    assert refused.value.field == "scale"


# ── Strictness ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("n", "7"),
        ("n", 1.0),
        ("n", 0),
        ("n", -1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 10**400),
        ("seed", True),
        ("seed", 1.5),
        ("sampler", "euler"),
        ("sampler", ""),
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
        ("class_label", []),
        ("class_label", [1.0]),
        ("class_label", [["cat"]]),
        ("seed", []),
        ("seed", [-1]),
        ("seed", [None]),
        ("deadline_s", 0),
        ("deadline_s", float("nan")),
        ("output_format", "gif"),
        ("scale", 0),
        ("scale", 65),
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
    made = prepare({"class_label": wanted})
    assert made.spec.stages[0].chains[0].label == 2
    assert made.parameters["class_label"] == "Ankle Boot"


@pytest.mark.parametrize(
    "wanted", [3, -1, 10**400, "3", "-1", "9" * 5000, "cow", "", "²", "\ud800", "Ankle  Boot"]
)
def test_others_are_refused_with_a_list(wanted: int | str) -> None:
    with pytest.raises(InvalidRequestError, match=r"cat, dog, Ankle Boot \(0 to 2\)") as refused:
        prepare({"class_label": wanted})
    assert refused.value.field == "class_label"


def test_a_name_that_could_mean_several_classes_is_refused_with_all_of_them() -> None:
    model = replace(tiny_model(), class_names=("crane", "0", "crane"))
    known = capabilities(model)
    assert known.class_names == ("crane (0)", "0 (1)", "crane (2)")
    for wanted, meant in (
        ("crane", r"0 \(crane \(0\)\) or 2 \(crane \(2\)\)"),
        ("0", r"0 \(crane \(0\)\) or 1 \(0 \(1\)\)"),
    ):
        with pytest.raises(InvalidRequestError, match=f"could mean class {meant}: give the index") as refused:
            prepare({"class_label": wanted}, known)
        assert refused.value.field == "class_label"
    for given, index in ((0, 0), ("crane (2)", 2), ("0 (1)", 1), ("2", 2)):
        made = prepare({"class_label": given}, known)
        assert made.spec.stages[0].chains[0].label == index
        assert known.label(made.parameters["class_label"]) == index


@pytest.mark.parametrize(("wanted", "label"), [(0, 0), (999, 999), (" 12 ", 12), (MAX_NUMBER, MAX_NUMBER)])
def test_a_conditional_model_without_classes_takes_a_number(wanted: int | str, label: int) -> None:
    known = structs.replace(capabilities(), class_names=(), guided=False)
    made = prepare({"class_label": wanted}, known)
    assert made.spec.stages[0].chains[0].label == label
    assert made.parameters["class_label"] == label


def test_timesteps_that_the_network_has_no_value_at_are_refused() -> None:
    known = structs.replace(capabilities(), lowest_timestep=1)
    trailing = {"timestep_spacing": "trailing", "num_inference_steps": 50}
    assert min(prepare(trailing, known).spec.stages[0].chains[0].plan.timesteps) == 1
    for request in (trailing | {"timestep_spacing": "leading"}, trailing | {"num_inference_steps": 100}):
        with pytest.raises(InvalidRequestError, match="no value below timestep 1") as refused:
            prepare(request, known)
        assert refused.value.field == "timestep_spacing"
        prepare(request)


@pytest.mark.parametrize("wanted", [-1, MAX_NUMBER + 1, 10**400, "cow", "", "²", "1.5", "9" * 5000])
def test_and_nothing_else(wanted: int | str) -> None:
    known = structs.replace(capabilities(), class_names=(), guided=False)
    with pytest.raises(InvalidRequestError, match="a number from 0 to 2147483647") as refused:
        prepare({"class_label": wanted}, known)
    assert refused.value.field == "class_label"
    with pytest.raises(InvalidRequestError, match="a class is needed"):
        prepare({}, known)


def test_an_unconditional_model_has_no_classes() -> None:
    known = capabilities(tiny_model(guided=False, classes=0))
    with pytest.raises(InvalidRequestError, match="unconditional"):
        prepare({"class_label": 0}, known)
    assert prepare({}, known).parameters["class_label"] is None


# ── Guidance ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "scale", "evaluations"),
    [
        ({}, 1.0, 1),
        ({"class_label": "cat"}, 2.0, 2),
        ({"class_label": "cat", "guidance_scale": 1.0}, 1.0, 1),
        ({"class_label": "cat", "guidance_scale": 0.0}, 0.0, 2),
        ({"class_label": "cat", "guidance_scale": 7.5}, 7.5, 2),
        ({"guidance_scale": 1.0}, 1.0, 1),
    ],
)
def test_guidance_of_a_guided_model(request_: dict[str, Any], scale: float, evaluations: int) -> None:
    made = prepare({**EVERYWHERE, **request_})
    assert made.parameters["guidance_scale"] == scale
    assert set(made.spec.stages[0].chains[0].plan.evaluations) == {evaluations}


def test_guidance_keeps_to_the_middle_noise_levels_by_default() -> None:
    plan = prepare({"class_label": "cat"}).spec.stages[0].chains[0].plan
    sigma = np.sqrt(1 / tiny_model().schedule.alphas_cumprod[list(plan.timesteps)] - 1)
    assert plan.evaluations == tuple(np.where((sigma >= 0.3) & (sigma <= 5), 2, 1))
    assert set(plan.evaluations) == {1, 2}


def test_guidance_needs_a_class() -> None:
    with pytest.raises(InvalidRequestError, match="class_label") as refused:
        prepare({"guidance_scale": 2.0})
    assert refused.value.field == "guidance_scale"


def test_guidance_needs_a_null_class() -> None:
    known = capabilities(tiny_model(guided=False))
    assert prepare({"class_label": 0}, known).parameters["guidance_scale"] == 1.0
    with pytest.raises(InvalidRequestError, match="null class"):
        prepare({"class_label": 0, "guidance_scale": 2.0}, known)
    with pytest.raises(InvalidRequestError, match="a class is needed"):
        prepare({}, known)


def classified(**values: Any) -> ModelCapabilities:
    """What can be asked of a model with a classifier."""
    return capabilities(replace(tiny_model(), classifier=tiny_classifier()), **values)


def test_guidance_by_a_classifier_is_a_column_of_the_plan() -> None:
    made = prepare({"class_label": "cat", "classifier_scale": 3.0, **EVERYWHERE}, classified())
    plan = made.spec.stages[0].chains[0].plan
    assert (plan.table["a_g"] > 0).all()
    assert set(plan.evaluations) == {1}, "it does not need the unconditional branch"
    assert (made.parameters["classifier_scale"], made.parameters["guidance_scale"]) == (3.0, 1.0)
    asked = {"class_label": "cat", "classifier_scale": 3.0, "guidance_scale": 2.0, **EVERYWHERE}
    both = prepare(asked, classified())
    assert set(both.spec.stages[0].chains[0].plan.evaluations) == {2}
    without = prepare({"class_label": "cat"}, classified()).spec.stages[0].chains[0].plan
    assert not without.table["a_g"].any()


def test_guidance_may_keep_to_an_interval_of_noise_levels() -> None:
    asked = {"class_label": 0, "guidance_scale": 3.0, "guidance_sigma_min": 0.2, "guidance_sigma_max": 1.0}
    made = prepare(asked)
    plan = made.spec.stages[0].chains[0].plan
    sigma = np.sqrt(1 / tiny_model().schedule.alphas_cumprod[list(plan.timesteps)] - 1)
    assert plan.evaluations == tuple(np.where((sigma >= 0.2) & (sigma <= 1.0), 2, 1))
    assert 1 < plan.evaluations.count(2) < 50
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
        prepare(request_, classified() if known else None)
    assert refused.value.field == field


def test_the_spacing_chooses_the_timesteps() -> None:
    made = {
        kind: prepare({"timestep_spacing": kind, "num_inference_steps": 4})
        for kind in ("leading", "linspace")
    }
    assert made["leading"].spec.stages[0].chains[0].plan.timesteps == (75, 50, 25, 0)
    assert made["linspace"].spec.stages[0].chains[0].plan.timesteps == (99, 66, 33, 0)
    assert made["leading"].parameters["timestep_spacing"] == "leading"
    assert prepare({}).parameters["timestep_spacing"] == "trailing", "the model's own"


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
        prepare(request_)
    assert refused.value.field == field


def test_enlarged_pictures_have_a_limit_together() -> None:
    known = capabilities()
    large = structs.replace(known, shape=(3, 256, 256))
    assert prepare({"n": 4, "scale": 8}, large).scale == 8
    assert prepare({"n": 64}, large).scale == 1  # as they are, there is no such limit
    with pytest.raises(InvalidRequestError, match="16777216 pixels") as refused:
        prepare({"n": 5, "scale": 8}, large)
    assert refused.value.field == "scale"


def test_the_defaults_are_reported() -> None:
    made = prepare({})
    assert made.parameters == {
        "n": 1,
        "seed": made.spec.stages[0].chains[0].seed,
        "sampler": "dpmpp_2m",
        "num_inference_steps": 20,
        "eta": 0.0,
        "guidance_scale": 1.0,
        "guidance_rescale": 0.0,
        "guidance_sigma_min": 0.3,
        "guidance_sigma_max": 5.0,
        "classifier_scale": 0.0,
        "timestep_spacing": "trailing",
        "class_label": None,
        "output_format": "png",
        "scale": 1,
    }
    assert prepare({}).parameters["seed"] != made.parameters["seed"]


@pytest.mark.parametrize(
    ("scheduler", "sampler", "steps"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim", 50),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "ddpm", 50),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "sde_dpmpp_2m",
            20,
        ),
    ],
)
def test_the_sampler_is_the_nearest_to_the_models_scheduler(
    scheduler: dict[str, Any], sampler: str, steps: int
) -> None:
    known = capabilities(replace(tiny_model(), scheduler_config=scheduler))
    assert prepare({}, known).parameters.items() >= {"sampler": sampler, "num_inference_steps": steps}.items()
    assert prepare({}, known).spec.sampler == sampler
    assert prepare({"sampler": "dpmpp_2m"}, known).parameters["sampler"] == "dpmpp_2m"
    defaults = describe(known, settings(), fake_info())["defaults"]
    assert defaults.items() >= {"sampler": sampler, "num_inference_steps": steps}.items()


@pytest.mark.parametrize(("sampler", "steps"), DEFAULT_STEPS.items())
def test_every_sampler_has_steps_of_its_own(sampler: str, steps: int) -> None:
    assert prepare({"sampler": sampler}).parameters["num_inference_steps"] == steps


def test_guidance_within_an_interval_costs_less() -> None:
    asked = {"class_label": "cat", "guidance_sigma_min": 0.5, "guidance_sigma_max": 4.0}
    (chain,) = prepare(asked).spec.stages[0].chains
    assert set(chain.plan.evaluations) == {1, 2}
    assert prepare(asked).parameters["guidance_sigma_max"] == 4.0
    with pytest.raises(InvalidRequestError, match="greater than") as refused:
        prepare({**asked, "guidance_sigma_max": 0.5})
    assert refused.value.field == "guidance_sigma_max"


def test_a_classifier_that_is_not_there_cannot_guide() -> None:
    with pytest.raises(InvalidRequestError, match="no classifier") as refused:
        prepare({"class_label": "cat", "classifier_scale": 1.0})
    assert refused.value.field == "classifier_scale"


def test_the_spacing_of_timesteps_can_be_chosen() -> None:
    plans = [prepare({"timestep_spacing": spacing}).spec.stages[0].chains[0].plan for spacing in SPACINGS]
    assert len({plan.timesteps for plan in plans}) == len(SPACINGS)


@pytest.mark.parametrize(("wanted", "allowed"), [(None, 60.0), (5.0, 5.0), (1000.0, 60.0)])
def test_the_deadline_is_the_clients_or_the_services(wanted: float | None, allowed: float) -> None:
    spec = prepare({"deadline_s": wanted}, capabilities(deadline_s=60.0)).spec
    assert spec.deadline is not None
    assert spec.deadline - spec.created == pytest.approx(allowed)


def test_previews_are_those_that_are_asked_for() -> None:
    spec = prepare({}).spec
    assert (spec.preview, spec.preview_every) == ("x0", None)
    assert prepare({"preview_every": 7}).spec.preview_every == 7
    assert prepare({"preview": "both"}).spec.preview == "both"


@pytest.mark.parametrize(
    ("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.3), ("ddim", 1.0)]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 99, 100])
def test_whatever_can_be_asked_for_has_a_plan(sampler: str, steps: int, eta: float) -> None:
    made = prepare({"sampler": sampler, "num_inference_steps": steps, "eta": eta})
    plan = made.spec.stages[0].chains[0].plan
    assert len(plan) == steps
    assert all(np.isfinite(plan.table[name]).all() for name in COLUMNS)


# ── Guidance that a model comes with ───────────────────────────────────────────────────────────


def test_a_model_says_what_it_is_guided_by() -> None:
    known = capabilities()
    schedule = replace(known.schedule, guidance_scale=1.5, guidance_rescale=0.7)
    own = structs.replace(known, schedule=schedule)
    named = ("guidance_scale", "guidance_rescale")

    def guided(**fields: Any) -> list[float]:
        parameters = prepare({"class_label": "dog", **fields}, own).parameters
        return [parameters[name] for name in named]

    assert guided() == [1.5, 0.7]
    assert guided(guidance_scale=3.0) == [3.0, 0.7]
    assert guided(guidance_rescale=0.0) == [1.5, 0.0]
    assert guided(class_label=None) == [1.0, 0.0]
    plan = prepare({"class_label": "dog"}, own).spec.stages[0].chains[0].plan
    inside = plan.table["w"] != 1
    assert set(plan.table["w"][inside]) == {1.5}
    assert set(plan.table["r"][inside]) == {0.7}
    assert not plan.table["r"][~inside].any()
    assert prepare({"class_label": "dog"}).parameters["guidance_rescale"] == 0.0
