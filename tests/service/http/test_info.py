"""What `/info` says and what OpenAPI says of it are the same."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from service.engine.messages import SelfTestResult
from service.http.info import INFO, describe
from service.http.state import capabilities_of
from tests.service.fakes import fake_info, fake_model
from tests.service.live import settings


def keys(value: Any, place: str = "") -> set[str]:
    """Every key of nested objects."""
    if not isinstance(value, dict):
        return {place}
    return {key for name, part in value.items() for key in keys(part, f"{place}.{name}")}


def described(schema: dict[str, Any], place: str = "") -> set[str]:
    """Every key that a schema has."""
    if "properties" not in schema:
        return {place}
    return {key for name, part in schema["properties"].items() for key in described(part, f"{place}.{name}")}


def test_every_key_is_described_and_no_other():
    chosen = settings()
    tested = replace(fake_info(8), self_test=SelfTestResult(0.5, 0.1))
    found = describe(capabilities_of(fake_model(), chosen), chosen, tested)
    open_keys = found["defaults"]["steps_by_sampler"], found["runtime"]["step_seconds"]
    for each in open_keys:
        each.clear()
    empty = {".defaults.steps_by_sampler", ".runtime.step_seconds"}
    assert keys(found) | empty == described(INFO)
