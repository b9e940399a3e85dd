"""Requests for images from noise: one chain for each image."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequestError
from service.tasks.per_image import MAX_SEED
from tests.service.tasks.test_sampling import capabilities, prepare


def test_image_i_has_seed_plus_i() -> None:
    assert [chain.seed for chain in prepare({"n": 3, "seed": 40}).spec.stages[0].chains] == [40, 41, 42]
    assert [chain.seed for chain in prepare({"n": 2, "seed": MAX_SEED - 1}).spec.stages[0].chains][
        -1
    ] == MAX_SEED


def test_no_more_images_than_the_queue_holds() -> None:
    known = capabilities(max_queue=4)
    assert len(prepare({"n": 4}, known).spec.stages[0].chains) == 4
    with pytest.raises(InvalidRequestError, match="At most 4 images"):
        prepare({"n": 5}, known)


def test_all_images_share_a_plan_and_nothing_else() -> None:
    (stage,) = prepare({"n": 3, "class_label": "dog"}).spec.stages
    assert stage.kind == "denoise"
    assert len({id(chain.plan) for chain in stage.chains}) == 1
    assert {chain.label for chain in stage.chains} == {1}
    assert all(chain.start is None and chain.known is None for chain in stage.chains)
