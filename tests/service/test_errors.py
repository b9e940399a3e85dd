"""The error tree: codes are stable, and the one table has a status for each."""

from __future__ import annotations

import pytest

from service import errors
from service.http.problems import STATUS, to_problem

CODES = {
    "InvalidRequestError": ("invalid_request", 422),
    "UnauthorizedError": ("unauthorized", 401),
    "NotAcceptableError": ("not_acceptable", 406),
    "JobNotFoundError": ("job_not_found", 404),
    "ForbiddenError": ("forbidden", 403),
    "HostError": ("host_not_allowed", 403),
    "CrossSiteError": ("cross_site", 403),
    "RefusedError": ("refused", 503),
    "QueueFullError": ("queue_full", 429),
    "ClientLimitError": ("client_limit", 429),
    "LoadingError": ("loading", 503),
    "DrainingError": ("draining", 503),
    "EngineDeadError": ("worker_dead", 503),
    "SelfTestError": ("self_test_failed", 503),
    "DeadlineError": ("deadline_exceeded", 504),
    "CancelledError": ("cancelled", 499),
    "ComputeError": ("compute_failed", 500),
    "NonFiniteError": ("non_finite", 500),
    "EngineKilledError": ("engine_killed", 500),
    "ServiceError": ("error", 500),
}
"""Part of the wire interface: a change here breaks clients."""


def tree() -> dict[str, type[errors.ServiceError]]:
    found = [errors.ServiceError]
    for kind in found:
        found += kind.__subclasses__()
    return {kind.__name__: kind for kind in found if kind.__module__ == errors.__name__}


def test_every_error_is_listed_here() -> None:
    assert tree().keys() == CODES.keys()


@pytest.mark.parametrize("name", CODES)
def test_codes_and_statuses(name: str) -> None:
    kind = tree()[name]
    arguments: tuple[object, ...] = ("why",)
    if issubclass(kind, errors.InvalidRequestError):
        arguments = ("n", "why")
    if issubclass(kind, errors.RefusedError):
        arguments = ("why", 3.0)
    error = kind(*arguments)  # type: ignore[arg-type]  # constructors differ
    problem = to_problem(error)
    assert (problem.code, problem.status) == CODES[name]
    assert problem.detail == error.detail == str(error) == "why"
    assert problem.title
    assert (problem.errors is not None) == isinstance(error, errors.InvalidRequestError)


def test_the_table_holds_no_other() -> None:
    assert set(STATUS) <= set(tree().values())


def test_the_docstring_draws_the_tree() -> None:
    assert errors.__doc__ is not None
    for name in CODES:
        assert name in errors.__doc__
