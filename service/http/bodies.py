"""The contents of our own answers: JSON values for bodies and events, and contact sheets."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Protocol

from model.likelihood import Bound, rmse
from model.sheets import contact_sheet
from service.engine.messages import Finished, Measurement, Picture, Pixels, Preview, Queued
from service.tasks.images import MEDIA_TYPES, ImageFormat, encode, encode_arrays
from service.tasks.sampling import PreparedRequest
from service.tasks.score import PreparedScore


@dataclass(frozen=True)
class Tiles:
    """Pictures for one file, row by row.

    parameters: what is written into it. columns: of its contact sheet, where it is one.
    """

    pictures: list[Pixels]
    parameters: dict[str, Any]
    columns: int | None = None

    def encode(self, image_format: ImageFormat, scale: int, model: str) -> bytes:
        """An array of all of them, or one picture: a contact sheet where there are several."""
        if image_format == "npy":
            return encode_arrays(self.pictures, scale)
        sheet = contact_sheet(self.pictures, columns=self.columns)
        return encode(sheet, image_format, {**self.parameters, "model": model}, scale)


class Bodies(Protocol):
    """The results of one kind of job."""

    def preview(self, event: Preview) -> dict[str, Any]:
        """Data of a stream's `preview` event."""

    def completed(self, event: Finished, model: str) -> dict[str, Any]:
        """The answer as JSON, and data of a stream's `completed` event."""

    def tiles(self, event: Finished) -> Tiles:
        """The answer as pictures alone."""


def bodies_of(prepared: PreparedRequest) -> Bodies:
    """The bodies of a job's answers."""
    return ScoreBodies(prepared) if isinstance(prepared, PreparedScore) else ImageBodies(prepared)


def queued_body(event: Queued, prepared: PreparedRequest) -> dict[str, Any]:
    """Data of a stream's `queued` event."""
    return {
        "id": event.job_id,
        "position": event.position,
        "eta_s": round(event.eta_s, 3),
        "seed": prepared.parameters["seed"],
    }


class ImageBodies:
    """Images."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self.prepared = prepared

    def preview(self, event: Preview) -> dict[str, Any]:
        """The images, and which step they show."""
        return {
            "step": event.step,
            "steps": event.steps,
            "timestep": event.timestep,
            "eta_s": round(event.eta_s, 3),
            "images": [{**_image(each, self.prepared), "kind": each.kind} for each in event.pictures],
        }

    def completed(self, event: Finished, model: str) -> dict[str, Any]:
        """The images, each with its provenance inside: what makes this one image alone, so n is 1."""
        prepared = self.prepared
        alone = {"n": 1} if "n" in prepared.parameters else {}
        images = []
        for picture in event.pictures:
            extra = prepared.extra(picture.index)
            provenance = {**prepared.parameters, **alone, **extra, "seed": picture.seed, "model": model}
            images.append(_image(picture, prepared, provenance))
        return _completed(event, model, "images", images, prepared)

    def tiles(self, event: Finished) -> Tiles:
        """All images side by side."""
        pictures = [picture.pixels for picture in event.pictures]
        return Tiles(pictures, self.prepared.parameters, self.prepared.columns)


class ScoreBodies:
    """Likelihoods."""

    def __init__(self, prepared: PreparedScore) -> None:
        self.prepared = prepared

    def preview(self, event: Preview) -> dict[str, Any]:
        """The x₀ predictions with what was measured of each. Its timesteps differ, so each says its own."""
        images = [
            {**self._picture(each), "kind": each.kind, "measure": _term(each.measurement)}
            for each in event.pictures
            if each.measurement is not None
        ]
        return {"step": event.step, "steps": event.steps, "eta_s": round(event.eta_s, 3), "images": images}

    def completed(self, event: Finished, model: str) -> dict[str, Any]:
        """The bound of each image, its terms, and what each bit buys."""
        scores = [self._score(event, index) for index in range(len(self.prepared.pixels))]
        return _completed(event, model, "scores", scores, self.prepared)

    def tiles(self, event: Finished) -> Tiles:
        """A row for each image: predictions after more and more bits, then the image itself."""
        prepared = self.prepared
        tiles: list[Pixels] = []
        scores = []
        for index, pixels in enumerate(prepared.pixels):
            own = prepared.of_image(event.pictures, index)
            bound = prepared.bound(prepared.measurements(event, index), index)
            tiles += [*(picture.pixels for picture in own), pixels]
            points = [_point(bound, each.measurement) for each in own if each.measurement is not None]
            scores.append({"bits_per_dim": _short(bound.bits_per_dim), "guesses": points})
        return Tiles(tiles, {**prepared.parameters, "scores": scores}, prepared.chunks + 1)

    def _score(self, event: Finished, index: int) -> dict[str, Any]:
        prepared = self.prepared
        found = prepared.measurements(event, index)
        bound = prepared.bound(found, index)
        return {
            "index": index,
            "seed": prepared.parameters["seed"] + index,
            "bits_per_dim": _short(bound.bits_per_dim),
            "standard_error": _short(bound.standard_error),
            "prior": _short(bound.prior),
            "terms": [_term(each) for each in found],
            "rate_distortion": [_point(bound, each) for each in found],
            "guesses": [
                {**_point(bound, each.measurement), **self._picture(each)}
                for each in prepared.of_image(event.pictures, index)
                if each.measurement is not None
            ],
            "typicality": self._typicality(prepared.atypicality(found)),
        }

    def _typicality(self, score: float | None) -> dict[str, float] | None:
        if score is None or self.prepared.typicality is None:
            return None
        return {"score": _short(score), "percentile": _short(self.prepared.typicality.percentile(score))}

    def _picture(self, picture: Picture) -> dict[str, Any]:
        index = picture.index // self.prepared.chunks
        seed = self.prepared.parameters["seed"] + index
        return {**_image(picture, self.prepared), "index": index, "seed": seed}


def _completed(
    event: Finished, model: str, name: str, results: list[dict[str, Any]], prepared: PreparedRequest
) -> dict[str, Any]:
    return {
        "id": event.job_id,
        "model": model,
        name: results,
        "parameters": prepared.parameters,
        "timings": {
            "queue_s": round(event.queue_s, 4),
            "run_s": round(event.run_s, 4),
            "total_s": round(event.queue_s + event.run_s, 4),
        },
    }


def _image(
    picture: Picture, prepared: PreparedRequest, provenance: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One image inside JSON."""
    passing = provenance is None
    data = encode(picture.pixels, prepared.output_format, provenance, prepared.scale, passing=passing)
    return {
        "index": picture.index,
        "seed": picture.seed,
        **prepared.extra(picture.index),
        "b64_json": base64.b64encode(data).decode(),
        "media_type": MEDIA_TYPES[prepared.output_format],
    }


def _term(found: Measurement) -> dict[str, Any]:
    return {"timestep": found.timestep, "bits": _short(found.bits), "mse": _short(found.mse)}


def _point(bound: Bound, found: Measurement) -> dict[str, Any]:
    """A point of the rate–distortion curve: what x at this timestep costs, and its prediction's error."""
    rate, distortion = float(bound.rates[found.timestep]), float(rmse(found.mse))
    return {"timestep": found.timestep, "rate": _short(rate), "rmse": _short(distortion)}


def _short(value: float) -> float:
    """Seven digits, which is more than the precision of a float32 network."""
    return float(f"{value:.7g}")
