"""OpenAI's fields: what job they become, and what is refused by their names."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from service.errors import InvalidRequestError
from service.tasks.openai import (
    MAX_PARTIAL_IMAGES,
    ImageEditRequest,
    ImageGenerationRequest,
    PreparedImages,
    prepare_images,
    preview_steps,
)
from service.tasks.sampling import ModelCapabilities
from tests.service.fakes import SIZE
from tests.service.tasks.test_sampling import capabilities, shaped
from tests.service.tasks.test_uploads import file, noise

PICTURE = file(Image.fromarray(noise(SIZE, SIZE)))


def generation(known: ModelCapabilities | None = None, **fields: Any) -> PreparedImages:
    asked = ImageGenerationRequest.model_validate({"prompt": "a dog", **fields})
    return prepare_images(asked, known or capabilities())


def edit(known: ModelCapabilities | None = None, **fields: Any) -> PreparedImages:
    asked = ImageEditRequest.model_validate({"prompt": "a dog", "image": PICTURE, **fields})
    return prepare_images(asked, known or capabilities())


def mask(*colour: int, hole: tuple[int, ...] = (0, 0, 0, 0), mode: str = "RGBA") -> bytes:
    """Of one colour, with a hole in its right half."""
    image = Image.new(mode, (SIZE, SIZE), colour)
    image.paste(hole, (SIZE // 2, 0, SIZE, SIZE))
    return file(image)


def regenerated(prepared: PreparedImages) -> Any:
    known = prepared.job.spec.stages[0].chains[0].known
    assert known is not None
    return ~known.mask[0]


def test_the_fields_are_those_of_our_own_request() -> None:
    made = generation(n=2, seed=40, num_inference_steps=7, guidance_scale=3.0)
    (stage,) = made.job.spec.stages
    assert [(chain.seed, chain.label) for chain in stage.chains] == [(40, 1), (41, 1)]
    assert stage.steps == 7
    assert made.job.parameters["guidance_scale"] == 3.0
    assert made.revised_prompt == "dog"


def test_null_is_absent_and_unknown_fields_are_ignored() -> None:
    nulls = dict.fromkeys(ImageGenerationRequest.model_fields.keys() - {"prompt"})
    assert generation(**nulls, true_cfg_scale=4, generator_device="cpu").asked == generation().asked


def test_what_a_negative_prompt_does_is_said() -> None:
    assert generation(negative_prompt="blurry").revised_prompt == "dog. The negative_prompt was not used."
    assert generation(negative_prompt="").revised_prompt == "dog"


@pytest.mark.parametrize(
    ("size", "scale"), [("auto", 1), ("8x8", 1), ("24x24", 3), ("256x256", 32), ("512x512", 64)]
)
def test_a_size_is_a_whole_multiple_of_the_models(size: str, scale: int) -> None:
    made = generation(size=size)
    assert made.job.scale == scale
    assert made.size == f"{8 * scale}x{8 * scale}"


def test_width_comes_first() -> None:
    assert generation(shaped(3, 4, 6), size="12x8").size == "12x8"
    assert generation(shaped(2, 4, 6), size="auto").size == "14x4"  # a sheet of both channels


@pytest.mark.parametrize("size", ["4x4", "12x12", "8x16", "16x8", "520x520", "4096x4096"])
def test_another_size_is_refused(size: str) -> None:
    with pytest.raises(InvalidRequestError, match="images are 8x8: size is auto, that, or") as refused:
        generation(size=size)
    assert refused.value.field == "size"


def test_too_many_pixels_are_refused_by_the_name_of_the_size() -> None:
    with pytest.raises(InvalidRequestError, match="at most") as refused:
        generation(shaped(1, 64, 64), size="2048x2048", n=5)
    assert refused.value.field == "size"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 50, 317])
@pytest.mark.parametrize("wanted", range(MAX_PARTIAL_IMAGES + 1))
def test_partial_images_are_evenly_spread(steps: int, wanted: int) -> None:
    shown = list(preview_steps(steps, wanted))
    assert len(shown) == min(wanted, steps - 1)
    assert all(0 < step < steps for step in shown)
    assert shown == [shown[0] * (i + 1) for i in range(len(shown))]
    if steps >= 20:
        ideal = steps / (wanted + 1)
        assert all(abs(step - ideal * (i + 1)) <= wanted / 2 for i, step in enumerate(shown))


def test_only_a_stream_with_partial_images_makes_previews() -> None:
    assert generation(stream=True, partial_images=0).job.spec.preview == "none"
    assert generation(partial_images=3).job.spec.preview == "none"
    spec = generation(stream=True, partial_images=3, num_inference_steps=20).job.spec
    assert (spec.preview, spec.preview_every) == ("x0", 5)


def test_partial_images_of_an_edit_count_its_own_steps() -> None:
    spec = edit(stream=True, partial_images=1, num_inference_steps=20, strength=0.5).job.spec
    assert (spec.stages[0].steps, spec.preview_every) == (10, 5)
    inpainting = edit(stream=True, partial_images=1, num_inference_steps=20, mask=mask(0, 0, 0, 255)).job.spec
    assert inpainting.stages[0].steps > 20
    assert inpainting.preview_every == pytest.approx(inpainting.stages[0].steps / 2, abs=1)


# ── Transparency ───────────────────────────────────────────────────────────────────────────────


def test_a_transparent_background_needs_an_alpha_channel() -> None:
    with pytest.raises(InvalidRequestError, match="no alpha channel") as refused:
        generation(background="transparent")
    assert refused.value.field == "background"
    assert not generation(background="opaque").transparent
    known = shaped(4, 8, 8)
    assert generation(known, background="transparent").transparent
    assert generation(known).transparent
    assert not generation(known, background="opaque").transparent


def test_a_jpeg_of_what_is_transparent_is_refused_unless_it_is_put_on_white() -> None:
    known = shaped(4, 8, 8)
    with pytest.raises(InvalidRequestError, match="background opaque") as refused:
        generation(known, output_format="jpeg")
    assert refused.value.field == "output_format"
    assert generation(known, output_format="jpeg", background="opaque").job.output_format == "jpeg"


def test_a_png_has_no_compression() -> None:
    with pytest.raises(InvalidRequestError, match="lossless"):
        generation(output_compression=50)
    generation(output_compression=100)
    generation(output_compression=50, output_format="webp")


# ── Edits ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 90)], ids=str)
def test_a_mask_is_edited_where_it_is_transparent_whatever_its_colours(colour: tuple[int, ...]) -> None:
    for hole in ((*colour, 0), (255, 255, 255, 0), (0, 0, 0, 0)):
        found = regenerated(edit(mask=mask(*colour, 255, hole=hole)))
        assert found[:, SIZE // 2 :].all()
        assert not found[:, : SIZE // 2].any()


def test_a_mask_of_grey_and_alpha() -> None:
    found = regenerated(edit(mask=mask(90, 255, hole=(90, 0), mode="LA")))
    assert found[:, SIZE // 2 :].all()
    assert not found[:, : SIZE // 2].any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (mask(0, 0, 0, hole=(255, 255, 255), mode="RGB"), "no alpha channel"),
        (mask(0, 0, 0, 255, hole=(255, 255, 255, 255)), "opaque everywhere"),
        (file(Image.new("RGBA", (SIZE + 1, SIZE))), "same width and height"),
        (b"zebra", "not a PNG"),
    ],
    ids=["no alpha", "opaque", "another size", "no picture"],
)
def test_a_mask_that_says_nothing_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        edit(mask=data)
    assert refused.value.field == "mask"


def test_a_mask_image_is_edited_where_it_is_white() -> None:
    white = mask(0, 0, 0, hole=(255, 255, 255), mode="RGB")
    found = regenerated(edit(mask_image=white))
    assert found[:, SIZE // 2 :].all()
    assert not found[:, : SIZE // 2].any()
    with pytest.raises(InvalidRequestError, match="either"):
        edit(mask_image=white, mask=mask(0, 0, 0, 255))


def test_an_edit_without_a_mask_starts_from_the_picture() -> None:
    assert edit(strength=0.25).job.parameters["strength"] == 0.25
    assert edit().job.parameters["masked"] is False


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_one_picture_is_edited(name: str) -> None:
    fields = {"prompt": "a dog", name: [PICTURE, PICTURE]}
    with pytest.raises(InvalidRequestError, match="Send one picture") as refused:
        prepare_images(ImageEditRequest.model_validate(fields), capabilities())
    assert refused.value.field == "image"
    prepare_images(ImageEditRequest.model_validate({"prompt": "a dog", name: PICTURE}), capabilities())


def test_a_model_that_takes_a_picture_has_no_generations() -> None:
    known = structs.replace(capabilities(), condition=("image",))
    with pytest.raises(InvalidRequestError, match="POST it to /v1/images/edits"):
        generation(known)


def test_the_picture_decides_what_is_kept() -> None:
    made = edit(mask=mask(0, 0, 0, 255))
    known = made.job.spec.stages[0].chains[0].known
    assert known is not None
    pixels = np.asarray(Image.open(BytesIO(PICTURE))) / 127.5 - 1
    np.testing.assert_allclose(known.image[0], pixels, atol=1e-6)
