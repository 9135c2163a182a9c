"""What every answer has, and the routes beside `/predict`."""

import re

import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient

from app.main import create_app
from app.problems import Problem
from app.settings import Settings
from tests.conftest import started
from tests.lesions import flat


def test_every_answer_has_its_headers(client: TestClient) -> None:
    for path in ("/health/live", "/nowhere", "/docs"):
        answer = client.get(path, headers={"X-Request-ID": "from-the-caller.1"})
        assert answer.headers["X-Request-ID"] == "from-the-caller.1"
        assert answer.headers["X-Model-Version"] == "1.2.3"
        assert answer.headers["Server-Timing"].startswith("total;dur=")
    timing = client.post("/predict", files={"files": flat(1)}).headers["Server-Timing"]
    assert re.sub(r"[0-9.]+", "", timing) == "decode;dur=, queue;dur=, inference;dur=, total;dur="


@pytest.mark.parametrize("unfit", ["", "a b", "x" * 129, "tab\t"])
def test_a_request_id_that_does_not_fit_is_replaced(client: TestClient, unfit: str) -> None:
    found = client.get("/health/live", headers={"X-Request-ID": unfit}).headers["X-Request-ID"]
    assert re.fullmatch(r"[0-9a-f]{32}", found)


def test_health(settings: Settings) -> None:
    not_started = TestClient(create_app(settings))  # its lifespan has not run
    assert not_started.get("/health/live").json() == {"status": "live"}
    answer = not_started.get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:mmtl:problem:not-ready"
    assert answer.headers["Retry-After"] == "5"
    assert not_started.post("/predict", files={"files": flat(1)}).status_code == 503
    with started(settings) as client:
        assert client.get("/health/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/metrics%0a", "/metrics%0A", "/model%0d", "/docs%00"])
def test_a_path_that_a_proxy_would_not_know_again_is_none(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:mmtl:problem:not-found")
    assert client.head(path).status_code == 404


def test_head_is_answered_wherever_get_is(client: TestClient) -> None:
    for path in ("/health/live", "/health/ready", "/model", "/metrics", "/docs", "/openapi.json"):
        assert client.head(path).status_code == 200  # as some load balancers ask
        assert client.post(path).headers["Allow"] == "GET, HEAD"
    refused = client.head("/predict")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")
    assert client.head("/nowhere").status_code == 404


def test_the_manifest_is_shown(client: TestClient) -> None:
    manifest = client.get("/model").json()
    assert (manifest["name"], manifest["version"]) == ("test", "1.2.3")
    assert manifest["artifacts"][0]["file"] == "model.onnx"


def test_a_slash_too_many_sends_no_picture_elsewhere(client: TestClient) -> None:
    answer = client.post("/predict/", files={"files": b"x"}, follow_redirects=False)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_the_documentation_needs_no_other_host(client: TestClient) -> None:
    assert client.get("/", follow_redirects=False).headers["Location"] == "/docs"
    answer = client.get("/docs")
    page = answer.text
    assert page.startswith("<!DOCTYPE html>")
    assert '<html lang="en">' in page
    assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links
    for link in links:
        assert link.startswith("/")
        assert client.get(link).status_code == 200


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    assert client.get("/nowhere").json()["type"] == "urn:mmtl:problem:not-found"
    answer = client.get("/predict")
    assert answer.json()["type"] == "urn:mmtl:problem:method-not-allowed"
    assert answer.headers["Allow"] == "POST"


def test_cors_is_off_unless_set(settings: Settings) -> None:
    origin = {"Origin": "https://viewer.example"}
    with started(settings) as client:
        assert "access-control-allow-origin" not in client.get("/model", headers=origin).headers
    allowed = settings.model_copy(update={"cors_origins": (origin["Origin"],)})
    with started(allowed) as client:
        headers = client.get("/model", headers=origin).headers
        assert headers["access-control-allow-origin"] == origin["Origin"]
        assert "X-Request-ID" in headers["access-control-expose-headers"]


@pytest.mark.parametrize("query", ["", "?explain=false"])  # past the router, and through it
@pytest.mark.parametrize(
    "error", [RuntimeError("a secret of the inside"), HTTPException(418, "a secret of the inside")]
)
def test_an_unexpected_failure_is_a_problem_too(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, query: str
) -> None:
    async def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(client.app.state.predictor, "predict", fails)
    answer = client.post(f"/predict{query}", files={"files": flat(1)})
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:mmtl:problem:internal"
    assert "secret" not in answer.text
    assert answer.headers["X-Request-ID"]


def test_bytes_in_memory_are_limited_as_the_settings_say(settings: Settings) -> None:
    few = settings.model_copy(update={"max_bytes": 1_000, "max_bytes_in_flight": 5_000})
    held = create_app(few).state.held
    held.take(1_000, declared=False)
    with pytest.raises(Problem):
        held.take(1, declared=False)
    held.take(4_000, declared=True)
    with pytest.raises(Problem):
        held.take(1, declared=True)
