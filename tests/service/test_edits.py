"""Requests that begin with pictures: what they may say, and the chains they become."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from service.edits import MAX_ROWS, EditRequest, InterpolateRequest, editing, to_edit, to_interpolation
from service.events import Picture
from service.jobs import Job
from service.schemas import MAX_SEED, Catalogue, Order

from model.denoiser import Chain, Mix, from_pixels
from model.samplers import K_0, build_inversion, build_repaint
from service.errors import InvalidRequestError
from tests.service.fakes import EVERYWHERE, SIZE, tiny_model
from tests.service.test_schemas import catalogue
from tests.service.test_uploads import file, halves, noise

PIXELS, OTHER = noise(SIZE, SIZE), 255 - noise(SIZE, SIZE)
IMAGE, SECOND = file(Image.fromarray(PIXELS)), file(Image.fromarray(OTHER))
RIGHT = file(halves(SIZE))
A, B = (from_pixels(pixels[..., None]) for pixels in (PIXELS, OTHER))


def edit(known: Catalogue | None = None, streamed: bool = False, **fields: Any) -> Order:
    request = EditRequest(**{"image": IMAGE, **fields})
    return to_edit(request, known or catalogue(), streamed=streamed)


def way(known: Catalogue | None = None, streamed: bool = False, **fields: Any) -> Order:
    if "seeds" not in fields:
        fields = {"images": (IMAGE, SECOND), **fields}
    return to_interpolation(InterpolateRequest(**fields), known or catalogue(), streamed=streamed)


def chains(job: Job) -> list[Chain]:
    return [sample.chain for sample in job.samples]  # type: ignore[misc]  # jobs.py knows a protocol only


def weights(start: Mix | None) -> tuple[list[float], list[float]]:
    assert start is not None
    return [weight for weight, _ in start.images], [weight for weight, _ in start.noises]


# ── Edits ──────────────────────────────────────────────────────────────────────────────────────


def test_an_edit_begins_with_the_picture_under_noise() -> None:
    made = edit(strength=0.4, n=3, seed=40, num_inference_steps=10)
    assert [chain.seed for chain in chains(made.job)] == [40, 41, 42]
    for chain in chains(made.job):
        assert len(chain.plan) == 4
        assert chain.known is None
        assert chain.start is not None
        ((share, image),), ((spread, seed),) = chain.start.images, chain.start.noises
        np.testing.assert_array_equal(image, A)
        assert seed == chain.seed
        assert share**2 + spread**2 == pytest.approx(1)
        ac = catalogue().schedule.alphas_cumprod[chain.plan.timesteps[0]]
        assert share == pytest.approx(math.sqrt(ac))


def test_a_mask_alone_is_inpainted_by_repaint() -> None:
    made = edit(mask=RIGHT, n=2, seed=4, num_inference_steps=20, class_label="dog", **EVERYWHERE)
    jumps = {"jump_length": 10, "jump_n_sample": 5}
    plan = build_repaint(catalogue().schedule, "ddpm", 20, **jumps)  # type: ignore[arg-type]
    for chain in chains(made.job):
        assert chain.plan.timesteps == plan.timesteps
        assert set(chain.plan.rows) == {2}  # guided
        assert (chain.start, chain.label) == (None, 1)
        assert chain.known is not None
        np.testing.assert_array_equal(chain.known.image, A)
        np.testing.assert_array_equal(chain.known.mask[0], np.arange(SIZE) < np.full((SIZE, 1), SIZE // 2))
    assert made.parameters.items() >= {"sampler": "ddpm", "masked": True, **jumps}.items()
    assert "strength" not in made.parameters


def test_a_mask_with_strength_begins_with_what_is_there() -> None:
    made = edit(mask=RIGHT, strength=0.5, num_inference_steps=20, sampler="dpmpp_2m")
    (chain,) = chains(made.job)
    assert len(chain.plan) == 10
    assert chain.known is not None
    assert chain.start is not None
    assert len(chain.start.images) == 1
    assert chain.plan.table[-1, K_0] == 1.0  # what is known is put back as it is
    assert "jump_length" not in made.parameters


def test_what_is_left_out_is_told() -> None:
    assert edit(seed=1).parameters.items() >= {
        "n": 1, "masked": False, "strength": 0.6, "sampler": "ddim", "num_inference_steps": 50,
    }.items()  # fmt: skip
    facts = editing(catalogue())["inpainting"]
    inpainting = edit(mask=RIGHT)
    assert edit(mask=RIGHT, strength=0.5).parameters["sampler"] == "ddpm"
    assert {name: inpainting.parameters[name] for name in ("jump_length", "jump_n_sample")} == {
        name: facts[name] for name in ("jump_length", "jump_n_sample")
    }
    assert inpainting.job.remaining < 6 * edit(strength=1.0).job.remaining


def test_previews_follow_the_length_of_the_chain() -> None:
    assert edit(streamed=True, mask=RIGHT).job.preview_every == 210 // 25
    assert edit(streamed=True, strength=0.5).job.preview_every == 1
    assert edit(streamed=True, strength=0.5, preview_every=7, preview="both").job.preview_every == 7


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
def test_what_cannot_be(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        edit(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "fields", [{"sampler": "ddim", "eta": 1.0}, {"jump_n_sample": 111}, {"jump_length": 10**30}]
)
def test_what_can_just_be(fields: dict[str, Any]) -> None:
    made = edit(mask=RIGHT, num_inference_steps=100, **fields)
    assert len(chains(made.job)[0].plan) <= MAX_ROWS


# ── Ways ───────────────────────────────────────────────────────────────────────────────────────


def test_the_stochastic_way_is_the_papers() -> None:
    made = way(points=5, seed=40, strength=0.5, num_inference_steps=10)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert made.marks == tuple({"lambda": share} for share in shares)
    assert made.columns == 5
    alpha = chains(made.job)[0].plan.start
    spread = math.sqrt(1 - alpha**2)
    for share, chain in zip(shares, chains(made.job), strict=True):
        assert (chain.seed, len(chain.plan)) == (40, 5)  # the same noise in every step
        kept = [weight for weight in (1 - share, share) if weight]
        of_images, of_noises = weights(chain.start)
        assert of_images == pytest.approx([weight * alpha for weight in kept])
        assert of_noises == pytest.approx([weight * spread for weight in kept])
        assert chain.start is not None
        assert {seed for _, seed in chain.start.noises} <= {40, 41}
    middle = chains(made.job)[2].start
    assert middle is not None
    np.testing.assert_array_equal(middle.images[0][1], A)
    np.testing.assert_array_equal(middle.images[1][1], B)
    assert [seed for _, seed in middle.noises] == [40, 41]


def test_between_seeds_the_noise_keeps_its_variance() -> None:
    made = way(seeds=(7, 3), points=4, sampler="dpmpp_2m", num_inference_steps=6, class_label="cat")
    for i, chain in enumerate(chains(made.job)):
        assert len(chain.plan) == 6
        assert chain.start is not None
        assert not chain.start.images
        assert sum(weight**2 for weight, _ in chain.start.noises) == pytest.approx(1.0)
        assert [seed for _, seed in chain.start.noises] == [[7], [7, 3], [7, 3], [3]][i]
    assert made.parameters.items() >= {"points": 4, "sampler": "dpmpp_2m", "guidance_scale": 2.0}.items()
    assert made.parameters["seeds"] == [7, 3]


def test_an_inversion_goes_up_and_comes_down() -> None:
    made = way(method="inversion", points=3, num_inference_steps=10, class_label="dog")
    up = build_inversion(catalogue().schedule, 10)
    for chain, image in zip(chains(made.job), (A, B), strict=True):
        np.testing.assert_array_equal(chain.plan.table, up.table)
        assert chain.start is not None
        np.testing.assert_array_equal(chain.start.images[0][1], image)
        assert (weights(chain.start), chain.label) == (([1.0], []), 1)
    assert made.job.preview == "none"
    assert made.parameters.items() >= {"method": "inversion", "guidance_scale": 1.0}.items()

    first, second = (noise(1, SIZE, SIZE).astype(np.float32) + offset for offset in (0, 1))
    first[0, 0] *= -1
    pictures = [Picture(i, 0, "xt", PIXELS, latent=latent) for i, latent in enumerate((first, second))]
    made.job.started = 0.0
    last = made.job.go_on(pictures)
    assert (last.id, last.deadline, last.created) == (made.job.id, made.job.deadline, made.job.created)
    down = chains(last)
    assert [(len(chain.plan), chain.plan.clip) for chain in down] == [(10, math.inf)] * 3
    assert [chain.label for chain in down] == [1] * 3
    for chain, end in ((down[0], first), (down[2], second)):
        assert chain.start is not None
        assert weights(chain.start) == ([1.0], [])
        assert chain.start.images[0][1] is end
    middle = weights(down[1].start)[0]
    cosine = float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))
    assert middle == pytest.approx([1 / (2 * math.cos(math.acos(cosine) / 2))] * 2)


def test_what_is_left_out_of_a_way_is_told() -> None:
    facts = editing(catalogue())["interpolation"]
    made = way()
    assert made.parameters.items() >= {
        "method": "stochastic", "points": facts["points"], "strength": facts["strength"], "sampler": "ddim",
    }.items()  # fmt: skip
    assert "n" not in made.parameters
    inverted = way(method="inversion").parameters
    assert inverted["num_inference_steps"] == facts["inversion_steps"] == 100
    few = catalogue(max_images=4)
    assert way(few).parameters["points"] == editing(few)["interpolation"]["points"] == 4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"points": 1}, "points"),
        ({"points": True}, "points"),
        ({"images": [IMAGE]}, "images"),
        ({"images": (IMAGE, SECOND, IMAGE)}, "images"),
        ({"seeds": (1, -2)}, "seeds"),
        ({"seeds": (1, MAX_SEED + 1)}, "seeds"),
        ({"method": "linear"}, "method"),
        ({"n": 3}, "n"),
        ({"mask": RIGHT}, "mask"),
    ],
)
def test_a_bad_value_of_a_way_is_refused_by_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        InterpolateRequest(**fields)
    assert {found["loc"][0] for found in refused.value.errors()} == {field}


INVERTED: dict[str, Any] = {"method": "inversion"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"images": None}, "images"),
        ({"seeds": (1, 2), "images": (IMAGE, SECOND)}, "images"),
        ({"images": (IMAGE, b"GIF89a")}, "images"),
        ({"images": ("no base64", IMAGE)}, "images"),
        ({"points": 65}, "points"),
        ({"points": 10**30}, "points"),
        ({"seed": MAX_SEED}, "seed"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": (1, 2), "seed": 3}, "seed"),
        ({"seeds": (1, 2), "strength": 0.5}, "strength"),
        ({"seeds": (1, 2), "method": "inversion"}, "method"),
        ({"seeds": (1, 2), "sampler": "ddpm"}, "sampler"),
        ({"seeds": (1, 2), "eta": 0.1}, "eta"),
        ({**INVERTED, "sampler": "dpmpp_2m"}, "sampler"),
        ({**INVERTED, "eta": 0.1}, "eta"),
        ({**INVERTED, "strength": 0.5}, "strength"),
        ({**INVERTED, "class_label": 0, "guidance_scale": 2.0}, "guidance_scale"),
        ({**INVERTED, "classifier_scale": 1.0}, "classifier_scale"),
        ({**INVERTED, "num_inference_steps": 1}, "num_inference_steps"),
    ],
)
def test_a_way_that_cannot_be(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        way(**fields)
    assert refused.value.field == field


def test_no_way_where_only_one_image_is_allowed() -> None:
    with pytest.raises(InvalidRequestError, match="At most 1"):
        way(catalogue(max_images=1))


def test_a_model_without_a_null_class_needs_one_for_an_inversion_too() -> None:
    known = catalogue(tiny_model(guided=False))
    with pytest.raises(InvalidRequestError, match="name a class"):
        way(known, **INVERTED)
    assert chains(way(known, class_label=1, **INVERTED).job)[0].label == 1
