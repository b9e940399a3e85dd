"""What `POST /score` takes and says: what pictures cost under the model, and what each bit buys.

A picture's terms of the variational bound are rows of a few samples of one job, which share steps with
everybody else's; `model/likelihood.py` makes figures of what they measure.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from model.denoiser import from_pixels, probing
from model.likelihood import (
    DEFAULT_TERMS,
    FEWEST_TERMS,
    choose_timesteps,
    estimate,
    prior_bits,
    rmse,
    stretches,
)
from model.samplers import build_probe
from model.schedule import NoiseSchedule
from service.edits import Upload
from service.errors import InvalidRequestError
from service.events import Finished, Measure
from service.images import ImageFormat
from service.jobs import Job, PreviewKind
from service.schemas import MAX_SEED, Catalogue, Order
from service.uploads import decode, unpack

MAX_PICTURES = 8
SAMPLES = 8
"""Among which the terms of a picture are divided, so that they are not asked about one by one."""


def _as_list(value: object) -> object:
    """One file of a form is a list of one."""
    return [value] if isinstance(value, str | bytes) else value


class ScoreRequest(BaseModel):
    """What `POST /score` takes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    images: Annotated[list[Upload], BeforeValidator(_as_list)] = Field(
        min_length=1,
        max_length=MAX_PICTURES,
        description="PNG, JPEG or WebP; cropped and resized to the model's size",
    )
    class_label: int | str | None = Field(None, description="class index or name; absent: unconditional")
    terms: int | None = Field(
        None,
        ge=FEWEST_TERMS,
        description=f"timesteps to ask about, at most the model's T; absent: {DEFAULT_TERMS} of them",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the noise, and of which timesteps")
    deadline_s: float | None = Field(None, gt=0, description="give up (504) after this many seconds")
    output_format: ImageFormat = Field("png", description="of pictures inside events")
    preview: PreviewKind = Field("x0", description="what a stream shows: the x₀ guess, x_t, both or none")
    preview_every: int = Field(1, ge=1, description="of how many of a sample's timesteps a stream shows one")


def to_scores(request: ScoreRequest, catalogue: Catalogue, *, streamed: bool) -> Order:
    """Build a job of probes, some for each picture. Raises InvalidRequestError.

    It decodes pictures: call it away from an event loop.
    """
    schedule = catalogue.schedule
    pictures = [
        from_pixels(decode(unpack(each, "images"), catalogue.shape, "images")) for each in request.images
    ]
    label = None if request.class_label is None else catalogue.label(request.class_label)
    if catalogue.conditional and not catalogue.guided and label is None:
        raise InvalidRequestError("class_label", "This model has no unconditional branch: name a class.")
    terms = min(DEFAULT_TERMS, schedule.timesteps) if request.terms is None else request.terms
    if terms > schedule.timesteps:
        raise InvalidRequestError("terms", f"This model has {schedule.timesteps} timesteps.")
    timesteps = choose_timesteps(schedule.timesteps, terms, request.seed)
    parts = stretches(timesteps, min(SAMPLES, len(timesteps)))
    if request.seed + len(pictures) * len(parts) - 1 > MAX_SEED:
        raise InvalidRequestError("seed", f"Every sample has a seed of its own, and they end at {MAX_SEED}.")
    now = time.monotonic()
    job = Job(
        id=secrets.token_hex(8),
        sampler="probe",
        deadline=now + min(request.deadline_s or catalogue.deadline_s, catalogue.deadline_s),
        preview=request.preview if streamed else "none",
        preview_every=request.preview_every,
        created=now,
    )
    plans = [build_probe(schedule, part) for part in parts]
    for picture in pictures:
        for plan in plans:
            job.add(probing(plan, picture, request.seed + len(job.samples), label))
    parameters = {
        "seed": request.seed,
        "terms": len(timesteps),
        "class_label": None if label is None else catalogue.class_names[label],
    }
    priors = [prior_bits(schedule, picture) for picture in pictures]
    marks = tuple({"index": place} for place in range(len(pictures)) for _ in parts)
    return Order(
        job,
        parameters,
        request.output_format,
        marks,
        finish=lambda event, order, model: _body(event, order, model, schedule, priors),
    )


def _body(
    event: Finished, order: Order, model: str, schedule: NoiseSchedule, priors: Sequence[float]
) -> dict[str, Any]:
    """The answer: the scores of each picture."""
    each = len(event.measures) // len(priors)
    scores = []
    for place, prior in enumerate(priors):
        parts = event.measures[place * each : (place + 1) * each]
        found = sorted((measure for part in parts for measure in part), key=lambda one: -one.timestep)
        scores.append({"index": place, **score(schedule, prior, found)})
    timings = {"queue_s": round(event.queue_s, 4), "run_s": round(event.run_s, 4)}
    return {
        "id": event.job_id,
        "model": model,
        "scores": scores,
        "parameters": order.parameters,
        "timings": {**timings, "total_s": round(event.queue_s + event.run_s, 4)},
    }


def score(schedule: NoiseSchedule, prior: float, found: Sequence[Measure]) -> dict[str, Any]:
    """The figures of one picture, from its measures, highest timestep first.

    Bits are per dimension; rate: what x_t has cost; rmse: of the guess at x₀, in levels of 255.
    """
    timesteps = [measure.timestep for measure in found]
    bound = estimate(schedule.timesteps, prior, timesteps, [measure.bits for measure in found])
    return {
        "bits_per_dim": bound.bits_per_dim,
        "standard_error": bound.standard_error,
        "prior": prior,
        "terms": [{"timestep": m.timestep, "bits": m.bits, "mse": m.error} for m in found],
        "rate_distortion": [
            {"timestep": m.timestep, "rate": float(bound.rates[m.timestep]), "rmse": float(rmse(m.error))}
            for m in found
        ],
    }
