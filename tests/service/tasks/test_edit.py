"""Requests that start from a picture: what is refused, and the chains that come of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image
from pydantic import ValidationError

from model.chain import Chain, from_pixels
from model.condition import Part
from model.samplers import build_repaint
from service.errors import InvalidRequestError
from service.http.info import describe
from service.tasks.edit import MAX_STEPS, EditRequest, prepare_edit
from service.tasks.generate import GenerateRequest, prepare_generate
from service.tasks.interpolate import InterpolateRequest, prepare_interpolation
from service.tasks.sampling import MAX_SEED, ModelCapabilities, PreparedRequest
from service.tasks.score import ScoreRequest, prepare_score
from tests.service.fakes import EVERYWHERE, SIZE, fake_info, tiny_model
from tests.service.live import settings
from tests.service.tasks.test_sampling import capabilities
from tests.service.tasks.test_uploads import file, halves, noise

PIXELS, OTHER = noise(SIZE, SIZE), 255 - noise(SIZE, SIZE)
IMAGE, SECOND = file(Image.fromarray(PIXELS)), file(Image.fromarray(OTHER))
RIGHT = file(halves(SIZE))
A, B = (from_pixels(pixels[..., None]) for pixels in (PIXELS, OTHER))


def edit(known: ModelCapabilities | None = None, **fields: Any) -> PreparedRequest:
    request = EditRequest(**{"image": IMAGE, **fields})
    return prepare_edit(request, known or capabilities())


def chains(prepared: PreparedRequest) -> tuple[Chain, ...]:
    (stage,) = prepared.spec.stages
    return stage.chains


def editing(known: ModelCapabilities) -> Any:
    """What `/info` says about editing."""
    return describe(known, settings(), fake_info())["editing"]


def test_an_edit_starts_from_the_picture_under_noise() -> None:
    made = edit(strength=0.4, n=3, seed=40, num_inference_steps=10)
    assert [chain.seed for chain in chains(made)] == [40, 41, 42]
    for chain in chains(made):
        assert len(chain.plan) == 4
        assert chain.known is None
        assert chain.start is not None
        ((share, image),), ((noise_share, seed),) = chain.start.images, chain.start.noises
        np.testing.assert_array_equal(image, A)
        assert seed == chain.seed
        assert share**2 + noise_share**2 == pytest.approx(1)
        ac = capabilities().schedule.alphas_cumprod[chain.plan.timesteps[0]]
        assert share == pytest.approx(math.sqrt(ac))


def test_a_picture_is_in_the_models_data_range() -> None:
    model = tiny_model()
    known = capabilities(replace(model, schedule=replace(model.schedule, data_range=(0.0, 1.0))))
    ((start,), (masked,)) = chains(edit(known)), chains(edit(known, mask=RIGHT))
    assert start.start is not None
    assert masked.known is not None
    for image in (start.start.images[0][1], masked.known.image):
        np.testing.assert_allclose(image[0], PIXELS / 255, atol=1e-6)


def test_a_mask_alone_is_inpainted_by_repaint() -> None:
    made = edit(mask=RIGHT, n=2, seed=4, num_inference_steps=20, class_label="dog", **EVERYWHERE)
    jumps = {"jump_length": 10, "jump_n_sample": 5}
    plan = build_repaint(capabilities().schedule, "ddpm", 20, **jumps)  # type: ignore[arg-type]
    for chain in chains(made):
        assert chain.plan.timesteps == plan.timesteps
        assert set(chain.plan.evaluations) == {2}  # guided
        assert (chain.start, chain.label) == (None, 1)
        assert chain.known is not None
        np.testing.assert_array_equal(chain.known.image, A)
        np.testing.assert_array_equal(chain.known.mask[0], np.arange(SIZE) < np.full((SIZE, 1), SIZE // 2))
    assert made.parameters.items() >= {"sampler": "ddpm", "masked": True, **jumps}.items()
    assert "strength" not in made.parameters


def test_a_mask_with_strength_starts_from_the_picture() -> None:
    made = edit(mask=RIGHT, strength=0.5, num_inference_steps=20, sampler="dpmpp_2m")
    (chain,) = chains(made)
    assert len(chain.plan) == 10
    assert chain.known is not None
    assert chain.start is not None
    assert len(chain.start.images) == 1
    assert chain.plan.table["k_0"][-1] == 1.0  # known pixels are restored unchanged
    assert "jump_length" not in made.parameters


def test_defaults_are_reported() -> None:
    assert edit(seed=1).parameters.items() >= {
        "n": 1, "masked": False, "strength": 0.6, "sampler": "ddim", "num_inference_steps": 50,
    }.items()  # fmt: skip
    info = editing(capabilities())["inpainting"]
    inpainting = edit(mask=RIGHT)
    assert edit(mask=RIGHT, strength=0.5).parameters["sampler"] == "ddpm"
    assert {name: inpainting.parameters[name] for name in ("jump_length", "jump_n_sample")} == {
        name: info[name] for name in ("jump_length", "jump_n_sample")
    }
    assert inpainting.spec.evaluations < 6 * edit(strength=1.0).spec.evaluations


def test_previews_are_those_that_are_asked_for() -> None:
    assert edit(mask=RIGHT).spec.preview_every is None
    assert edit(strength=0.5, preview_every=7, preview="both").spec.preview_every == 7


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"strength": 0}, "strength"),
        ({"strength": 1.01}, "strength"),
        ({"strength": True}, "strength"),
        ({"jump_length": 0}, "jump_length"),
        ({"jump_n_sample": 0}, "jump_n_sample"),
        ({"sampler": "euler"}, "sampler"),
        ({"n": 0}, "n"),
        ({"image": 7}, "image"),
        ({"image": None}, "image"),
        ({"mask": ["x"]}, "mask"),
        ({"points": 3}, "points"),
    ],
)
def test_a_bad_value_is_refused_by_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        EditRequest(**{"image": IMAGE, **fields})
    assert {found["loc"][0] for found in refused.value.errors()} == {field}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 65}, "n"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"class_label": "cow"}, "class_label"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"jump_length": 5}, "jump_length"),
        ({"jump_n_sample": 5}, "jump_n_sample"),
        ({"mask": RIGHT, "strength": 0.5, "jump_length": 5}, "jump_length"),
        ({"mask": RIGHT, "sampler": "dpmpp_2m"}, "sampler"),
        ({"mask": RIGHT, "sampler": "sde_dpmpp_2m"}, "sampler"),
        ({"mask": RIGHT, "eta": 0.5}, "eta"),
        ({"mask": RIGHT, "jump_n_sample": 10**30}, "jump_n_sample"),
        ({"mask": RIGHT, "num_inference_steps": 100, "jump_n_sample": 112}, "jump_n_sample"),
        ({"mask": file(halves(2 * SIZE))}, "mask"),
        ({"mask": file(halves(SIZE, right=0))}, "mask"),
        ({"mask": b"GIF89a"}, "mask"),
        ({"mask": "no base64"}, "mask"),
        ({"image": b"GIF89a"}, "image"),
        ({"image": "no base64"}, "image"),
    ],
)
def test_impossible_edits_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        edit(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "fields", [{"sampler": "ddim", "eta": 1.0}, {"jump_n_sample": 111}, {"jump_length": 10**30}]
)
def test_edits_at_the_limits_are_accepted(fields: dict[str, Any]) -> None:
    made = edit(mask=RIGHT, num_inference_steps=100, **fields)
    assert len(chains(made)[0].plan) <= MAX_STEPS


# ── Networks that take the picture beside x ────────────────────────────────────────────────────


def test_a_network_for_pictures_from_pictures_is_given_the_picture() -> None:
    known = structs.replace(capabilities(), condition=("image",))
    made = edit(known, n=2, seed=4)
    for chain, seed in zip(chains(made), (4, 5), strict=True):
        assert (chain.seed, chain.start, chain.known) == (seed, None, None)
        assert chain.condition is not None
        np.testing.assert_array_equal(chain.condition, A)
        assert len(chain.plan) == 20
    assert made.parameters["sampler"] == "dpmpp_2m"
    assert describe(known, settings(), fake_info())["model"]["condition"] == ["image"]


def test_a_network_that_fills_holes_keeps_the_rest_exactly() -> None:
    known = structs.replace(capabilities(), condition=("mask", "masked_image"))
    (chain,) = chains(edit(known, mask=RIGHT))
    assert chain.condition is not None
    assert chain.known is not None
    mask, masked = chain.condition
    np.testing.assert_array_equal(mask, ~chain.known.mask[0])
    np.testing.assert_array_equal(masked, np.where(chain.known.mask[0], A[0], 0))


@pytest.mark.parametrize(
    ("condition", "fields", "field"),
    [
        (("image",), {"mask": RIGHT}, "mask"),
        (("image",), {"strength": 0.5}, "strength"),
        (("image",), {"jump_length": 2}, "jump_length"),
        (("masked_image",), {}, "mask"),
    ],
)
def test_what_such_a_network_does_not_do_is_refused(
    condition: tuple[Part, ...], fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        edit(structs.replace(capabilities(), condition=condition), **fields)
    assert refused.value.field == field


def test_without_a_picture_such_a_network_makes_nothing() -> None:
    known = structs.replace(capabilities(), condition=("image",))
    for prepare in (
        lambda: prepare_generate(GenerateRequest(), known),
        lambda: prepare_score(ScoreRequest(images=[IMAGE]), known),
        lambda: prepare_interpolation(InterpolateRequest(seeds=(1, 2)), known),
    ):
        with pytest.raises(InvalidRequestError, match="/edit"):
            prepare()


@pytest.mark.parametrize("fields", [{}, {"mask": RIGHT}, {"mask": RIGHT, "strength": 0.5}])
def test_a_list_has_a_class_and_a_seed_for_each_image(fields: dict[str, Any]) -> None:
    known = capabilities()
    made = edit(known, class_label=["dog", None, "dog"], seed=[7, 7, 9], **fields)
    for chain, label, seed in zip(chains(made), ["dog", None, "dog"], [7, 7, 9], strict=True):
        (alone,) = chains(edit(known, class_label=label, seed=seed, **fields))
        assert (chain.seed, chain.label) == (alone.seed, alone.label)
        assert chain.plan.table.tobytes() == alone.plan.table.tobytes()
        assert (chain.start and chain.start.noises) == (alone.start and alone.start.noises)
    assert made.parameters["n"] == 3
    assert made.per_image[1]["guidance_scale"] == 1.0
