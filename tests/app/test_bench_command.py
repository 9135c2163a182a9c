import json
from collections import Counter
from pathlib import Path

import pytest

from app.load import LoadError, Measured

pytestmark = pytest.mark.usefixtures("logs_as_before")


@pytest.mark.parametrize("header", ["bogus", ": value"])
def test_a_header_without_a_name_or_a_value_is_refused(run, header: str) -> None:
    status, _, told = run("bench", "http://127.0.0.1:9", "--header", header)
    assert (status, told.strip()) == (2, "mmtl: A --header is `Name: value`.")


def test_headers_can_be_those_of_a_file(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A key on a command line is seen by everybody who may list processes."""
    file = tmp_path / "headers"
    file.write_text("Authorization: Bearer secret\n\nX-Request-ID: a\n")
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr("app.load.Target", lambda url, images, headers: sent.extend(headers))
    monkeypatch.setattr(
        "app.load.run", lambda *_, **__: Measured(1.0, 3, statuses=Counter({"200": 3}))
    )
    status, _, told = run("bench", "http://127.0.0.1:9", "--clients", "1", "--header", f"@{file}")
    assert (status, told) == (0, "")
    assert sent == [("Authorization", "Bearer secret"), ("X-Request-ID", "a")]
    status, _, told = run("bench", "http://127.0.0.1:9", "--header", f"@{file}s")
    assert (status, told.strip()) == (
        2,
        f"mmtl: --header @{file}s: the file cannot be read: No such file or directory.",
    )


@pytest.mark.parametrize(
    ("statuses", "images", "status", "said"),
    [
        ({"200": 3}, 3, 0, ""),
        ({"200": 1}, 0, 2, "No answer came in the measured time: give more --seconds."),
        (
            {},
            0,
            2,
            "No request was sent in the measured time: all clients waited for earlier answers. "
            "Give more --seconds.",
        ),
        ({"503": 2, "401": 1}, 0, 2, "No request was answered with 200: 1 x 401, 2 x 503."),
        (
            {"429": 2},
            0,
            2,
            "No request was answered with 200: 2 x 429. 429 is the key's quota, and no limit of "
            "the host: give a key without one.",
        ),
        (
            {"200": 9, "503": 2, "500": 3000, "broken": 1},
            9,
            1,
            "Some requests failed: 3,000 x 500, 1 x no answer, the connection ended.",
        ),
        (
            {"200": 9, "429": 1},
            9,
            1,
            "Some requests failed: 1 x 429. 429 is the key's quota, and no limit of the host: give "
            "a key without one.",
        ),
    ],
)
def test_a_load_without_an_answer_says_why(
    run,
    monkeypatch: pytest.MonkeyPatch,
    statuses: dict[str, int],
    images: int,
    status: int,
    said: str,
) -> None:
    measured = Measured(1.0, images, statuses=Counter(statuses))
    monkeypatch.setattr("app.load.run", lambda *_, **__: measured)
    found, _, told = run("bench", "http://127.0.0.1:9", "--clients", "1")
    assert (found, told) == (status, f"mmtl: {said}\n" if said else "")


def test_who_answers_no_client_is_not_asked_by_more(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: object, clients: int, *__: object, **___: object) -> Measured:
        asked.append(clients)
        return Measured(1.0, statuses=Counter({"404": 3}))

    monkeypatch.setattr("app.load.run", refuse)
    status, _, told = run("bench", "http://127.0.0.1:9")
    assert (status, told) == (2, "mmtl: No request was answered with 200: 3 x 404.\n")
    assert asked == [1]


def test_a_number_of_clients_may_be_measured_again(run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Counter({"500": 1, "200": 9}), Counter({"200": 7})]

    def answer(*_: object, **__: object) -> Measured:
        statuses = found.pop(0)
        images = statuses["200"]
        return Measured(1.0, images, latencies=[0.01] * images, statuses=statuses)

    monkeypatch.setattr("app.load.run", answer)
    twice = ("bench", "http://127.0.0.1:9", "--clients", "32", "--clients", "32")
    status, output, told = run(*twice)
    assert (status, told) == (1, "mmtl: Some requests failed: 1 x 500.\n")
    assert "9.0" in output
    assert "7.0" in output
    status, _, told = run(*twice, "--json")
    assert (status, "name each once" in told) == (2, True)


def test_what_was_measured_is_told_where_a_later_load_finds_nobody(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: object, clients: int, *__: object, **___: object) -> Measured:
        if clients > 1:
            raise LoadError("Nobody answers at 127.0.0.1:9: Connection refused.")
        return Measured(1.0, 7, latencies=[0.01] * 7, statuses=Counter({"200": 7}))

    monkeypatch.setattr("app.load.run", answer)
    said = "mmtl: With 8 clients: Nobody answers at 127.0.0.1:9: Connection refused.\n"
    status, output, told = run("bench", "http://127.0.0.1:9", "--json")
    assert (status, told) == (2, said)
    assert {
        clients: found["images_per_second"] for clients, found in json.loads(output).items()
    } == {"1": 7.0}
    status, output, told = run("bench", "http://127.0.0.1:9")
    assert (status, "7.0" in output, told) == (2, True, said)
    status, output, told = run("bench", "http://127.0.0.1:9", "--clients", "8")
    assert (status, output, told) == (2, "", said.replace("With 8 clients: ", ""))
