"""The documents name everything there is and nothing else, their links lead somewhere, the version is one."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import errors

ROOT = Path(__file__).parent.parent
MAX_README_LINES = 120
MAX_README_COLUMNS = 120

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "weights/*/README.md")
    for path in ROOT.glob(pattern)
)


def text(file: str) -> str:
    return (ROOT / file).read_text()


# ----------------------------------------------------------------------------------------------------
# The version is one.


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads(text("pyproject.toml"))["project"]
    return table


def test_the_changelog_opens_with_this_version():
    newest = re.search(r"^## \[?([^\]\s]+)", text("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project()["version"]


def test_the_service_has_this_version():
    tree = ast.parse(text("service/__init__.py"))
    versions = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if [getattr(target, "id", None) for target in node.targets] == ["__version__"]
    ]
    assert versions == [project()["version"]]


def test_the_image_has_this_version():
    version = project()["version"]
    assert f'org.opencontainers.image.version="{version}"' in text("Dockerfile")
    compose = yaml.safe_load(text("docker-compose.yml"))
    assert compose["services"]["ddpm"]["image"] == f"ddpm-service:{version}"
    gpu = yaml.safe_load(text("docker/compose.gpu.yml"))
    assert gpu["services"]["ddpm"]["image"] == f"ddpm-service:{version}-cuda"


# ----------------------------------------------------------------------------------------------------
# Settings and metrics: all of them in docs/operations.md, and no file names one that does not exist.


def settings() -> set[str]:
    """The environment variables that the service reads."""
    from service.settings import Settings

    prefix = Settings.model_config["env_prefix"]
    return {f"{prefix}{name}".upper() for name in Settings.model_fields}


def metrics() -> set[str]:
    """The names of the metrics as PromQL knows them."""
    from service.telemetry import Telemetry

    families = list(Telemetry().registry.collect())
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    return {name for name in names if name.startswith("ddpm_")}  # the others are the same everywhere


def named(file: str, prefix: str) -> set[str]:
    """Every name with this prefix in a file."""
    return set(re.findall(rf"\b{prefix}\w*[a-zA-Z0-9]\b", text(file)))


def first_cells(lines: list[str]) -> set[str]:
    """The names in backticks in the first column of a table."""
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def tables(document: str, header: str) -> list[list[str]]:
    """The rows of every table whose first column has this header."""
    found = []
    lines = iter(document.splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            next(lines)  # the rule below the header
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(row)
            found.append(rows)
    return found


def test_every_setting_has_its_row_in_operations():
    (table,) = tables(text("docs/operations.md"), "Setting")
    assert first_cells(table) == settings()


def test_every_metric_has_its_row_in_operations():
    (table,) = tables(text("docs/operations.md"), "Metric")
    assert first_cells(table) == metrics()


@pytest.mark.parametrize(
    "file",
    [*DOCUMENTS, "Dockerfile", "docker-compose.yml", "docker/compose.gpu.yml", "docker/healthcheck.py"],
)
def test_no_file_names_a_setting_that_does_not_exist(file):
    from service.settings import ELSEWHERE

    assert named(file, "DDPM_") - settings() - ELSEWHERE == set()


@pytest.mark.parametrize("file", [*DOCUMENTS, "docker/alerts.yml", "docker/alerts_test.yml"])
def test_no_file_names_a_metric_that_does_not_exist(file):
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named(file, "ddpm_")}
    assert found - metrics() == set()


def test_every_alert_has_its_row_in_operations():
    (table,) = tables(text("docs/operations.md"), "Alert")
    (group,) = yaml.safe_load(text("docker/alerts.yml"))["groups"]
    severity = {row.split("|")[1].strip(" `"): row.split("|")[2].strip() for row in table}
    for rule in group["rules"]:
        assert severity[rule["alert"]] == rule["labels"]["severity"]


def test_a_name_must_be_whole():
    assert "ddpm_ready" not in set(re.findall(r"\bddpm_\w*[a-zA-Z0-9]\b", "ddpm_ready_or_not"))


# ----------------------------------------------------------------------------------------------------
# Requests: every route, field and error code in docs/api.md.


@cache
def openapi() -> dict[str, Any]:
    """The schema that the service generates, from which clients learn routes and fields."""
    from service.app import create_app
    from service.settings import Settings

    document: dict[str, Any] = create_app(Settings(_env_file=None, a1111=True)).openapi()
    return document


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation."""
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def fields(operation: dict[str, Any]) -> set[str]:
    """The fields of an operation's body and the parameters of its query."""
    found = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"}
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = content["schema"]
        if "$ref" in schema:
            schema = openapi()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        found |= schema["properties"].keys()
    return found


REQUESTS = {
    "/generate": "Generate",
    "/stream": "Generate",
    "/edit": "Edit",
    "/interpolate": "Interpolate",
    "/score": "Score",
    "/v1/images/generations": "OpenAI's Images API",
    "/v1/images/edits": "OpenAI's Images API",
    "/sdapi/v1/txt2img": "AUTOMATIC1111's API",
    "/sdapi/v1/img2img": "AUTOMATIC1111's API",
    "/sdapi/v1/progress": "AUTOMATIC1111's API",
    "/sdapi/v1/options": "AUTOMATIC1111's API",
    "/jobs/{job_id}": "Jobs",
}
"""The section of docs/api.md that has a route's fields."""


def section(title: str) -> str:
    """A section of docs/api.md, by its heading."""
    sections = re.split(r"^## ", text("docs/api.md"), flags=re.MULTILINE)
    (found,) = (each for each in sections if each.partition("\n")[0] == title)
    return found


def documented(title: str) -> set[str]:
    """The fields in the field table of a section."""
    (table,) = tables(section(title), "Field")
    return first_cells(table)


def test_every_route_with_fields_has_a_section():
    assert {path for _, path, operation in operations() if fields(operation)} == REQUESTS.keys()


@pytest.mark.parametrize("path", REQUESTS)
def test_every_field_is_in_the_table_of_its_section(path):
    title = REQUESTS[path]
    known = documented(title)
    if title != "Generate" and "all fields of [`/generate`](#generate)" in section(title):
        known |= documented("Generate")
    wanted = {name for _, found, operation in operations() if found == path for name in fields(operation)}
    assert wanted
    assert wanted - known == set()


@pytest.mark.parametrize("title", sorted(set(REQUESTS.values())))
def test_no_table_has_a_field_that_does_not_exist(title):
    wanted = {
        name
        for _, path, operation in operations()
        if REQUESTS.get(path) == title
        for name in fields(operation)
    }
    assert documented(title) - wanted == set()


def test_every_route_is_in_the_api_reference():
    (table,) = tables(text("docs/api.md"), "Route")
    known = {name for line in table for name in re.findall(r"`((?:GET|POST|DELETE) [^`]+)`", line)}
    assert {f"{method} {path}" for method, path, _ in operations()} - known == set()


def codes(kind: type[errors.ServiceError] = errors.ServiceError) -> set[str]:
    """The codes of all errors that are raised: those of the tree's leaves and of every class with its own."""
    below = {code for child in kind.__subclasses__() for code in codes(child)}
    abstract = kind in (errors.ServiceError, errors.ForbiddenError, errors.RefusedError)
    return below if abstract else below | {kind.code}


def test_every_error_code_is_in_the_api_reference():
    (table,) = tables(section("Errors"), "Status")
    known = {name for line in table for name in re.findall(r"`([^`]+)`", line.split("|")[2])}
    assert len(codes()) > 5
    assert codes() - known == set()


# ----------------------------------------------------------------------------------------------------
# Security and reliability: each defence has its test.


def named_tests(file: str) -> set[str]:
    """The names of tests in a document."""
    return set(re.findall(r"`(test_\w+)`", text(file)))


def defined_tests() -> set[str]:
    """The names of all tests that there are."""
    files = (ROOT / "tests").rglob("test_*.py")
    return {
        name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }


@pytest.mark.parametrize("file", ["docs/security.md", "docs/reliability.md"])
def test_every_test_that_a_review_names_exists(file):
    assert len(named_tests(file)) > 50
    assert named_tests(file) - defined_tests() == set()


# ----------------------------------------------------------------------------------------------------
# The README is short, the index is complete, and every link leads somewhere.


def test_the_readme_is_short():
    lines = text("README.md").splitlines()
    assert len(lines) <= MAX_README_LINES
    assert [line for line in lines if len(line) > MAX_README_COLUMNS] == []


def prose(document: str) -> str:
    """A document without its code blocks, in which neither links nor headings count."""
    return re.sub(r"^```.*?^```|^ {4}.*?$", "", document, flags=re.MULTILINE | re.DOTALL)


def links(file: str) -> list[str]:
    """The targets of a document's links and pictures, but for those on the web."""
    inline = re.findall(r"\]\(([^)\s]+)\)", prose(text(file)))
    return [target for target in inline if "://" not in target and not target.startswith("mailto:")]


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(document), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("file", DOCUMENTS)
def test_every_link_leads_somewhere(file):
    broken = []
    for target in links(file):
        path, _, anchor = target.partition("#")
        found = (ROOT / file).parent / path if path else ROOT / file
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            broken.append(target)
    assert broken == []


def test_links_and_anchors_are_found():
    assert {"docs/api.md", "docs/page.png"} <= set(links("README.md"))
    assert any("#" in target for target in links("README.md"))
    document = "# A b, c\n## `x` & [y](z)\n## A b, c\n\n    # code\n\n```sh\n# more code\n```\n"
    assert anchors(document) == {"a-b-c", "x--y", "a-b-c-1"}


def test_the_index_names_every_document():
    wanted = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert wanted - set(links("docs/README.md")) == set()
    assert {"../ARCHITECTURE.md", "../CONTRIBUTING.md", "../CHANGELOG.md"} <= set(links("docs/README.md"))


def test_the_readme_leads_to_the_index():
    assert "docs/README.md" in links("README.md")
