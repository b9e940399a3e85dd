"""OpenAI's Images API: from its fields to a job.

Its clients send fields of models that are not served here. Those that change nothing are accepted, and
unknown ones are ignored; what would make another image than was asked for is refused. A mask is one of alpha:
transparent is edited. `prepare_images` decodes pictures: call it away from the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidRequestError
from service.tasks.edit import EditRequest, prepare_edit
from service.tasks.generate import GenerateRequest, prepare_generate
from service.tasks.images import formats_of, picture_size
from service.tasks.prompts import understand
from service.tasks.sampling import MAX_SCALE, MAX_SEED, ModelCapabilities, PreparedRequest
from service.tasks.uploads import Upload, mask_of_alpha, unpack

MAX_PARTIAL_IMAGES = 3
PARAMS = {"class_label": "prompt", "scale": "size"}
"""Of our own fields, those that go by other names here."""
NO_EFFECT = "accepted; changes nothing"


class ImagesRequest(BaseModel):
    """Fields that generations and edits share. Null is the same as absent."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)

    prompt: str = Field(
        max_length=32_000, description="names a class of the model, in words around it or not"
    )
    model: str | None = Field(None, description="any where there is one model, else its name")
    n: int = Field(1, ge=1, description="images; image i has seed + i")
    size: str = Field(
        "auto",
        pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$",
        description="WIDTHxHEIGHT, the model's or a whole multiple of it, enlarged without smoothing",
    )
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: a data URL")
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="format of the images")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of a jpeg or webp, in percent; absent: 95, or lossless webp"
    )
    background: Literal["auto", "transparent", "opaque"] = Field(
        "auto",
        description="transparent needs a model with alpha, whose images opaque puts on white",
    )
    stream: bool = Field(False, description="server-sent events")
    partial_images: int = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="x₀ predictions that a stream shows on the way"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="seed of the first image; random if absent")
    num_inference_steps: int | None = Field(None, ge=1, description="denoising steps, at most the model's T")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="classifier-free guidance; 1 is none"
    )
    negative_prompt: str | None = Field(None, description=f"{NO_EFFECT}, as revised_prompt says")
    quality: str | None = Field(None, description=NO_EFFECT)
    user: str | None = Field(None, description=NO_EFFECT)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class ImageGenerationRequest(ImagesRequest):
    """The fields of `POST /v1/images/generations`."""

    style: str | None = Field(None, description=NO_EFFECT)
    moderation: str | None = Field(None, description=NO_EFFECT)


class ImageEditRequest(ImagesRequest):
    """The fields of `POST /v1/images/edits`."""

    image: Annotated[
        Upload | list[Upload],
        Field(validation_alias=AliasChoices("image", "image[]"), description="one picture"),
    ]
    mask: Upload | None = Field(
        None, description="a picture of the same size with alpha: transparent is edited, opaque is kept"
    )
    mask_image: Upload | None = Field(None, description="instead: white is edited, black is kept")
    strength: float | None = Field(
        None, gt=0, le=1, description="fraction of the steps that is run, from the picture under noise"
    )
    input_fidelity: str | None = Field(None, description=NO_EFFECT)


@dataclass(frozen=True)
class PreparedImages:
    """A job, and how its answer was asked for. transparent: whether its pictures have an alpha channel."""

    job: PreparedRequest
    asked: ImagesRequest
    revised_prompt: str
    size: str
    transparent: bool

    def since(self, arrived: float) -> Self:
        """As that of the job."""
        return replace(self, job=self.job.since(arrived))


def prepare_images(asked: ImagesRequest, capabilities: ModelCapabilities) -> PreparedImages:
    """A job for images by a prompt. Raises InvalidRequestError, by the names of these fields."""
    scale = _scale(asked.size, capabilities)
    has_alpha = capabilities.shape[0] == 4
    if asked.background == "transparent" and not has_alpha:
        raise InvalidRequestError("background", "This model's images have no alpha channel: they are opaque.")
    if asked.output_compression not in (None, 100) and asked.output_format == "png":
        raise InvalidRequestError("output_compression", "A png has none below 100: it is lossless.")
    transparent = has_alpha and asked.background != "opaque"
    if transparent and asked.output_format == "jpeg":
        raise InvalidRequestError(
            "output_format", "A jpeg has no transparency, which this model's images have: background opaque."
        )
    understood = understand(asked.prompt, capabilities)
    with _by_openais_names():
        job = _prepare(asked, understood.label, scale, capabilities)
    job = replace(
        job,
        output_format=asked.output_format,
        spec=replace(job.spec, **_previews(asked, job.spec.stages[-1].steps)),
    )
    unused = f"{understood.text.rstrip('.')}. The negative_prompt was not used."
    height, width = picture_size(capabilities.shape)
    return PreparedImages(
        job,
        _without_files(asked),
        unused if asked.negative_prompt else understood.text,
        f"{width * scale}x{height * scale}",
        transparent,
    )


def _without_files(asked: ImagesRequest) -> ImagesRequest:
    """What an answer still needs, which would keep the files as long as the job takes."""
    if not isinstance(asked, ImageEditRequest):
        return asked
    return asked.model_copy(update={"image": b"", "mask": None, "mask_image": None})


def preview_steps(steps: int, partial_images: int) -> range:
    """After which of so many steps partial images are shown: evenly spread, and none after the last.

    There are fewer where there are not enough steps.
    """
    every = _every(steps, partial_images)
    return range(every, min(every * partial_images + 1, steps), every)


def _every(steps: int, partial_images: int) -> int:
    parts = partial_images + 1
    every = (steps + parts // 2) // parts  # rounded
    return max(1, every if every * partial_images < steps else steps // parts)


def _previews(asked: ImagesRequest, steps: int) -> dict[str, Any]:
    if not asked.stream or not asked.partial_images:
        return {"preview": "none"}
    return {"preview": "x0", "preview_every": _every(steps, asked.partial_images)}


def _prepare(
    asked: ImagesRequest, label: int | None, scale: int, capabilities: ModelCapabilities
) -> PreparedRequest:
    holds = asked.output_format in formats_of(capabilities.shape[0])
    fields: dict[str, Any] = {
        "class_label": label,
        "scale": scale,
        "output_format": asked.output_format if holds else None,  # a JPEG of what is put on white
        **asked.model_dump(include={"n", "seed", "num_inference_steps", "guidance_scale"}),
    }
    if not isinstance(asked, ImageEditRequest):
        if capabilities.condition:
            raise InvalidRequestError(
                "", "This model makes images from an image: POST it to /v1/images/edits."
            )
        return prepare_generate(GenerateRequest(**fields), capabilities)
    if isinstance(asked.image, list):
        raise InvalidRequestError("image", "Send one picture: an edit is of a single one.")
    if asked.mask is not None and asked.mask_image is not None:
        raise InvalidRequestError("mask_image", "Send either mask or mask_image.")
    mask = asked.mask_image if asked.mask is None else mask_of_alpha(unpack(asked.mask, "mask"))
    edit = EditRequest(**fields, image=asked.image, mask=mask, strength=asked.strength)
    return prepare_edit(edit, capabilities)


def _scale(size: str, capabilities: ModelCapabilities) -> int:
    """Pixels of the image per pixel of the model and side. Raises InvalidRequestError for another size."""
    if size == "auto":
        return 1
    height, width = picture_size(capabilities.shape)
    wanted_width, wanted_height = map(int, size.split("x"))
    scale = wanted_width // width
    if (scale * width, scale * height) != (wanted_width, wanted_height) or not 1 <= scale <= MAX_SCALE:
        raise InvalidRequestError(
            "size",
            f"This model's images are {width}x{height}: size is auto, that, or a whole multiple of"
            f" both (at most {MAX_SCALE}), as {8 * width}x{8 * height}.",
        )
    return scale


@contextmanager
def _by_openais_names() -> Iterator[None]:
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(PARAMS.get(error.field, error.field), error.detail) from None
