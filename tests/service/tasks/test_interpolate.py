"""Paths from one image to another: what is refused, and the stages that come of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from model.chain import InitialLatent, SphericalMix
from model.samplers import build_inversion
from service.errors import InvalidRequestError
from service.tasks.interpolate import InterpolateRequest, prepare_interpolation
from service.tasks.sampling import MAX_SEED, ModelCapabilities, PreparedRequest
from tests.service.fakes import tiny_model
from tests.service.tasks.test_edit import IMAGE, RIGHT, SECOND, A, B, chains, editing
from tests.service.tasks.test_sampling import capabilities


def path(known: ModelCapabilities | None = None, **fields: Any) -> PreparedRequest:
    if "seeds" not in fields:
        fields = {"images": (IMAGE, SECOND), **fields}
    return prepare_interpolation(InterpolateRequest(**fields), known or capabilities())


def weights(start: InitialLatent | None) -> tuple[list[float], list[float]]:
    assert start is not None
    return [weight for weight, _ in start.images], [weight for weight, _ in start.noises]


def test_the_stochastic_path_is_the_papers() -> None:
    made = path(points=5, seed=40, strength=0.5, num_inference_steps=10)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert made.per_image == tuple({"lambda": share} for share in shares)
    assert made.columns == 5
    alpha = chains(made)[0].plan.start
    noise_share = math.sqrt(1 - alpha**2)
    for share, chain in zip(shares, chains(made), strict=True):
        assert (chain.seed, len(chain.plan)) == (40, 5)  # the same noise in every step
        kept = [weight for weight in (1 - share, share) if weight]
        of_images, of_noises = weights(chain.start)
        assert of_images == pytest.approx([weight * alpha for weight in kept])
        assert of_noises == pytest.approx([weight * noise_share for weight in kept])
        assert chain.start is not None
        assert {seed for _, seed in chain.start.noises} <= {40, 41}
    middle = chains(made)[2].start
    assert middle is not None
    np.testing.assert_array_equal(middle.images[0][1], A)
    np.testing.assert_array_equal(middle.images[1][1], B)
    assert [seed for _, seed in middle.noises] == [40, 41]


def test_between_seeds_the_noise_keeps_its_variance() -> None:
    made = path(seeds=(7, 3), points=4, sampler="dpmpp_2m", num_inference_steps=6, class_label="cat")
    for i, chain in enumerate(chains(made)):
        assert len(chain.plan) == 6
        assert chain.start is not None
        assert not chain.start.images
        assert sum(weight**2 for weight, _ in chain.start.noises) == pytest.approx(1.0)
        assert [seed for _, seed in chain.start.noises] == [[7], [7, 3], [7, 3], [3]][i]
    assert made.parameters.items() >= {"points": 4, "sampler": "dpmpp_2m", "guidance_scale": 2.0}.items()
    assert made.parameters["seeds"] == [7, 3]


def test_an_inversion_is_a_stage_up_and_a_stage_down() -> None:
    made = path(method="inversion", points=3, num_inference_steps=10, class_label="dog")
    inverted, denoised = made.spec.stages
    assert (inverted.kind, denoised.kind) == ("invert", "denoise")
    up = build_inversion(capabilities().schedule, 10)
    for chain, image in zip(inverted.chains, (A, B), strict=True):
        np.testing.assert_array_equal(chain.plan.table, up.table)
        assert chain.start is not None
        np.testing.assert_array_equal(chain.start.images[0][1], image)
        assert (weights(chain.start), chain.label) == (([1.0], []), 1)
    assert made.parameters.items() >= {"method": "inversion", "guidance_scale": 1.0}.items()
    for chain, share in zip(denoised.chains, (0.0, 0.5, 1.0), strict=True):
        assert (len(chain.plan), chain.label) == (10, 1)
        assert np.isinf(chain.plan.table["clip"]).all()
        assert chain.start is not None
        assert (weights(chain.start), chain.start.carried) == (([], []), SphericalMix(0, 1, share))


def test_defaults_of_a_path_are_reported() -> None:
    info = editing(capabilities())["interpolation"]
    made = path()
    assert made.parameters.items() >= {
        "method": "stochastic", "points": info["points"], "strength": info["strength"], "sampler": "ddim",
    }.items()  # fmt: skip
    assert "n" not in made.parameters
    inverted = path(method="inversion").parameters
    assert inverted["num_inference_steps"] == info["inversion_steps"] == 100
    few = capabilities(max_images=4)
    assert path(few).parameters["points"] == editing(few)["interpolation"]["points"] == 4


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
def test_impossible_paths_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        path(**fields)
    assert refused.value.field == field


def test_a_path_needs_room_for_two_images() -> None:
    with pytest.raises(InvalidRequestError, match="At most 1"):
        path(capabilities(max_images=1))


def test_a_model_without_a_null_class_needs_one_for_an_inversion_too() -> None:
    known = capabilities(tiny_model(guided=False))
    with pytest.raises(InvalidRequestError, match="a class is needed"):
        path(known, **INVERTED)
    assert path(known, class_label=1, **INVERTED).spec.stages[0].chains[0].label == 1
