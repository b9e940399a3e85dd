"""`/score`: how likely pictures are, how unusual, what each bit buys. Its wire model, job and answers.

Every term of the bound is a row of a probe. An image's rows are cut into stretches of timesteps, one sample
each, so that they run side by side and share steps with everybody else's. What a stretch ends with, its
guess at the image, is what all the bits down to there have bought.

Decoding pictures takes time, so `to_score` is to be called away from an event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from model.denoiser import from_pixels, probing
from model.likelihood import (
    DEFAULT_TERMS,
    FEWEST_TERMS,
    Bound,
    choose_timesteps,
    chunks,
    estimate,
    prior_bits,
    rmse,
)
from model.samplers import build_probe
from model.typicality import Typicality
from service.edits import Upload
from service.errors import InvalidRequestError
from service.events import Finished, Measure, Picture, Pixels, Preview
from service.images import contact_sheet
from service.schemas import (
    MAX_SEED,
    Catalogue,
    JobRequest,
    Order,
    check_count,
    first_seed,
    image_body,
    timings,
    to_job_of,
)
from service.uploads import decode, unpack

MAX_SCORED = 8
STRETCHES = 8
"""Samples of an image, where MAX_SCORED images with as many each fit into a request."""


def _listed(images: object) -> object:
    return [images] if isinstance(images, bytes) else images  # a form's only file


class ScoreRequest(JobRequest):
    """What `POST /score` takes: pictures, and how much is to be asked about each."""

    images: Annotated[list[Upload], BeforeValidator(_listed)] = Field(
        min_length=1, max_length=MAX_SCORED, description="PNG, JPEG or WebP; cropped and resized as for /edit"
    )
    terms: int | None = Field(
        None,
        ge=FEWEST_TERMS,
        description=f"timesteps at which each is looked at, at most the model's T, which is exact; absent: "
        f"{DEFAULT_TERMS}",
    )


def scoring(catalogue: Catalogue) -> dict[str, Any]:
    """What `/info` says about scoring."""
    return {
        "max_images": min(MAX_SCORED, catalogue.max_images),
        "terms": min(DEFAULT_TERMS, catalogue.schedule.timesteps),
        "typicality": catalogue.typicality is not None,
    }


def to_score(request: ScoreRequest, catalogue: Catalogue, *, streamed: bool) -> ScoreOrder:
    """A job that asks the network about pictures. Raises InvalidRequestError.

    Image i has seed + i, which chooses its timesteps and its noise; the samples of its stretches have seeds
    beyond all that can be asked for, so that no two rows share noise.
    """
    check_count("images", len(request.images), catalogue)
    total = catalogue.schedule.timesteps
    if request.terms is not None and request.terms > total:
        raise InvalidRequestError("terms", f"This model has {total} timesteps.")
    label = catalogue.label_or_none(request.class_label)
    seed = first_seed(request, len(request.images))
    pixels = [decode(unpack(each, "images"), catalogue.shape, "images") for each in request.images]
    terms = min(request.terms or DEFAULT_TERMS, total)
    count = max(1, min(STRETCHES, catalogue.max_images // MAX_SCORED, terms))
    images = [from_pixels(each) for each in pixels]
    chains = [
        probing(build_probe(catalogue.schedule, part), image, seed + i + place * (MAX_SEED + 1), label)
        for i, image in enumerate(images)
        for place, part in enumerate(chunks(choose_timesteps(total, terms, seed + i), count))
    ]
    return ScoreOrder(
        job=to_job_of(request, chains, catalogue, "probe", streamed=streamed),
        parameters={
            "n": len(images),
            "seed": seed,
            "terms": terms,
            "class_label": None if label is None else catalogue.class_names[label],
            "output_format": request.output_format,
        },
        output_format=request.output_format,
        timesteps=total,
        pixels=tuple(pixels),
        priors=tuple(prior_bits(catalogue.schedule, image) for image in images),
        stretches=count,
        typicality=catalogue.typicality if label is None else None,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreOrder(Order):
    """An order for scores. priors: L_T of each image. stretches: samples of each image, one after the other.

    typicality: what is usual, where that is known of the network as it is asked here.
    """

    timesteps: int
    pixels: tuple[Pixels, ...]
    priors: tuple[float, ...]
    stretches: int
    typicality: Typicality | None

    def preview(self, event: Preview) -> dict[str, Any]:
        """Data of a stream's `preview` event: of each look, which timestep it is of and what it measured."""
        images = [
            {**self._picture(each), "kind": each.kind, "measure": _measure(each.measure)}
            for each in event.pictures
            if each.measure is not None
        ]
        return {"step": event.step, "steps": event.steps, "eta_s": round(event.eta_s, 3), "images": images}

    def finished(self, event: Finished, model: str) -> dict[str, Any]:
        """The answer as JSON, and data of a stream's `completed` event."""
        return {
            "id": event.job_id,
            "model": model,
            "scores": [
                self._score(event, index, self._bound(event, index)) for index in range(len(self.pixels))
            ],
            "parameters": self.parameters,
            "timings": timings(event),
        }

    def sheet(self, event: Finished) -> tuple[Pixels, dict[str, Any]]:
        """A row for each image: what it looks like after ever more bits, and last what it is."""
        tiles: list[Pixels] = []
        told = []
        for index, pixels in enumerate(self.pixels):
            own, bound = self._of(event.pictures, index), self._bound(event, index)
            tiles += [*(picture.pixels for picture in own), pixels]
            guesses = [_point(bound, each.measure) for each in own if each.measure is not None]
            told.append({"bits_per_dim": _short(bound.bits_per_dim), "guesses": guesses})
        return contact_sheet(tiles, columns=self.stretches + 1), {**self.parameters, "scores": told}

    def _of(self, samples: Sequence[Any], index: int) -> Sequence[Any]:
        """What belongs to an image, of what there is for each sample."""
        return samples[index * self.stretches : (index + 1) * self.stretches]

    def _measures(self, event: Finished, index: int) -> list[Measure]:
        """An image's, from the highest timestep to 0."""
        return [measure for stretch in self._of(event.measures, index) for measure in stretch]

    def _bound(self, event: Finished, index: int) -> Bound:
        found = self._measures(event, index)
        bits = [each.bits for each in found]
        return estimate(self.timesteps, self.priors[index], [each.timestep for each in found], bits)

    def _score(self, event: Finished, index: int, bound: Bound) -> dict[str, Any]:
        found = self._measures(event, index)
        own: Sequence[Picture] = self._of(event.pictures, index)
        return {
            "index": index,
            "seed": self.parameters["seed"] + index,
            "bits_per_dim": _short(bound.bits_per_dim),
            "standard_error": _short(bound.standard_error),
            "prior": _short(bound.prior),
            "terms": [_measure(each) for each in found],
            "rate_distortion": [_point(bound, each) for each in found],
            "guesses": [
                {**_point(bound, each.measure), **self._picture(each)}
                for each in own
                if each.measure is not None
            ],
            "typicality": self._typicality(found),
        }

    def _typicality(self, found: Sequence[Measure]) -> dict[str, float] | None:
        if self.typicality is None:
            return None
        score = self.typicality.score([each.timestep for each in found], [each.error for each in found])
        if score is None:
            return None
        return {"score": _short(score), "percentile": _short(self.typicality.percentile(score))}

    def _picture(self, picture: Picture) -> dict[str, Any]:
        index = picture.index // self.stretches
        return {**image_body(picture, self), "index": index, "seed": self.parameters["seed"] + index}


def _measure(measure: Measure) -> dict[str, Any]:
    return {"timestep": measure.timestep, "bits": _short(measure.bits), "mse": _short(measure.error)}


def _point(bound: Bound, measure: Measure) -> dict[str, Any]:
    """A point of the rate–distortion curve: what x at this timestep costs, and how far off its guess is."""
    rate, distortion = float(bound.rates[measure.timestep]), float(rmse(measure.error))
    return {"timestep": measure.timestep, "rate": _short(rate), "rmse": _short(distortion)}


def _short(value: float) -> float:
    """Seven digits, which is more than a network of float32 knows."""
    return float(f"{value:.7g}")
