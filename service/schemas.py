"""Wire models, and the way from a request to a job."""

from __future__ import annotations

import base64
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.denoiser import Chain
from model.samplers import Guidance, Plan, build_plan
from model.schedule import NoiseSchedule, Spacing
from model.typicality import Typicality
from service.errors import InvalidRequestError
from service.events import Finished, Picture, Pixels, Preview, Queued
from service.images import MEDIA_TYPES, ImageFormat, contact_sheet, encode
from service.jobs import Job, PreviewKind

MAX_SEED = 2**53 - 1  # what every JSON reader can hold
DEFAULT_GUIDANCE = 2.0
DEFAULT_SIGMAS = 0.3, 5.0
"""The noise levels of guidance: better images at three quarters of the rows, see the model cards."""
MAX_ENLARGED_PIXELS = 2**24
"""Of all pictures of an answer together, where they are enlarged."""
Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"]
DEFAULT_SAMPLER: Sampler = "dpmpp_2m"
DEFAULT_STEPS: dict[Sampler, int] = {"ddpm": 50, "ddim": 50, "dpmpp_2m": 20, "sde_dpmpp_2m": 20}
"""Beyond which each gains little on the shipped model (its evaluation.md)."""
Images = Annotated[int, Field(ge=1, description="images; image i has seed + i")]


class JobRequest(BaseModel):
    """What every request can say. Fields left out get the defaults that `/info` reports."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="seed of the first image; random if absent")
    class_label: int | str | None = Field(None, description="class index or name; absent: unconditional")
    deadline_s: float | None = Field(None, gt=0, description="give up (504) after this many seconds")
    output_format: ImageFormat = Field("png", description="of pictures inside JSON and events")
    preview: PreviewKind = Field("x0", description="what a stream shows: the x₀ guess, x_t, both or none")
    preview_every: int | None = Field(None, ge=1, description="steps between a stream's previews")


class ChainRequest(JobRequest):
    """What every request for images can say."""

    num_inference_steps: int | None = Field(None, ge=1, description="denoising steps, at most the model's T")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's η: 0 deterministic, 1 as random as DDPM")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="classifier-free guidance; 1 is none. Needs a class"
    )
    guidance_sigma_min: float = Field(
        DEFAULT_SIGMAS[0],
        ge=0,
        description="lowest noise level σ = √((1 − ᾱ) / ᾱ) that guidance is applied at",
    )
    guidance_sigma_max: float | None = Field(
        DEFAULT_SIGMAS[1], gt=0, description="highest such noise level; null: any"
    )
    classifier_scale: float = Field(
        0.0, ge=0, le=100, description="guidance by the gradient of a classifier, where the model has one"
    )
    timestep_spacing: Spacing | None = Field(None, description="which timesteps; absent: as the model says")
    scale: int = Field(1, ge=1, le=16, description="enlarge pictures so many times, without smoothing")


class GenerateRequest(ChainRequest):
    """What `POST /generate` takes."""

    n: Images = 1
    sampler: Sampler = Field(DEFAULT_SAMPLER, description="which reverse process")


class StreamQuery(GenerateRequest):
    """The same as query parameters, where every value arrives as text."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, frozen=True)


@dataclass(frozen=True)
class Catalogue:
    """What can be asked for: the model's facts and the service's limits."""

    name: str
    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    conditional: bool
    guided: bool
    classified: bool
    typicality: Typicality | None
    parameters: int
    max_images: int
    deadline_s: float

    def label(self, wanted: int | str) -> int:
        """Index of a class given by name (any case) or index. Raises InvalidRequestError for others."""
        names = [name.lower() for name in self.class_names]
        indices = [str(index) for index in range(len(names))]
        for known_as in (names, indices):
            if str(wanted).strip().lower() in known_as:
                return known_as.index(str(wanted).strip().lower())
        if not names:
            raise InvalidRequestError("class_label", "This model is unconditional and has no classes.")
        known = ", ".join(self.class_names)
        raise InvalidRequestError("class_label", f"No such class; there are {known} (0 to {len(names) - 1}).")

    def label_or_none(self, wanted: int | str | None) -> int | None:
        """The same, or None for the unconditional branch. Raises InvalidRequestError where there is none."""
        if wanted is not None:
            return self.label(wanted)
        if self.conditional and not self.guided:
            raise InvalidRequestError("class_label", "This model has no unconditional branch: name a class.")
        return None


@dataclass(frozen=True)
class Order:
    """A job and what was understood of its request: `parameters` repeats it with every default filled in.

    marks: what is said of each image besides its index and seed. columns: of the sheet that shows them all.
    scale: pixels of a picture per pixel of the model and side.
    """

    job: Job
    parameters: dict[str, Any]
    output_format: ImageFormat
    marks: tuple[dict[str, Any], ...] = ()
    columns: int | None = None
    scale: int = 1

    def mark(self, index: int) -> dict[str, Any]:
        """What is said of one image."""
        return self.marks[index] if self.marks else {}

    def preview(self, event: Preview) -> dict[str, Any]:
        """Data of a stream's `preview` event."""
        return preview_body(event, self)

    def finished(self, event: Finished, model: str) -> dict[str, Any]:
        """The answer as JSON, and data of a stream's `completed` event."""
        return finished_body(event, self, model)

    def sheet(self, event: Finished) -> tuple[Pixels, dict[str, Any]]:
        """The answer as one picture, and what is written into it."""
        pictures = [picture.pixels for picture in event.pictures]
        return contact_sheet(pictures, columns=self.columns), self.parameters


@dataclass(frozen=True)
class Terms:
    """What all requests share, checked and with every default filled in; `parameters` tells the client."""

    seed: int
    label: int | None
    sampler: Sampler
    steps: int
    eta: float
    spacing: Spacing | None
    guidance: Guidance
    parameters: dict[str, Any]

    def plan(self, schedule: NoiseSchedule, strength: float = 1.0) -> Plan:
        """The sampler's table. strength: the share of its steps that is done."""
        return _plan(schedule, self.sampler, self.steps, self.eta, self.spacing, self.guidance, strength)


@lru_cache(maxsize=64)
def _plan(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    eta: float,
    spacing: Spacing | None,
    guidance: Guidance,
    strength: float,
) -> Plan:
    return build_plan(
        schedule, sampler, steps, eta=eta, spacing=spacing, guidance=guidance, strength=strength
    )


def to_job(request: GenerateRequest, catalogue: Catalogue, *, streamed: bool) -> Order:
    """Build a job. Raises InvalidRequestError for what this model or these limits do not allow."""
    check_count("n", request.n, catalogue)
    terms = settle(request, catalogue, request.sampler, request.n)
    plan = terms.plan(catalogue.schedule)
    chains = [Chain(plan, terms.seed + i, terms.label) for i in range(request.n)]
    return to_order(request, terms, chains, catalogue, streamed=streamed, told={"n": request.n})


def check_count(field: str, images: int, catalogue: Catalogue) -> None:
    """Raises InvalidRequestError for more images than a request may ask for."""
    if images > catalogue.max_images:
        raise InvalidRequestError(field, f"At most {catalogue.max_images} images per request.")


def settle(request: ChainRequest, catalogue: Catalogue, sampler: Sampler, seeds: int = 1) -> Terms:
    """Fill in the defaults. seeds: how many the request needs, from its own on.

    Raises InvalidRequestError for what this model does not allow.
    """
    steps = request.num_inference_steps or min(DEFAULT_STEPS[sampler], catalogue.schedule.timesteps)
    if steps > catalogue.schedule.timesteps:
        raise InvalidRequestError(
            "num_inference_steps", f"This model has {catalogue.schedule.timesteps} timesteps."
        )
    if request.eta and sampler != "ddim":
        raise InvalidRequestError("eta", "Only ddim has an η; the other samplers fix their noise themselves.")
    label = catalogue.label_or_none(request.class_label)
    guidance = _guidance(request, catalogue, label)
    seed = first_seed(request, seeds)
    parameters = {
        "seed": seed,
        "sampler": sampler,
        "num_inference_steps": steps,
        "eta": request.eta,
        "guidance_scale": guidance.scale,
        "guidance_sigma_min": request.guidance_sigma_min,
        "guidance_sigma_max": request.guidance_sigma_max,
        "classifier_scale": request.classifier_scale,
        "timestep_spacing": request.timestep_spacing or catalogue.schedule.timestep_spacing,
        "class_label": None if label is None else catalogue.class_names[label],
        "output_format": request.output_format,
        "scale": request.scale,
    }
    spacing = request.timestep_spacing
    return Terms(seed, label, sampler, steps, request.eta, spacing, guidance, parameters)


def to_order(
    request: ChainRequest,
    terms: Terms,
    chains: Sequence[Chain],
    catalogue: Catalogue,
    *,
    streamed: bool,
    told: Mapping[str, Any],
) -> Order:
    """A job of these chains, which have plans of one length. told: parameters that not all requests share."""
    _check_scale(request.scale, len(chains), catalogue)
    job = to_job_of(request, chains, catalogue, terms.sampler, streamed=streamed)
    return Order(job, {**told, **terms.parameters}, request.output_format, scale=request.scale)


def first_seed(request: JobRequest, seeds: int) -> int:
    """The request's seed, or a random one. Raises InvalidRequestError where so many from it on do not fit."""
    seed = secrets.randbits(32) if request.seed is None else request.seed
    if seed + seeds - 1 > MAX_SEED:
        raise InvalidRequestError("seed", f"Image i has seed + i, and seeds end at {MAX_SEED}.")
    return seed


def to_job_of(
    request: JobRequest, chains: Sequence[Chain], catalogue: Catalogue, sampler: str, *, streamed: bool
) -> Job:
    """A job of these chains, under an id of its own. sampler: what its images are counted by."""
    now = time.monotonic()
    allowed = min(request.deadline_s or catalogue.deadline_s, catalogue.deadline_s)
    job = Job(
        id=secrets.token_hex(8),
        sampler=sampler,
        deadline=now + allowed,
        preview=request.preview if streamed else "none",
        # About two dozen looks at a chain of any length, unless asked otherwise.
        preview_every=request.preview_every or max(1, len(chains[0].plan) // 25),
        created=now,
    )
    for chain in chains:
        job.add(chain)
    return job


def _check_scale(scale: int, images: int, catalogue: Catalogue) -> None:
    _, height, width = catalogue.shape
    if scale > 1 and images * height * width * scale**2 > MAX_ENLARGED_PIXELS:
        raise InvalidRequestError(
            "scale", f"Enlarged pictures have at most {MAX_ENLARGED_PIXELS} pixels together."
        )


def _guidance(request: ChainRequest, catalogue: Catalogue, label: int | None) -> Guidance:
    low, high = request.guidance_sigma_min, request.guidance_sigma_max
    if high is not None and high <= low:
        raise InvalidRequestError("guidance_sigma_max", "The interval of noise levels is empty.")
    if request.classifier_scale and not catalogue.classified:
        raise InvalidRequestError("classifier_scale", "This model has no classifier.")
    if request.classifier_scale and label is None:
        raise InvalidRequestError("classifier_scale", "A classifier needs a class_label to guide towards.")
    scale = request.guidance_scale
    if scale is None:
        by_default = catalogue.guided and label is not None and not request.classifier_scale
        scale = DEFAULT_GUIDANCE if by_default else 1.0
    elif scale != 1.0 and not catalogue.guided:
        raise InvalidRequestError("guidance_scale", "This model was trained without a null class.")
    elif scale != 1.0 and label is None:
        raise InvalidRequestError("guidance_scale", "Guidance needs a class_label to guide towards.")
    return Guidance(scale, (low, math.inf if high is None else high), request.classifier_scale)


# ── Answers ────────────────────────────────────────────────────────────────────────────────────


def queued_body(event: Queued, order: Order) -> dict[str, Any]:
    """Data of a stream's `queued` event."""
    return {
        "id": event.job_id,
        "position": event.position,
        "eta_s": round(event.eta_s, 3),
        "seed": order.parameters["seed"],
    }


def preview_body(event: Preview, order: Order) -> dict[str, Any]:
    """Data of a stream's `preview` event."""
    return {
        "step": event.step,
        "steps": event.steps,
        "timestep": event.timestep,
        "eta_s": round(event.eta_s, 3),
        "images": [{**image_body(p, order), "kind": p.kind} for p in event.pictures],
    }


def finished_body(event: Finished, order: Order, model: str) -> dict[str, Any]:
    """The answer to a request, and data of a stream's `completed` event."""
    return {
        "id": event.job_id,
        "model": model,
        "images": list(result_images(event.pictures, order, model)),
        "parameters": order.parameters,
        "timings": timings(event),
    }


def timings(event: Finished) -> dict[str, float]:
    """What an answer says about its time, in seconds."""
    return {
        "queue_s": round(event.queue_s, 4),
        "run_s": round(event.run_s, 4),
        "total_s": round(event.queue_s + event.run_s, 4),
    }


def result_images(pictures: Iterable[Picture], order: Order, model: str) -> Iterable[dict[str, Any]]:
    """Finished pictures with their provenance inside. It says what makes this one image alone: n is 1."""
    alone = {"n": 1} if "n" in order.parameters else {}
    for picture in pictures:
        mark = order.mark(picture.index)
        provenance = {**order.parameters, **alone, **mark, "seed": picture.seed, "model": model}
        yield image_body(picture, order, provenance)


def image_body(picture: Picture, order: Order, provenance: dict[str, Any] | None = None) -> dict[str, Any]:
    """One image inside JSON."""
    data = encode(picture.pixels, order.output_format, provenance, order.scale)
    return {
        "index": picture.index,
        "seed": picture.seed,
        **order.mark(picture.index),
        "b64_json": base64.b64encode(data).decode(),
        "media_type": MEDIA_TYPES[order.output_format],
    }


class Problem(BaseModel):
    """RFC 9457 problem details; `code` is stable."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    errors: list[dict[str, Any]] | None = None
