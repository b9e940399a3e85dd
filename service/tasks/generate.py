"""`/generate` and `/stream`: images from noise."""

from __future__ import annotations

from typing import cast

from pydantic import ConfigDict, Field

from model.chain import Chain
from service.engine.jobs import Stage
from service.tasks.sampling import (
    ImageCount,
    ModelCapabilities,
    PreparedRequest,
    Sampler,
    SamplingRequest,
    check_count,
    refuse_condition,
    resolve,
    sampling_request,
)


class GenerateRequest(SamplingRequest):
    """The fields of `POST /generate`."""

    n: ImageCount = 1
    sampler: Sampler | None = Field(
        None, description="which reverse process; absent: the nearest to the model's own scheduler"
    )


class StreamQuery(GenerateRequest):
    """The same as query parameters, where every value arrives as text."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, frozen=True)


def prepare_generate(request: GenerateRequest, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job of n chains. Raises InvalidRequestError for what this model or these limits do not allow."""
    refuse_condition(capabilities)
    check_count("n", request.n, capabilities)
    sampler = request.sampler or cast("Sampler", capabilities.sampler)
    params = resolve(request, capabilities, sampler, request.n)
    plan = params.plan(capabilities.schedule)
    chains = tuple(Chain(plan, params.seed + i, params.label) for i in range(request.n))
    return sampling_request(
        request, params, [Stage("denoise", chains)], capabilities, reported={"n": request.n}
    )
