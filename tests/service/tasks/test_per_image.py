"""A class or a seed for each image, as lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.errors import InvalidRequestError
from service.tasks.generate import StreamQuery
from service.tasks.per_image import MAX_SEED
from tests.service.fakes import tiny_classifier, tiny_model
from tests.service.tasks.test_sampling import capabilities, prepare


def test_a_list_has_a_class_for_each_image() -> None:
    made = prepare({"class_label": ["dog", 0, 1], "seed": 5})
    chains = made.spec.stages[0].chains
    assert [(chain.seed, chain.label) for chain in chains] == [(5, 1), (6, 0), (7, 1)]
    assert made.parameters["class_label"] == ["dog", "cat", "dog"]
    assert (made.parameters["n"], made.parameters["seed"]) == (3, 5)
    assert made.per_image == ({"class_label": "dog"}, {"class_label": "cat"}, {"class_label": "dog"})


def test_a_list_has_a_seed_for_each_image() -> None:
    made = prepare({"class_label": ["dog", "cat"], "seed": [7, 7], "n": 2})
    assert [(chain.seed, chain.label) for chain in made.spec.stages[0].chains] == [(7, 1), (7, 0)]
    assert made.parameters["seed"] == [7, 7]
    assert prepare({"seed": [MAX_SEED, 0]}).parameters["class_label"] is None


def test_a_list_of_one_is_still_a_list() -> None:
    made = prepare({"class_label": ["dog"], "seed": [3]})
    assert (made.parameters["class_label"], made.parameters["seed"]) == (["dog"], [3])


def test_an_image_without_a_class_is_not_guided_among_others_that_are() -> None:
    known = capabilities()
    made = prepare({"class_label": ["dog", None], "seed": 1}, known)
    guided, free = made.spec.stages[0].chains
    assert guided.plan is prepare({"class_label": "dog"}, known).spec.stages[0].chains[0].plan
    assert free.plan is prepare({}, known).spec.stages[0].chains[0].plan
    assert made.parameters["guidance_scale"] == 2.0
    unguided = {"guidance_scale": 1.0, "guidance_rescale": 0.0, "classifier_scale": 0.0}
    assert made.per_image[1] == {"class_label": None, **unguided}


def test_nor_is_it_guided_by_a_classifier() -> None:
    known = capabilities(replace(tiny_model(), classifier=tiny_classifier()))
    asked = {"class_label": ["dog", None], "classifier_scale": 2.0}
    guided, free = prepare(asked, known).spec.stages[0].chains
    alone = prepare({**asked, "class_label": "dog"}, known).spec.stages[0].chains[0]
    assert guided.plan is alone.plan is not free.plan
    assert free.plan is prepare({}, known).spec.stages[0].chains[0].plan


@pytest.mark.parametrize(
    ("request_", "field", "reason"),
    [
        ({"class_label": ["dog", "bird"]}, "class_label", "Index 1: Unknown class"),
        ({"class_label": ["dog", 3]}, "class_label", "Index 1: Unknown class"),
        ({"class_label": ["dog", "cat"], "n": 3}, "class_label", "3 from n and 2 from class_label"),
        ({"class_label": ["dog", "cat"], "n": 1}, "class_label", "1 from n and 2 from class_label"),
        ({"class_label": ["dog", "cat"], "seed": [1]}, "seed", "2 from class_label and 1 from seed"),
        ({"class_label": ["dog"] * 65}, "class_label", "At most 64"),
        ({"seed": [1] * 65}, "seed", "At most 64"),
        ({"class_label": [None, None], "guidance_scale": 3.0}, "guidance_scale", "needs a class_label"),
        ({"class_label": ["dog", "cat"], "seed": MAX_SEED}, "seed", "largest seed"),
    ],
)
def test_a_list_that_is_refused(request_: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        prepare(request_)
    assert refused.value.field == field


def test_a_null_in_a_list_needs_an_unconditional_branch() -> None:
    with pytest.raises(InvalidRequestError, match=r"Index 1: .* no unconditional branch"):
        prepare({"class_label": ["dog", None]}, capabilities(tiny_model(guided=False)))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"class_label": ["dog"], "seed": ["7"]}, {"class_label": "dog", "seed": 7}),
        (
            {"class_label": ["dog", "", "1"], "seed": ["7", "8", "9"]},
            {"class_label": ["dog", None, "1"], "seed": [7, 8, 9]},
        ),
    ],
)
def test_a_parameter_that_a_query_has_once_is_no_list(given: dict[str, Any], read: dict[str, Any]) -> None:
    assert StreamQuery(**given).model_dump(include={"class_label", "seed"}) == read
