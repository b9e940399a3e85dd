"""AUTOMATIC1111's fields as jobs of ours, and what an answer says of its pictures."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image
from pydantic import ValidationError

from service.errors import InvalidRequestError
from service.tasks.automatic1111 import (
    LONGEST_PROMPT,
    ImageToImage,
    TextToImage,
    class_of_prompt,
    information,
    infotext,
    prepare_image_to_image,
    prepare_text_to_image,
    sampler_of,
    scale_for,
)
from service.tasks.sampling import MAX_ENLARGED_PIXELS, ModelCapabilities, PreparedRequest
from tests.service.fakes import SIZE, tiny_model
from tests.service.tasks.test_sampling import capabilities, shaped
from tests.service.tasks.test_uploads import file, halves, noise

GREY = noise(SIZE, SIZE)
CLOTHES = ("T-shirt/top", "Trouser", "Dress", "Shirt", "Sneaker", "Ankle boot")
BIRDS = ("crane (0)", "great white shark, white shark", "crane (2)", "7 (3)")


def named(names: tuple[str, ...], **changes: Any) -> ModelCapabilities:
    return structs.replace(capabilities(), class_names=names, **changes)


def prepare(known: ModelCapabilities | None = None, **fields: Any) -> PreparedRequest:
    return prepare_text_to_image(TextToImage(**fields), known or capabilities())


def edit(known: ModelCapabilities | None = None, **fields: Any) -> PreparedRequest:
    picture = base64.b64encode(file(Image.fromarray(GREY))).decode()
    body = ImageToImage(**{"init_images": [picture], "steps": 10, **fields})
    return prepare_image_to_image(body, known or capabilities())


# ── The prompt ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Shirt", "Shirt"),
        ("3", "Shirt"),
        ("a photo of a red shirt, best quality", "Shirt"),
        ("a t-shirt", "T-shirt/top"),
        ("a tank top on white", "T-shirt/top"),
        ("a pair of ANKLE BOOTS beside a shirt", "Ankle boot"),
        ("two dresses", "Dress"),
        ("a sneaker on a dress", "Sneaker"),
        ("shirtless", None),
        ("a cat, masterpiece", None),
        ("", None),
    ],
)
def test_the_class_that_a_prompt_names(prompt: str, name: str | None) -> None:
    label = class_of_prompt(prompt, named(CLOTHES))
    assert (None if label is None else CLOTHES[label]) == name


@pytest.mark.parametrize(("prompt", "label"), [("a white shark", 1), ("crane (2)", 2), ("a crane", 0)])
def test_one_of_several_names_of_a_class(prompt: str, label: int) -> None:
    assert class_of_prompt(prompt, named(BIRDS)) == label


def test_a_prompt_without_a_class_is_unconditional_where_the_model_can_be() -> None:
    made = prepare(prompt="a landscape", cfg_scale=7.0, seed=4)
    assert made.parameters["class_label"] is None
    assert made.parameters["guidance_scale"] == 1.0


def test_a_model_that_needs_a_class_gets_any_and_the_same_for_a_seed() -> None:
    known = capabilities(tiny_model(guided=False))
    labels = [prepare(known, seed=seed, cfg_scale=7.0).parameters["class_label"] for seed in (3, 4, 5, 3)]
    assert labels == ["cat", "dog", "Ankle Boot", "cat"]


def test_a_model_without_classes_takes_any_prompt() -> None:
    made = prepare(capabilities(tiny_model(classes=0)), prompt="an ankle boot", cfg_scale=7.0)
    assert made.parameters["class_label"] is None


def test_a_prompt_has_a_limit() -> None:
    with pytest.raises(ValidationError):
        TextToImage(prompt="a" * (LONGEST_PROMPT + 1))


# ── Sampling ───────────────────────────────────────────────────────────────────────────────────


def test_what_is_left_out_is_the_models_own() -> None:
    used = prepare(prompt="dog").parameters
    ours = {"sampler": "dpmpp_2m", "num_inference_steps": 20, "guidance_scale": 2.0, "n": 1}
    assert ours.items() <= used.items()
    assert used["timestep_spacing"] == "trailing"


def test_fields_reach_the_job() -> None:
    made = prepare(
        prompt="dog",
        seed=5,
        steps=7,
        cfg_scale=3.5,
        batch_size=2,
        n_iter=3,
        sampler_name="DPM++ 2M SDE",
        scheduler="Exponential",
    )
    assert [chain.seed for chain in made.spec.stages[0].chains] == [5, 6, 7, 8, 9, 10]
    used = made.parameters
    assert (used["num_inference_steps"], used["guidance_scale"], used["sampler"]) == (7, 3.5, "sde_dpmpp_2m")
    assert used["timestep_spacing"] == "logsnr"


def test_a_null_and_an_unknown_field_are_as_good_as_none() -> None:
    body = TextToImage.model_validate({"steps": None, "seed": None, "enable_hr": True, "styles": ["x"]})
    assert body == TextToImage()


def test_seeds_are_random_unless_given() -> None:
    seeds = {prepare(seed=-1).parameters["seed"] for _ in range(4)}
    assert len(seeds) == 4
    assert min(seeds) >= 0


@pytest.mark.parametrize(
    ("name", "eta", "sampler", "used"),
    [
        ("DDIM", None, "ddim", 0.0),
        ("ddim", 0.3, "ddim", 0.3),
        ("Euler", 1.0, "ddim", 0.0),
        ("Euler a", None, "ddim", 1.0),
        ("Euler a", 0.5, "ddim", 0.5),
        ("k_dpmpp_2m", 1.0, "dpmpp_2m", 0.0),
        ("DPM++ 2M Karras", None, "dpmpp_2m", 0.0),
        ("DDPM", 1.0, "ddpm", 0.0),
    ],
)
def test_samplers_by_their_names_there(name: str, eta: float | None, sampler: str, used: float) -> None:
    made = prepare(sampler_name=name, eta=eta, steps=4)
    assert (made.parameters["sampler"], made.parameters["eta"]) == (sampler, used)
    assert prepare(sampler_index=name, eta=eta, steps=4).parameters["sampler"] == sampler


@pytest.mark.parametrize("name", ["Heun", "dpmpp_2m", "Karras", "DPM++ 2M Beta"])
def test_a_sampler_of_another_name(name: str) -> None:
    with pytest.raises(LookupError):
        sampler_of(TextToImage(sampler_name=name))


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(8, 8, 1), (1, 1, 1), (64, 64, 8), (70, 60, 8), (512, 512, 64), (999, 999, 64), (48, 12, 3)],
)
def test_a_size_is_the_nearest_that_there_is(width: int, height: int, scale: int) -> None:
    assert prepare(width=width, height=height).scale == scale


def test_pictures_are_enlarged_no_further_than_an_answer_may_have() -> None:
    known = shaped(3, 256, 256)
    assert scale_for(1024, 1024, 1, known) == 4
    few = scale_for(4096, 4096, 10, known)
    assert 10 * (256 * few) ** 2 <= MAX_ENLARGED_PIXELS < 10 * (256 * (few + 1)) ** 2
    assert scale_for(512, 512, 10**9, known) == 1


# ── Pictures in ────────────────────────────────────────────────────────────────────────────────


def test_the_strength_is_the_fraction_of_the_steps() -> None:
    assert len(edit(denoising_strength=0.6).spec.stages[0].chains[0].plan) == 6
    assert len(edit(denoising_strength=0).spec.stages[0].chains[0].plan) == 1
    assert edit().parameters["strength"] == 0.75


@pytest.mark.parametrize("count", [0, 2])
def test_a_single_picture_is_needed(count: int) -> None:
    picture = base64.b64encode(file(Image.fromarray(GREY))).decode()
    with pytest.raises(InvalidRequestError, match="A single picture"):
        edit(init_images=[picture] * count)


def kept(made: PreparedRequest) -> Any:
    known = made.spec.stages[0].chains[0].known
    assert known is not None
    return known.mask[0]


def test_white_of_a_mask_is_regenerated_or_black_where_it_is_inverted() -> None:
    mask = base64.b64encode(file(halves(SIZE))).decode()
    there = kept(edit(mask=mask))
    assert there[:, : SIZE // 2].all()
    assert not there[:, SIZE // 2 :].any()
    np.testing.assert_array_equal(kept(edit(mask=mask, inpainting_mask_invert=1)), ~there)


def test_strokes_of_any_colour_are_drawn_where_a_mask_is_transparent() -> None:
    strokes = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    strokes.paste((200, 30, 0, 255), (0, 0, SIZE, 2))
    there = kept(edit(mask=base64.b64encode(file(strokes)).decode()))
    assert not there[:2].any()
    assert there[2:].all()


def test_a_model_that_fills_holes_is_given_no_strength() -> None:
    known = structs.replace(capabilities(), condition=("mask", "masked_image"))
    made = edit(known, mask=base64.b64encode(file(halves(SIZE))).decode())
    assert "strength" not in made.parameters
    assert len(made.spec.stages[0].chains[0].plan) == 10


# ── What an answer says ────────────────────────────────────────────────────────────────────────


def test_the_text_that_makes_a_picture() -> None:
    body = TextToImage(
        prompt="a dog, outside",
        negative_prompt="blur",
        seed=5,
        steps=7,
        cfg_scale=3,
        sampler_name="Euler a",
        width=130,
        height=130,
    )
    known = capabilities()
    lines = infotext(body, prepare_text_to_image(body, known), 6, known).splitlines()
    assert lines == [
        "a dog, outside",
        "Negative prompt: blur",
        "Steps: 7, Sampler: Euler a, Schedule type: Automatic, CFG scale: 3.0, Seed: 6, Size: 128x128,"
        " Model: tiny, Class: dog, Eta: 1.0, Enlarged: 16x, Requested size: 130x130",
    ]


def test_a_value_that_looks_like_several_is_quoted() -> None:
    known = structs.replace(capabilities(), class_names=("tench, Tinca tinca",))
    body = TextToImage(prompt="0", width=8, height=8)
    text = infotext(body, prepare_text_to_image(body, known), 6, known)
    assert text.splitlines()[-1].endswith('Class: "tench, Tinca tinca"')
    assert "Requested size" not in text


def test_an_editing_text_has_the_strength() -> None:
    body = ImageToImage(init_images=[base64.b64encode(file(Image.fromarray(GREY))).decode()], steps=4)
    known = capabilities()
    assert "Denoising strength: 0.75" in infotext(body, prepare_image_to_image(body, known), 1, known)


def test_the_information_has_a_line_for_each_picture() -> None:
    body, known = TextToImage(prompt="dog", seed=5, batch_size=3, width=64, height=64), capabilities()
    found = information(body, prepare_text_to_image(body, known), [5, 6], known)
    assert json.loads(json.dumps(found)) == found
    assert (found["seed"], found["all_seeds"], found["width"], found["height"]) == (5, [5, 6], 64, 64)
    assert [text.partition("Seed: ")[2][0] for text in found["infotexts"]] == ["5", "6"]
    assert found["sampler_name"] == "DPM++ 2M"
    assert found["extra_generation_params"] == {"Class": "dog", "Enlarged": "8x"}
