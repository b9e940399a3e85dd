"""Ids of a stream's events, and how a stream goes on where its job is not known.

An id is `<job>:<number>`. With a secret (`DDPM_RESUME_SECRET`) the events of a job whose request has no
pictures say more: `<job>:<number>:<step>:<request>:<signature>`. Whoever has the same secret, model and
runtime can compute such a job again and go on after that step: another replica, or this service after a
restart. The signature (HMAC, RFC 2104) covers all of the id and what computes, so that no other text, and
none from another model, starts a chain.
"""

from __future__ import annotations

import base64
import hmac
import json
from dataclasses import dataclass, replace

from pydantic import ValidationError

from service.engine.streams import Position
from service.errors import InvalidRequestError
from service.tasks.generate import GenerateRequest, prepare_generate
from service.tasks.sampling import ModelCapabilities, PreparedRequest

LONGEST_REQUEST = 2000
"""Characters of an id: what has more in it could not come back in a header."""
SIGNATURE_BYTES = 16
FIELDS = set(GenerateRequest.model_fields)
"""And none of those that a query has beside them."""
END = "end"
"""In the place of the step, once there is nothing left to send."""


@dataclass(frozen=True)
class EventIds:
    """Makes ids and reads them. secret: None signs none. computed_by: what bytes follow from besides."""

    secret: bytes | None = None
    computed_by: str = ""

    def of(self, prepared: PreparedRequest) -> JobIds:
        """The ids of a job's events."""
        request = "" if self.secret is None else _packed(prepared)
        signed = 0 < len(request) <= LONGEST_REQUEST
        return JobIds(prepared.spec.id, request, self if signed else None)

    def sign(self, text: str) -> str:
        """The signature of an id. Raises ValueError where there is no secret."""
        if self.secret is None:
            raise ValueError("there is no secret to sign with")
        digest = hmac.digest(self.secret, f"{text}\n{self.computed_by}".encode(), "sha256")
        return _encoded(digest[:SIGNATURE_BYTES])

    def continued(
        self, event_id: str, capabilities: ModelCapabilities
    ) -> tuple[PreparedRequest, Position] | None:
        """The job that a signed id is of, under its old id, and what its reader has seen of it.

        None for any other text, and after the last event. The job's deadline counts anew.
        """
        text, _, signature = event_id.rpartition(":")
        if self.secret is None or not hmac.compare_digest(self.sign(text).encode(), signature.encode()):
            return None
        job_id, number, step, request = text.split(":")
        if step == END:
            return None
        try:
            asked = GenerateRequest.model_validate_json(_decoded(request))
            prepared = prepare_generate(asked, capabilities)
        except (ValidationError, InvalidRequestError):  # signed by a version or a limit that is no more
            return None
        prepared = replace(prepared, spec=replace(prepared.spec, id=job_id))
        return prepared, Position(int(number), int(step))


@dataclass(frozen=True)
class JobIds:
    """The ids of one job's events. request: as in a signed id; signer: None for plain ids."""

    job_id: str
    request: str = ""
    signer: EventIds | None = None

    def at(self, number: int, step: int | None) -> str:
        """The id of event `number`. step: that it is of; None for the last event."""
        plain = f"{self.job_id}:{number}"
        if self.signer is None:
            return plain
        text = f"{plain}:{END if step is None else step}:{self.request}"
        return f"{text}:{self.signer.sign(text)}"


def parse(event_id: str) -> tuple[str, int] | None:
    """The job and the number of an id, signed or not; None for another text."""
    job_id, *rest = event_id.split(":")
    number = rest[0] if rest else ""
    # int() refuses thousands of digits, and takes those of other scripts.
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        return None
    return job_id, int(number)


def is_signed(event_id: str) -> bool:
    """Whether an id looks like a signed one; nothing is said of the signature."""
    return event_id.count(":") == 4


def is_last(event_id: str) -> bool:
    """Whether a signed id is that of a last event."""
    return is_signed(event_id) and event_id.split(":")[2] == END


def request_of(event_id: str) -> bytes:
    """The request that a signed id has, as JSON, whoever signed it; of any other id nothing."""
    return _decoded(event_id.split(":")[3]) if is_signed(event_id) else b""


def _packed(prepared: PreparedRequest) -> str:
    """A request for an id, with the seeds that were drawn for it; empty where it does not fit into one."""
    if not isinstance(prepared.request, GenerateRequest):
        return ""
    fields = prepared.request.model_dump(include=FIELDS, exclude_defaults=True)
    return _encoded(json.dumps({**fields, "seed": prepared.parameters["seed"]}, sort_keys=True).encode())


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:  # not base64, or not ASCII
        return b""
