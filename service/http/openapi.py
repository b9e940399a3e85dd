"""What OpenAPI says of answers: the forms of a result, and the problems that a route may answer with.

The codes of each status come from the error tree and the one table of statuses, so none can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from service.errors import ServiceError
from service.http.answers import EVENTS, JSON
from service.http.problems import STATUS, Problem
from service.tasks.images import MEDIA_TYPES

Responses = dict[int | str, dict[str, Any]]

PROBLEM_JSON = "application/problem+json"
BESIDE = {404: ("not_found",), 413: ("content_too_large",), 500: ("internal",)}
"""Codes that are no error of the tree: Starlette's own, and a bug's."""
ABSTRACT = ("forbidden", "refused")
"""Codes of errors that only their kinds are raised as."""
MEANINGS = {
    401: "No API key, or an unknown one, where the service has keys",
    403: "The service is not called by this name, or a page of another site asks",
    404: "There is no such thing",
    406: "The Accept header names none of our media types",
    413: "The body is too large",
    422: "Invalid request; `errors` lists the fields",
    429: "Queue full; Retry-After says when to try again",
    499: "The job was cancelled",
    500: "The job failed, alone, or there is a bug",
    503: "Loading, draining or failed; Retry-After says when to try again",
    504: "The deadline has passed or cannot be met",
}
KEY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "one of DDPM_API_KEYS"},
    "password": {"type": "http", "scheme": "basic", "description": "a key as the password of any user"},
}
EVENTS_OF_A_JOB = "`queued`, `preview` …, then `completed` with the JSON answer, or `error` with a problem"


class DocumentedApp(FastAPI):
    """FastAPI, without the form of 422 that it lists by itself and that none of our routes answers.

    needs_key(path): whether a path needs a key; None where the service has no keys.
    """

    def __init__(self, *, needs_key: Callable[[str], bool] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        """The description, made at the first call."""
        if self.openapi_schema is None:
            found = super().openapi()
            self._add_security(found)
            schemas = found.get("components", {}).get("schemas", {})
            if schemas.pop("HTTPValidationError", None):
                schemas.pop("ValidationError", None)
                for operation in (each for path in found["paths"].values() for each in path.values()):
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
        return super().openapi()

    def _add_security(self, description: dict[str, Any]) -> None:
        """Say how a key is sent, and where one is needed; where the service has none, it may be sent."""
        for path, operations in description["paths"].items():
            schemes: list[dict[str, list[str]]] = [
                {name: []} for name in KEY_SCHEMES if name == "key" or path.startswith("/sdapi/")
            ]
            needed = self.needs_key is not None and self.needs_key(path)
            for operation in operations.values():
                operation["security"] = schemes if needed else [{}, *schemes]
                known = description.setdefault("components", {}).setdefault("securitySchemes", {})
                known.update({name: KEY_SCHEMES[name] for scheme in schemes for name in scheme})


def codes_of(status: int) -> list[str]:
    """The codes of all errors that are answered by a status."""
    found = list(BESIDE.get(status, ()))
    kinds = ServiceError.__subclasses__()
    for kind in kinds:
        kinds += kind.__subclasses__()
        nearest = next(STATUS[base] for base in kind.__mro__ if base in STATUS)
        if nearest == status and kind.code not in ABSTRACT:
            found.append(kind.code)
    return found


def problems(*statuses: int) -> Responses:
    """The `responses` of a route for these statuses, each with its codes."""
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> dict[str, Any]:
    codes = codes_of(status)
    schema = Problem.model_json_schema()
    properties = {**schema["properties"]}
    properties["status"] = {**properties["status"], "const": status}
    properties["code"] = {**properties["code"], "enum": codes}
    described = f"{MEANINGS[status]} ({', '.join(f'`{code}`' for code in codes)})"
    return {
        "description": described,
        "content": {PROBLEM_JSON: {"schema": {**schema, "properties": properties}}},
    }


def typed(description: str, kind: str = "string", **more: Any) -> dict[str, Any]:
    """The schema of a value of one JSON type. more: its other keywords."""
    return {"type": kind, "description": description, **more}


def objects(description: str, *, optional: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    """The schema of an object that has these properties, and may have others. optional: those it may lack."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "description": description, "properties": properties, "required": required}


def lists(description: str, items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The schema of an array. more: its other keywords."""
    return {"type": "array", "description": description, "items": items, **more}


def described(schema: Mapping[str, Any]) -> Responses:
    """The `responses` of a route whose answer is JSON of this schema."""
    return {200: {"description": schema["description"], "content": {JSON: {"schema": schema}}}}


def events(description: str, names: Sequence[str]) -> dict[str, Any]:
    """The description of a stream of server-sent events, with the names that they may have.

    `itemSchema` is OpenAPI 3.2's; FastAPI writes it into its 3.1, too.
    """
    data = typed("JSON", contentMediaType="application/json", contentSchema={"type": "object"})
    event = typed("what it is", enum=list(names))
    sent = objects(description, event=event, id=typed("to be sent as Last-Event-ID"), data=data)
    return {"itemSchema": sent}


RESULT = objects(
    "The results of a job, with all that is needed to repeat it.",
    optional=("images", "scores"),
    id=typed("the job"),
    model=typed("name of the model"),
    images=lists(
        "the images; not from /score",
        objects(
            "One image.",
            index=typed("its place in the answer", "integer"),
            seed=typed("the seed that gives this image alone", "integer"),
            b64_json=typed("the picture, or the array, in base64"),
            media_type=typed("its format"),
        ),
    ),
    scores=lists(
        "from /score instead of images: the bound of each picture and its terms",
        typed("docs/api.md has its keys", "object"),
    ),
    parameters=typed("the request with every default filled in", "object"),
    timings=objects(
        "Seconds.",
        queue_s=typed("until the first step", "number"),
        run_s=typed("from the first step to the last", "number"),
        total_s=typed("both", "number"),
    ),
)
"""The JSON of an answer."""
STATE = objects(
    "How far a job is, or what it has ended with.",
    optional=("position", "eta_s", "progress", "previews", "result", "error"),
    id=typed("the job"),
    state=typed("what it does", enum=["waiting", "running", "finished", "failed", "cancelled"]),
    position={"type": ["integer", "null"], "description": "how many are ahead of it while it waits"},
    eta_s={"type": ["number", "null"], "description": "seconds until it should be finished"},
    progress=typed("share of its network evaluations that is done", "number"),
    previews=lists("the latest x₀ predictions, where they were asked for", {"type": "object"}),
    result={**RESULT, "description": "as its POST would have answered"},
    error={**Problem.model_json_schema(), "description": "why there is no result"},
)
"""The JSON of a job that is asked about."""
JOB_STATE = {JSON: {"schema": STATE}}
JOB_EVENTS = events(EVENTS_OF_A_JOB, ("queued", "preview", "completed", "error"))
REFUSALS = problems(401, 403, 406, 413, 422, 429, 499, 500, 503, 504)
"""Of a route that takes a body and runs a job."""
ANSWERS: Responses = {
    200: {
        "description": "The result, in the form that the Accept header chooses",
        "content": {
            JSON: {"schema": RESULT},
            **{media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES.values()},
            EVENTS: JOB_EVENTS,
        },
    },
    **REFUSALS,
}
"""Of such a route that negotiates the form of its answer."""
OUTCOMES: Responses = {
    **ANSWERS,
    202: {
        "description": "With `Prefer: respond-async`: `Location` is the job's address",
        "content": JOB_STATE,
    },
}
"""Of a POST that may go on without its client."""
CACHED_PICTURE: Responses = {
    **{status: each for status, each in ANSWERS.items() if status != 413},
    304: {"description": "`If-None-Match` names the picture; nothing was computed"},
}
"""Of a route that answers with a picture by its address, and takes no body."""
EVENT_STREAM: Responses = {
    200: {"description": "The job's events", "content": {EVENTS: JOB_EVENTS}},
    204: {"description": "Nothing is left of the stream that was to be continued"},
    **problems(401, 403, 422, 429, 499, 500, 503, 504),
}
"""Of a route that streams, whatever the client accepts, and takes no body."""
