"""OpenAPI says all there is: every field and parameter described, and the problems of every route."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from service.app import create_app, is_open
from service.http.openapi import PROBLEM_JSON, codes_of
from service.http.problems import STATUS, ErrorFormats, problem_json
from tests.service.live import settings


@cache
def document() -> tuple[dict[str, Any], ErrorFormats]:
    app = create_app(settings(a1111=True))
    return app.openapi(), app.state.error_formats


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document()[0]["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def fields(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property of every schema in a part of the document, and where it is."""
    if isinstance(value, list):
        for index, part in enumerate(value):
            yield from fields(part, f"{place}[{index}]")
    elif isinstance(value, dict):
        properties = value.get("properties", {}) if "type" in value else {}
        for name, schema in properties.items():
            yield f"{place}.{name}", schema
        for name, part in value.items():
            if name not in ("example", "examples", "default", "enum"):
                yield from fields(part, f"{place}/{name}")


def test_every_field_is_described() -> None:
    found = list(fields(document()[0], ""))
    assert len(found) > 100
    assert [place for place, schema in found if "description" not in schema and "$ref" not in schema] == []


@pytest.mark.parametrize("name", [name for name, _ in operations()])
def test_a_route_and_its_parameters_are_described(name: str) -> None:
    operation = dict(operations())[name]
    assert operation["summary"]
    assert operation["description"]
    undescribed = [each["name"] for each in operation.get("parameters", ()) if not each.get("description")]
    assert undescribed == []
    for status, response in operation["responses"].items():
        assert response["description"], status


@pytest.mark.parametrize("name", [name for name, _ in operations()])
def test_a_route_lists_its_problems(name: str) -> None:
    operation = dict(operations())[name]
    path = name.split()[1]
    listed = {int(status) for status in operation["responses"] if int(status) >= 400}
    if 429 in listed:
        assert {503, 504} <= listed
    if "{" in path:
        assert 404 in listed
    if document()[1].of(path) is not problem_json:
        return  # errors there have another form, and other statuses
    if not is_open(path):
        assert 401 in listed
    if "requestBody" in operation:
        assert {413, 422} <= listed
    if listed & {429, 504}:
        assert 500 in listed
    if any(each["in"] == "query" for each in operation.get("parameters", ())):
        assert 422 in listed
    for status in listed:
        content = operation["responses"][str(status)]["content"]
        assert content.keys() == {PROBLEM_JSON}
        schema = content[PROBLEM_JSON]["schema"]
        assert schema["properties"]["status"]["const"] == status
        assert set(schema["properties"]["code"]["enum"]) == set(codes_of(status)) != set()


@pytest.mark.parametrize("keys", [(), ("sesame",)])
def test_keys_are_a_security_scheme_and_needed_where_the_service_has_any(keys: tuple[str, ...]) -> None:
    described = create_app(settings(a1111=True, api_keys=keys)).openapi()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in described["paths"].items():
        for operation in methods.values():
            found = list(operation["security"])
            assert ({} in found) == (not keys or is_open(path))
            assert ({"password": []} in found) == path.startswith("/sdapi/")
            assert {"key": []} in found


def test_a_scheme_that_no_route_has_is_not_listed() -> None:
    assert create_app(settings()).openapi()["components"]["securitySchemes"].keys() == {"key"}


def test_every_error_is_of_some_status() -> None:
    found = [code for status in {*STATUS.values(), 404, 413} for code in codes_of(status)]
    assert len(found) == len(set(found))
    assert {"loading", "draining", "worker_dead", "self_test_failed"} == set(codes_of(503))
    assert {"internal", "compute_failed", "non_finite", "engine_killed"} == set(codes_of(500))


def test_an_error_that_is_never_answered_is_not_listed() -> None:
    """FastAPI lists its own form of 422 for every route with parameters that lists none."""
    app = create_app(settings())

    @app.get("/things/{name}")
    async def thing(name: str) -> str:
        return name

    described = app.openapi()
    assert described["paths"]["/things/{name}"]["get"]["responses"].keys() == {"200"}
    assert (
        not {"HTTPValidationError", "ValidationError"}
        & described.get("components", {}).get("schemas", {}).keys()
    )
