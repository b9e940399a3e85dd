"""`/generate` and `/stream`: images from noise."""

from __future__ import annotations

from typing import cast

from pydantic import ConfigDict, Field, field_validator

from model.chain import Chain
from service.engine.jobs import Stage
from service.tasks.sampling import (
    COUNT,
    ImageCount,
    ModelCapabilities,
    PreparedRequest,
    Sampler,
    SamplingRequest,
    image_count,
    refuse_condition,
    resolve,
    sampling_request,
)
from service.tasks.texts import TextNumbers


class GenerateRequest(SamplingRequest):
    """The fields of `POST /generate`."""

    n: ImageCount | None = Field(None, description=COUNT)
    sampler: Sampler | None = Field(
        None, description="which reverse process; absent: the nearest to the model's own scheduler"
    )


class StreamQuery(GenerateRequest, TextNumbers):
    """The same as query parameters, where every value arrives as text."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, frozen=True)

    @field_validator("seed", "class_label", mode="before")
    @classmethod
    def _repeated(cls, value: object) -> object:
        """A parameter that comes once is no list."""
        return value[0] if isinstance(value, list) and len(value) == 1 else value


def prepare_generate(request: GenerateRequest, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job of a chain for each image. Raises InvalidRequestError for what model or limits do not allow."""
    refuse_condition(capabilities)
    count = image_count(request.n, request, capabilities)
    sampler = request.sampler or cast("Sampler", capabilities.sampler)
    params = resolve(request, capabilities, sampler, count)
    chains = tuple(
        Chain(params.plan(capabilities.schedule, params.guidance_of(label)), seed, label)
        for seed, label in params.images
    )
    return sampling_request(request, params, [Stage("denoise", chains)], capabilities, reported={"n": count})
