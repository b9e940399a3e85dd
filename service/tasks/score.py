"""`/score`: how likely pictures are, how unusual, and what each bit buys.

Every term of the bound is a step of a measuring chain. The timesteps of an image are cut into chunks, one
sample each, so that they run side by side and share steps with everybody else's. What a chunk ends with, its
x₀ prediction, is what all the bits down to there have bought.

Decoding pictures takes time: call `prepare_score` away from the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field

from model.chain import from_pixels, measuring
from model.likelihood import (
    DEFAULT_TERMS,
    FEWEST_TERMS,
    Bound,
    choose_timesteps,
    chunks,
    estimate,
    prior_bits,
)
from model.samplers import build_measurement
from model.typicality import Typicality
from service.engine.jobs import Stage
from service.engine.messages import Finished, Measurement, Pixels
from service.errors import InvalidRequestError
from service.tasks.per_image import MAX_SEED, Label, Seed, consecutive
from service.tasks.sampling import (
    JobRequest,
    ModelCapabilities,
    PreparedRequest,
    check_count,
    job_spec,
    refuse_condition,
    refuse_distilled,
    resolve_format,
)
from service.tasks.uploads import Upload, decode, unpack

MAX_SCORED = 8
CHUNKS = 8
"""Samples of an image, where MAX_SCORED images with as many each fit into a request."""
PerSample = TypeVar("PerSample")


def _listed(images: object) -> object:
    return [images] if isinstance(images, bytes) else images  # a form's only file


class ScoreRequest(JobRequest):
    """The fields of `POST /score`: pictures, and at how many timesteps each is evaluated."""

    seed: Seed | None = Field(None, description="of the first picture; random if absent")
    class_label: Label | None = Field(None, description="class index or name; absent: unconditional")
    images: Annotated[list[Upload], BeforeValidator(_listed)] = Field(
        min_length=1,
        max_length=MAX_SCORED,
        description="PNG, JPEG, WebP or .npy; cropped and resized as for /edit",
    )
    terms: int | None = Field(
        None,
        ge=FEWEST_TERMS,
        description="timesteps at which each is evaluated, at most the model's T, which is exact; absent: "
        f"{DEFAULT_TERMS}",
    )


@dataclass(frozen=True, kw_only=True)
class PreparedScore(PreparedRequest):
    """A job that measures pictures.

    timesteps: T. pixels, priors: of each image, the picture and L_T. chunks: samples of each image, one after
    the other. typicality: of the training images, where it is known for the network as it is evaluated here.
    """

    timesteps: int
    pixels: tuple[Pixels, ...]
    priors: tuple[float, ...]
    chunks: int
    typicality: Typicality | None

    def of_image(self, per_sample: Sequence[PerSample], index: int) -> Sequence[PerSample]:
        """What belongs to an image, of a sequence with an entry for each sample."""
        return per_sample[index * self.chunks : (index + 1) * self.chunks]

    def measurements(self, event: Finished, index: int) -> list[Measurement]:
        """An image's, from the highest timestep to 0."""
        return [each for chunk in self.of_image(event.measurements, index) for each in chunk]

    def bound(self, found: Sequence[Measurement], index: int) -> Bound:
        """The variational bound of an image from its measurements."""
        bits = [each.bits for each in found]
        return estimate(self.timesteps, self.priors[index], [each.timestep for each in found], bits)

    def atypicality(self, found: Sequence[Measurement]) -> float | None:
        """How unusual an image's errors are; None where that is not known."""
        if self.typicality is None:
            return None
        return self.typicality.score([each.timestep for each in found], [each.mse for each in found])


def prepare_score(request: ScoreRequest, capabilities: ModelCapabilities) -> PreparedScore:
    """A job that evaluates the network on pictures. Raises InvalidRequestError.

    Image i has seed + i, which chooses its timesteps and its noise; the samples of its further chunks have
    seeds beyond all that can be asked for, so that no two samples share noise.
    """
    refuse_condition(capabilities)
    refuse_distilled(capabilities, "", "its predictions are steps and no means, so they bound no likelihood")
    check_count("images", len(request.images), capabilities)
    total = capabilities.schedule.timesteps
    if request.terms is not None and request.terms > total:
        raise InvalidRequestError("terms", f"This model has {total} timesteps.")
    label = capabilities.label_or_none(request.class_label)
    seed = consecutive(request.seed, len(request.images))[0]
    output_format = resolve_format(request, capabilities)
    pixels = [decode(unpack(each, "images"), capabilities.shape, "images") for each in request.images]
    terms = min(request.terms or DEFAULT_TERMS, total)
    count = max(1, min(CHUNKS, capabilities.max_images // MAX_SCORED, terms))
    images = [from_pixels(each, capabilities.schedule.data_range) for each in pixels]
    chains = tuple(
        measuring(
            build_measurement(capabilities.schedule, part), image, seed + i + place * (MAX_SEED + 1), label
        )
        for i, image in enumerate(images)
        for place, part in enumerate(chunks(choose_timesteps(total, terms, seed + i), count))
    )
    return PreparedScore(
        spec=job_spec(request, [Stage("measure", chains)], capabilities, "measure"),
        parameters={
            "n": len(images),
            "seed": seed,
            "terms": terms,
            "class_label": capabilities.name_of(label),
            "output_format": output_format,
        },
        output_format=output_format,
        timesteps=total,
        pixels=tuple(pixels),
        priors=tuple(prior_bits(capabilities.schedule, image) for image in images),
        chunks=count,
        typicality=capabilities.typicality if label is None else None,
    )
