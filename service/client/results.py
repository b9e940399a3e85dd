"""Answers and events as values. Pictures are decoded when they are looked at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from service.client.errors import ClientError, ServiceError, from_problem

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray

NPY = "application/x-npy"


@dataclass(frozen=True)
class Image:
    """One image of an answer or of a preview.

    data: the file, in the format of media_type. class_label: its class's name, or None. share: λ, of
    `interpolate`. kind: `x0` or `xt`, of a preview.
    """

    index: int
    seed: int
    class_label: int | str | None
    data: bytes
    media_type: str
    share: float | None = None
    kind: str | None = None

    @cached_property
    def pil(self) -> PIL.Image.Image:
        """As a PIL image. Raises ValueError for an array, of which `array` has the values."""
        import PIL.Image

        if self.media_type == NPY:
            raise ValueError("This model's samples are arrays: see `array`.")
        image = PIL.Image.open(BytesIO(self.data))
        image.load()
        return image

    @cached_property
    def array(self) -> NDArray[np.uint8]:
        """As an array: [height, width, channels], or [height, width] of a picture in grey."""
        import numpy as np

        if self.media_type == NPY:
            found: NDArray[np.uint8] = np.load(BytesIO(self.data), allow_pickle=False)
            return found
        return np.asarray(self.pil)

    @property
    def suffix(self) -> str:
        """Of a file that holds it: `.png`, `.jpg`, `.webp` or `.npy`."""
        name = self.media_type.rpartition("/")[2].removeprefix("x-")
        return ".jpg" if name == "jpeg" else f".{name}"

    def save(self, path: str | Path) -> None:
        """Write the file as it came, with its parameters inside."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True)
class Result:
    """Of `generate`, `edit` and `interpolate`.

    parameters: the request with all defaults filled in. timings: `queue_s`, `run_s`, `total_s`.
    """

    id: str
    model: str
    images: Sequence[Image]
    parameters: Mapping[str, Any]
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """Of one picture; docs/api.md explains each.

    terms, rate_distortion: a mapping for each timestep. typicality: `score` and `percentile`, or None.
    """

    index: int
    seed: int
    bits_per_dim: float
    standard_error: float
    prior: float
    terms: Sequence[Mapping[str, float]]
    rate_distortion: Sequence[Mapping[str, float]]
    guesses: Sequence[Image]
    typicality: Mapping[str, float] | None


@dataclass(frozen=True)
class ScoreResult:
    """Of `score`."""

    id: str
    model: str
    scores: Sequence[Score]
    parameters: Mapping[str, Any]
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Queued:
    """The first event of a stream: `position` jobs are ahead, and all is done in about `eta_s` seconds."""

    id: str
    position: int
    eta_s: float
    seed: int | Sequence[int]


@dataclass(frozen=True)
class Preview:
    """The images after step `step` of `steps`."""

    step: int
    steps: int
    timestep: int | None
    eta_s: float
    images: Sequence[Image]


@dataclass(frozen=True)
class Completed:
    """The last event of a stream."""

    result: Result


Event: TypeAlias = Queued | Preview | Completed


@dataclass(frozen=True)
class Job:
    """A job of `submit`.

    state: waiting, running, finished, failed or cancelled. position: jobs ahead of it. result: once it is
    finished. error: of one that failed.
    """

    id: str
    state: str
    position: int | None = None
    eta_s: float | None = None
    result: Result | ScoreResult | None = None
    error: ServiceError | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in ("finished", "failed", "cancelled")


def to_result(body: Mapping[str, Any]) -> Result:
    """The JSON answer of a route that makes images."""
    labels = body["parameters"].get("class_label")
    images = tuple(_image(each, labels) for each in body["images"])
    return Result(body["id"], body["model"], images, body["parameters"], body["timings"])


def to_scores(body: Mapping[str, Any]) -> ScoreResult:
    """The JSON answer of `/score`."""
    label = body["parameters"].get("class_label")
    scores = tuple(
        Score(**{**each, "guesses": tuple(_image(guess, label) for guess in each["guesses"])})
        for each in body["scores"]
    )
    return ScoreResult(body["id"], body["model"], scores, body["parameters"], body["timings"])


def to_event(name: str, data: Mapping[str, Any], labels: object = None) -> Event | None:
    """A server-sent event; None for one of a name that is not known. Raises the error of an `error` event.

    labels: the class or classes that were asked for, which previews need not repeat.
    """
    match name:
        case "queued":
            return Queued(data["id"], data["position"], data["eta_s"], data["seed"])
        case "preview":
            images = tuple(_image(each, labels) for each in data["images"])
            return Preview(data["step"], data["steps"], data.get("timestep"), data["eta_s"], images)
        case "completed":
            return Completed(to_result(data))
        case "error":
            raise from_problem(data)
        case _:
            return None


def to_job(body: Mapping[str, Any]) -> Job:
    """The state of a job, with its result where it is finished."""
    answer = body.get("result") or body
    result: Result | ScoreResult | None = None
    if "images" in answer and "timings" in answer:
        result = to_result(answer)
    elif "scores" in answer:
        result = to_scores(answer)
    error = body.get("error")
    state = body.get("state") or ("finished" if result else "running")
    return Job(
        body["id"],
        state,
        body.get("position"),
        body.get("eta_s"),
        result,
        from_problem(error) if error else None,
    )


def pause_s(job: Job) -> float:
    """How many seconds to leave between two looks at a job."""
    return min(2.0, max(0.1, job.eta_s or 0.0))


def outcome(job: Job) -> Result | ScoreResult:
    """The result of a job that has ended. Raises the error of one that has none."""
    if job.result is not None:
        return job.result
    raise job.error or ClientError(f"Job {job.id} is {job.state} and has no result.")


def _image(body: Mapping[str, Any], labels: object) -> Image:
    """labels: the class of all images, or a list with one for each, where an image does not say its own."""
    index = body["index"]
    label = labels[index] if isinstance(labels, list | tuple) else labels
    return Image(
        index,
        body["seed"],
        body.get("class_label", label),
        base64.b64decode(body["b64_json"]),
        body["media_type"],
        body.get("lambda"),
        body.get("kind"),
    )
