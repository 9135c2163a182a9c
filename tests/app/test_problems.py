"""The table of what the service may answer in the place of an answer."""

import json

import pytest

from app import problems
from app.problems import KINDS, Kind, Problem, kind_of, respond


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_is_an_error_that_is_known_by_its_type(kind: Kind) -> None:
    answer = respond(Problem(kind, "What to do."))
    assert 400 <= answer.status_code == kind.status < 600
    assert answer.media_type == "application/problem+json"
    assert json.loads(bytes(answer.body)) == {
        "type": f"urn:mmtl:problem:{kind.name}",
        "title": kind.title,
        "status": kind.status,
        "detail": "What to do.",
    }
    assert kind_of(Problem(kind, "").body()) is kind


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_who_finds_the_service_busy_is_told_when_to_come_again(kind: Kind) -> None:
    """As the description promises for every 503."""
    headers = respond(Problem(kind, "")).headers
    assert ("Retry-After" in headers) == (kind.status == 503)
    if kind.status == 503:
        assert int(headers["Retry-After"]) == kind.retry_after > 0


def test_every_kind_is_in_the_table_once() -> None:
    kinds = [value for value in vars(problems).values() if isinstance(value, Kind)]
    assert list(KINDS.values()) == kinds
    assert len({kind.name for kind in kinds}) == len({kind.title for kind in kinds}) == len(kinds)


def test_a_problem_s_own_headers_are_sent() -> None:
    problem = Problem(problems.UNAUTHORIZED, "", {"WWW-Authenticate": "Bearer"})
    answer = respond(problem, headers={"X-Request-ID": "1"})
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Request-ID"] == "1"
