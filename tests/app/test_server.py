"""What comes before a request is one: slow, huge and many."""

import asyncio
import hashlib
import http.client
import json
import logging
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select

import numpy as np
import pytest
from structlog.testing import capture_logs

from app import predictor
from app.access import as_cors
from app.audit import AuditLog
from app.main import create_app
from app.server import Protocol, Server, allow_files, keep_no_core, tune
from app.settings import Settings
from app.telemetry import Metrics
from app.uploads import Body
from models.turns import NotItsTurn, in_turn
from tests.lesions import encode, flat, lesion

VIEWER = "https://viewer.example"


@pytest.fixture
def server(settings: Settings, request: pytest.FixtureRequest) -> Iterator[Server]:
    seconds = getattr(request, "param", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    limited = settings.model_copy(
        update={
            "port": number,
            "header_seconds": seconds,
            "upload_seconds": seconds,
            "max_header_bytes": 2048,
            "max_connections": 5,
            "cors_origins": (VIEWER,),
        }
    )
    app = create_app(limited)
    server = Server(app, limited)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started and app.state.networks.current.batcher.ready)
    yield server
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


# For those who send nothing, or read nothing, and are to stay for as long as a test needs.
patient = pytest.mark.parametrize("server", [20.0], indirect=True)


@pytest.fixture
def port(server: Server) -> int:
    return server.config.port


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps little of what the service sends."""
    made = Protocol.connection_made

    def with_little_room(self: Protocol, transport: asyncio.Transport) -> None:
        sent = transport.get_extra_info("socket")
        sent.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", with_little_room)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def read_answer(client: socket.socket) -> bytes:
    """One whole answer, in however many pieces it comes; what follows it stays to be read."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        one = client.recv(1)
        assert one, f"the connection ended after {head!r}"
        head += one
    length = re.search(rb"(?i)content-length: (\d+)", head)
    body = b""
    while length and len(body) < int(length[1]):
        piece = client.recv(int(length[1]) - len(body))
        assert piece, f"the connection ended within the body of {head!r}"
        body += piece
    return head + body


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def problem_of(answer: bytes) -> str:
    """The end of the type's URN."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert f"content-length: {len(body)}".encode() in head
    assert re.search(rb"x-request-id: [0-9a-f]{32}", head)
    assert b"x-model-version: 1.2.3" in head
    assert re.search(rb"server-timing: [^\r]*total;dur=\d", head)
    assert re.search(rb"date: \w{3}, [\w :]+ GMT", head)  # RFC 9110, section 6.6.1
    return json.loads(body)["type"].rpartition(":")[2]


def refusals(server: Server, reason: str) -> float:
    return server.config.app.state.metrics.registry.get_sample_value(
        "mmtl_rejected_total", {"reason": reason}
    )


@pytest.mark.parametrize("sent", [b"GET /hea", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_never_end_are_timed_out(server: Server, port: int, sent: bytes) -> None:
    with connect(port) as slow:
        slow.sendall(sent)
        began = time.monotonic()
        answer = read_answer(slow)
        assert (status(answer), problem_of(answer)) == (408, "upload-too-slow")
        assert slow.recv(1000) == b""
        assert refusals(server, "upload-too-slow") == 1
        assert time.monotonic() - began < 2


def test_a_connection_without_a_request_is_closed_and_no_refusal(server: Server, port: int) -> None:
    with connect(port) as silent:
        assert silent.recv(1000) == b""
    assert refusals(server, "upload-too-slow") == 0


def test_a_byte_now_and_then_gains_no_time(port: int) -> None:
    with connect(port) as slow:
        began = time.monotonic()
        slow.sendall(b"GET /")
        with pytest.raises(ConnectionError):
            while True:
                slow.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() - began < 2


def test_headers_that_grow_are_refused(server: Server, port: int) -> None:
    with connect(port) as greedy:
        greedy.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 3000)
        answer = read_answer(greedy)
        assert (status(answer), problem_of(answer)) == (431, "headers-too-large")
        assert refusals(server, "headers-too-large") == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00 a TLS hello",
        b"hello\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_no_request_is_a_problem_like_any_other(
    server: Server, port: int, sent: bytes
) -> None:
    with connect(port) as garbled:
        garbled.sendall(sent)
        answer = read_answer(garbled)
        assert (status(answer), problem_of(answer)) == (400, "malformed-request")
        assert garbled.recv(1000) == b""
    assert refusals(server, "malformed-request") == 1


def test_an_old_client_names_no_host(port: int) -> None:
    with connect(port) as old:
        old.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert status(read_answer(old)) == 200


@pytest.mark.parametrize("cut", [0, 60, 187, 200])
@pytest.mark.parametrize("framing", ["Content-Length: 9", "Transfer-Encoding: chunked"])
def test_the_offer_of_another_protocol_costs_a_request_nothing(
    port: int, framing: str, cut: int
) -> None:
    head = (
        "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    )
    body = b"9\r\nno images\r\n0\r\n\r\n" if "chunked" in framing else b"no images"
    sent = f"{head}{framing}\r\n\r\n".encode() + body
    with connect(port) as client:
        for _ in range(2):  # on one connection
            client.sendall(sent[:cut])
            time.sleep(0.01)
            client.sendall(sent[cut:])
            answer = read_answer(client)
            assert (status(answer), problem_of(answer)) == (415, "unsupported-image")
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" + sent)
        answers = b""
        while b"unsupported-image" not in answers:
            answers += client.recv(2000)
        assert status(answers) == 200


@pytest.mark.parametrize(("target", "expected"), [(b"x:443", 400), (b"/predict", 405)])
def test_there_are_no_tunnels(port: int, target: bytes, expected: int) -> None:
    with connect(port) as client:
        client.sendall(b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\nwhatever")
        assert status(read_answer(client)) == expected


def test_headers_that_are_too_large_are_refused_even_when_whole(port: int) -> None:
    with connect(port) as greedy:
        greedy.sendall(
            b"POST /predict HTTP/1.1\r\nContent-Length: 3\r\nX: " + b"x" * 3000 + b"\r\n\r\nabc"
        )
        answer = read_answer(greedy)
        assert status(answer) == 431
        assert greedy.recv(1000) == b""


@pytest.mark.parametrize(
    ("origin", "allowed"), [(VIEWER, VIEWER), ("https://other.example", None), ("", None)]
)
def test_a_page_that_may_call_reads_why_it_is_refused(
    port: int, origin: str, allowed: str | None
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/model", headers={"Origin": origin, "X": "x" * 3000})
    answer = connection.getresponse()
    assert answer.status == 431
    assert answer.headers["Access-Control-Allow-Origin"] == allowed
    if allowed:
        assert answer.headers["Vary"] == "Origin"
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
    connection.close()


@pytest.mark.parametrize(("origin", "status"), [(VIEWER, 200), ("https://other.example", 400)])
def test_a_page_may_ask_before_it_sends_pictures_with_a_key(
    port: int, origin: str, status: int
) -> None:
    """A browser does, for a header that no form could send (Fetch standard, CORS-preflight)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    asks = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-request-id",
    }
    connection.request("OPTIONS", "/predict", headers=asks)
    answer = connection.getresponse()
    allowed = answer.headers["Access-Control-Allow-Headers"] or ""
    assert answer.status == status
    assert answer.headers["Access-Control-Allow-Origin"] == (origin if status == 200 else None)
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert {"authorization", "x-request-id"} <= {h.strip().lower() for h in allowed.split(",")}
    connection.close()


def test_any_page_may_read_where_any_may_call() -> None:
    assert as_cors(("*",), VIEWER)["Access-Control-Allow-Origin"] == "*"
    assert as_cors((), VIEWER) == {}


def test_a_large_body_is_no_large_header(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    for _ in range(3):  # on one connection
        connection.request("POST", "/predict", b"x" * 5000, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        assert json.loads(answer.read())["type"] == "urn:mmtl:problem:unsupported-image"
    connection.close()


def test_a_body_that_never_ends_is_cut_off_where_nobody_reads_it(port: int) -> None:
    from app import server

    with pytest.MonkeyPatch.context() as patch, connect(port) as slow:
        patch.setattr(server, "_MARGIN_SECONDS", 0.0)
        slow.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert status(read_answer(slow)) == 200
        began = time.monotonic()
        assert slow.recv(1000) == b""
        assert time.monotonic() - began < 2


@patient
def test_connections_are_counted(server: Server, port: int) -> None:
    taken = [connect(port) for _ in range(5)]
    until(lambda: len(server.server_state.connections) == 5)
    with connect(port) as one_more:
        answer = read_answer(one_more)
        assert (status(answer), problem_of(answer)) == (503, "saturated")
        assert b"retry-after: 1" in answer
    for connection in taken:
        connection.close()
    until(lambda: not server.server_state.connections)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/health/live")
    assert connection.getresponse().status == 200
    connection.close()


@patient
def test_who_sends_on_a_connection_too_many_gets_to_read_why(server: Server, port: int) -> None:
    body = bytes(2_000_000)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(connect(port))
        until(lambda: len(server.server_state.connections) == 5)
        for _ in range(5):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            client.request("POST", "/predict", body, {"Content-Type": "image/jpeg"})
            assert client.getresponse().status == 503
            client.close()
            until(lambda: len(server.server_state.connections) == 5)
        # Few are waited for, the latest.
        first, *_ = [held.enter_context(connect(port)) for _ in range(4)]
        until(lambda: len(server.server_state.connections) == 9)
        assert not select([first], [], [], 0.1)[0]
        began = time.monotonic()
        held.enter_context(connect(port))
        assert status(read_answer(first)) == 503
        assert first.recv(1) == b""
        assert time.monotonic() - began < 1
        until(lambda: len(server.server_state.connections) == 9)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"X: " + b"x" * 3000, 431),
        (b"Host: x\r\nTransfer-Encoding: gzip, chunked", 400),
    ],
)
def test_who_still_sends_what_is_refused_gets_to_read_why(
    port: int, head: bytes, expected: int
) -> None:
    with connect(port) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\n" + head + b"\r\n\r\n")
        for _ in range(20):
            time.sleep(0.01)
            client.sendall(bytes(100_000))
        assert status(read_answer(client)) == expected


def test_who_is_refused_makes_room(server: Server, port: int) -> None:
    with ExitStack() as stack:
        for _ in range(5):
            garbled = stack.enter_context(connect(port))
            garbled.sendall(b"hello\r\n\r\n")
            assert status(read_answer(garbled)) == 400
        assert len(server.server_state.connections) == 5
        client = stack.enter_context(connect(port))
        client.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_answer(client)) == 200


def test_a_service_that_others_keep_busy_is_not_taken_for_dead(server: Server, port: int) -> None:
    def get(path: str) -> http.client.HTTPResponse:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        client.request("GET", path)
        answer = client.getresponse()
        assert answer.read()
        client.close()
        return answer

    with ExitStack() as held:
        for _ in range(5):
            kept = held.enter_context(connect(port))
            kept.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status(read_answer(kept)) == 200
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert get(path).status == 200
            for _ in range(6):  # more than are waited for
                held.enter_context(connect(port)).sendall(b"POST /predict HTTP/1.1\r\n")
        answer = get("/health/ready?by=probe")
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert get("/model").status == 503
        assert get("/health/ready/more").status == 503
    until(lambda: not server.server_state.connections)
    assert get("/model").status == 200


def test_a_connection_that_rests_makes_room_for_a_new_one(server: Server, port: int) -> None:
    with ExitStack() as stack:
        clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=5) for _ in range(6)]
        for client in clients:
            stack.callback(client.close)
            client.request("GET", "/model")
            answer = client.getresponse()
            answer.read()
            assert answer.status == 200
        until(lambda: len(server.server_state.connections) == 5)
        resting = [client.sock for client in clients[:5]]
        closed = [one for one in resting if select([one], [], [], 0)[0]]
        assert [one.recv(1) for one in closed] == [b""]
    assert refusals(server, "saturated") == 0


@patient
def test_who_has_not_read_an_answer_makes_no_room(
    server: Server, port: int, little_room: None
) -> None:
    with ExitStack() as stack:
        for number in range(1, 6):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda number=number: server.server_state.total_requests == number)
        client = stack.enter_context(connect(port))
        client.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_answer(client)) == 503


def test_who_is_answered_before_the_body_has_come_makes_room(server: Server, port: int) -> None:
    with ExitStack() as stack:
        for number in range(5):
            slow = stack.enter_context(connect(port))
            slow.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n1")
            assert status(read_answer(slow)) == 404
            if number % 2:
                slow.sendall(b"2")
        client = stack.enter_context(connect(port))
        client.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_answer(client)) == 200


@patient
def test_a_request_that_has_begun_is_not_taken_for_rest(server: Server, port: int) -> None:
    with ExitStack() as stack:
        begun = [stack.enter_context(connect(port)) for _ in range(5)]
        for one in begun:
            one.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
            assert status(read_answer(one)) == 404
            one.sendall(b"123GET /model HTTP/1.1\r\n")
        time.sleep(0.05)
        client = stack.enter_context(connect(port))
        client.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_answer(client)) == 503
        begun[0].sendall(b"Host: x\r\n\r\n")
        assert status(read_answer(begun[0])) == 200


def test_a_connection_rests_after_an_answer_that_was_ahead_of_the_body(
    server: Server, port: int
) -> None:
    with connect(port) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        assert status(read_answer(client)) == 404
        client.sendall(b"123456789")
        time.sleep(0.6)  # header_seconds are 0.3
        client.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_answer(client)) == 200
    assert refusals(server, "upload-too-slow") == 0


def test_a_connection_may_rest_for_as_long_as_the_setting_says(settings: Settings) -> None:
    longer = settings.model_copy(update={"keep_alive_seconds": 620})
    assert Server(create_app(longer), longer).config.timeout_keep_alive == 620


@pytest.mark.parametrize("headers", ["POST /nowhere", "POST /predict"])
def test_a_body_that_is_refused_before_it_is_sent_ends_the_connection(
    port: int, headers: str
) -> None:
    with connect(port) as asking:
        asking.sendall(
            f"{headers} HTTP/1.1\r\nHost: x\r\nContent-Type: image/gif\r\n"
            "Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        answer = b""
        while more := asking.recv(1000):  # to its end, though the client sends nothing
            answer += more
        assert status(answer) in (404, 415)
        assert answer.lower().count(b"connection: close") == 1


def test_a_body_that_is_asked_for_is_sent_on_a_connection_that_stays(port: int) -> None:
    image = lesion(1)
    with connect(port) as asking:
        for _ in range(2):
            asking.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
                b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(image)
            )
            assert read_answer(asking) == b"HTTP/1.1 100 Continue\r\n\r\n"
            asking.sendall(image)
            answer = read_answer(asking)
            assert status(answer) == 200
            assert b"connection: close" not in answer.lower()


def test_a_body_that_nobody_asked_for_is_not_kept(server: Server, port: int) -> None:
    with connect(port) as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        assert status(client.recv(4096)) == 200
        (connection,) = server.server_state.connections
        assert isinstance(connection, Protocol)
        assert not connection.cycle.body


def test_what_fails_while_a_request_is_read_is_a_failure_of_the_service(
    server: Server, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Protocol, body: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(Protocol, "on_body", full)
    with connect(port) as client, capture_logs() as logs:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123")
        answer = read_answer(client)
        assert (status(answer), problem_of(answer)) == (500, "internal")
        assert client.recv(1000) == b""
    (failed,) = (line for line in logs if line["event"] == "request failed")
    (refused,) = (line for line in logs if line["event"] == "refused")
    assert failed["request_id"] == refused["request_id"]
    assert failed["exc_info"]
    assert failed["log_level"] == "error"
    assert refusals(server, "internal") == 1


INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "warned"),
    [
        (1024, 524_288, 2240, False),
        (1024, INFINITY, 2240, False),
        (64, 1024, 1024, True),
        (1024, 1024, 1024, True),
        (2240, 2240, None, False),
        (INFINITY, INFINITY, None, False),
    ],
)
def test_there_may_be_a_file_for_each_connection(
    soft: int, hard: int, raised: int | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, both: limits.append(both))
    with capture_logs() as logs:
        allow_files(1000)
    assert limits == ([] if raised is None else [(raised, hard)])
    assert [(line["event"], line["needed"]) for line in logs] == (
        [("too few open files", 2240)] if warned else []
    )


@pytest.mark.parametrize(("hard", "soft"), [(INFINITY, 1), (4096, 1), (1, 1), (0, 0)])
def test_a_process_that_fails_leaves_no_core_dump(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hard: int, soft: int
) -> None:
    limits: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (hard, hard))
    monkeypatch.setattr("resource.setrlimit", lambda which, both: limits.append((which, both)))
    monkeypatch.setattr("app.server._DUMPED", tmp_path / "coredump_filter")
    keep_no_core()
    assert limits == [(resource.RLIMIT_CORE, (soft, hard))]
    # What collects dumps gets one in spite of a limit of 0.
    assert (tmp_path / "coredump_filter").read_text() == "0"


def test_a_byte_between_two_requests_gains_no_time(port: int) -> None:
    with connect(port) as slow:
        slow.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_answer(slow)) == 200
        slow.sendall(b"\r\n")
        began = time.monotonic()
        while slow.recv(1000):
            pass
        assert time.monotonic() - began < 2


def test_many_small_chunks_are_no_large_header(port: int) -> None:
    with connect(port) as patient:
        patient.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        patient.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        size = b"0" * 30 + b"1\r\n"
        for _ in range(70):  # more than the limit, together
            patient.sendall(size)
            time.sleep(0.0005)
            patient.sendall(b"x\r\n")
            time.sleep(0.0005)
        patient.sendall(b"0\r\n\r\n")
        assert status(read_answer(patient)) == 415


@pytest.mark.parametrize("chunk", [1, 999, 1_000_000])
def test_a_body_in_chunks_of_any_size_is_put_together(port: int, chunk: int) -> None:
    data = lesion(1)
    pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    with connect(port) as client:
        client.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"
        )
        answer = http.client.HTTPResponse(client)
        answer.begin()
        image = json.load(answer)["results"][0]["image"]
    assert image["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_body_is_handed_on_without_a_copy(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    came, taken = [], []
    on_body, receive = Protocol.on_body, Body._receive

    def coming(protocol: Protocol, body: bytes) -> None:
        came.append(body)
        on_body(protocol, body)

    async def taking(body: Body) -> bytes:
        taken.append(await receive(body))
        return taken[-1]

    monkeypatch.setattr(Protocol, "on_body", coming)
    monkeypatch.setattr(Body, "_receive", taking)
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    client.request("POST", "/predict", lesion(1), {"Content-Type": "image/jpeg"})
    assert client.getresponse().status == 200
    client.close()
    assert taken[0] is came[0]


def test_a_chunk_that_is_none_is_a_problem(server: Server, port: int) -> None:
    with connect(port) as garbled:
        garbled.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        )
        time.sleep(0.05)
        garbled.sendall(b"zz\r\n")
        answer = read_answer(garbled)
        assert (status(answer), problem_of(answer)) == (400, "malformed-request")
        assert garbled.recv(1000) == b""
    assert refusals(server, "malformed-request") == 1


@pytest.mark.parametrize("cut", [0, 140, 172])
@pytest.mark.parametrize("offer", ["", "Connection: Upgrade\r\nUpgrade: h2c\r\n"])
def test_trailers_are_no_headers(port: int, offer: str, cut: int) -> None:
    """However they arrive (RFC 9110, section 6.5.1)."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n{offer}"
    trailers = f"X-Request-ID: {'a' * 32}\r\nContent-Encoding: gzip\r\nAuthorization: Bearer x"
    body = f"9\r\nno images\r\n0\r\n{trailers}\r\n\r\n"
    sent = f"{head}Transfer-Encoding: chunked\r\n\r\n{body}".encode()
    with connect(port) as client:
        for _ in range(2):  # on one connection
            client.sendall(sent[:cut])
            time.sleep(0.01)
            client.sendall(sent[cut:])
            answer = read_answer(client)
            assert (status(answer), problem_of(answer)) == (415, "unsupported-image")
            assert b"a" * 32 not in answer
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\n\r\n")
        assert b"x-request-id: mine" in read_answer(client)


def test_trailers_and_chunks_that_grow_are_cut_off(port: int) -> None:
    with connect(port) as greedy:
        greedy.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: "
        )
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - began < 5:
                greedy.sendall(b"x" * 1000)
                time.sleep(0.01)


def test_a_thousand_requests_at_once_are_not_kept(server: Server, port: int) -> None:
    with connect(port) as greedy:
        greedy.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        with pytest.raises(ConnectionError):
            while greedy.recv(100_000):
                pass
            raise ConnectionAbortedError
    assert refusals(server, "malformed-request") == 1
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/health/live")
    assert connection.getresponse().status == 200
    connection.close()


def test_who_does_not_read_the_answer_is_cut_off(port: int) -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.settimeout(10)
        deaf.sendall(
            b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 8
        )
        time.sleep(1.5)
        read = 0
        with pytest.raises(ConnectionError):
            while part := deaf.recv(1_000_000):
                read += len(part)
            raise ConnectionAbortedError
        assert read < 8_000_000


def test_who_does_not_read_a_short_answer_is_cut_off(
    server: Server, port: int, little_room: None
) -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: server.server_state.total_requests == 1)
        (connection,) = server.server_state.connections
        assert 0 < connection.transport.get_write_buffer_size() < 65_536  # which pauses nothing
        until(lambda: not server.server_state.connections)


def test_who_reads_the_answer_may_rest_for_longer_than_that(server: Server, port: int) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    for _ in range(2):
        client.request("GET", "/model")
        assert client.getresponse().read()
        time.sleep(0.5)  # upload_seconds are 0.3
        assert len(server.server_state.connections) == 1
    client.close()


def answered(metrics: Metrics, status: str) -> float | None:
    return metrics.registry.get_sample_value(
        "mmtl_http_request_duration_seconds_count",
        {"method": "POST", "route": "/predict", "status": status},
    )


def test_an_answer_that_is_cut_off_is_not_counted_as_read(server: Server, port: int) -> None:
    state = server.config.app.state
    state.settings = state.settings.model_copy(update={"max_files": 32})
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        picture = encode(noise, "JPEG")
        parts = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
            + picture
            + b"\r\n"
        ) * 32 + b"--x--\r\n"
        head = b"POST /predict?explain=true HTTP/1.1\r\nHost: x\r\n"
        head += b"Content-Type: multipart/form-data; boundary=x\r\n"
        deaf.sendall(head + b"Content-Length: %d\r\n\r\n" % len(parts) + parts)
        until(lambda: answered(state.metrics, "499") == 1)
        assert answered(state.metrics, "200") == 0


def test_images_that_nobody_waits_for_any_more_are_counted(
    server: Server, port: int, tmp_path: Path
) -> None:
    state = server.config.app.state
    state.audit = AuditLog(tmp_path / "audit.jsonl", 10_000)
    picture = flat(1, 2100, 2100)
    outcomes = state.metrics.registry.get_sample_value

    def meanwhile() -> None:
        with connect(port) as gone:
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            gone.sendall(head + b"Content-Length: %d\r\n\r\n" % len(picture) + picture)
            until(lambda: state.networks.current.batcher.admitted == 1)
        until(lambda: outcomes("mmtl_images_total", {"outcome": "gone"}) == 1)

    in_turn(meanwhile)  # so that it is not answered
    until(lambda: (tmp_path / "audit.jsonl").stat().st_size > 0)
    (line,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (line["image"], line["outcome"]) == (hashlib.sha256(picture).hexdigest(), "gone")


@pytest.mark.parametrize("ahead", [0, 12])
def test_who_goes_after_several_requests_at_once_is_gone_for_each(
    server: Server, port: int, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    state = server.config.app.state
    picture = flat(1, 2100, 2100)
    outcomes = state.metrics.registry.get_sample_value
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(picture) + picture

    def meanwhile() -> None:
        with connect(port) as gone:
            gone.sendall(request + request)
            until(lambda: state.networks.current.batcher.admitted == 1)
            with suppress(ConnectionError):  # of too many at once
                gone.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n" * ahead)
        until(lambda: outcomes("mmtl_images_total", {"outcome": "gone"}) == 1)

    in_turn(meanwhile)  # so that it is not answered
    assert not caplog.records


def test_an_upload_that_had_begun_when_the_service_ends_is_answered(
    server: Server, port: int
) -> None:
    state = server.config.app.state
    state.settings = state.settings.model_copy(update={"upload_seconds": 30.0})
    with connect(port) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n")
        slow.sendall(b"Content-Length: 9\r\n\r\nno ")
        until(lambda: len(server.server_state.tasks) == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert not state.networks.current.batcher.ready  # so that no other request is sent here
        time.sleep(0.1)
        slow.sendall(b"images")
        answer = read_answer(slow)
        assert (status(answer), problem_of(answer)) == (415, "unsupported-image")


def test_a_service_whose_network_cannot_be_replaced_ends_with_a_failure(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[object, ...]] = []

    class Timer(threading.Thread):
        def __init__(self, seconds: float, *what: object):
            super().__init__()
            ends.append((seconds > settings.deadline_seconds, *what))

        def run(self) -> None:
            ends.append(("begun",))

    server = Server(create_app(settings), settings)
    monkeypatch.setattr("app.server.threading.Timer", Timer)
    server._networks.on_failure()
    assert (server.failed, server.should_exit) == (True, True)
    until(lambda: len(ends) == 2)
    assert ends == [(True, os._exit, [1]), ("begun",)]  # where something hangs at the end


def test_an_upload_that_outlasts_the_service_is_told_so(server: Server, port: int) -> None:
    state = server.config.app.state
    state.settings = state.settings.model_copy(update={"upload_seconds": 30.0})
    server.config.timeout_graceful_shutdown = 1
    with connect(port) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n")
        slow.sendall(b"Content-Length: 1000\r\n\r\nabc")
        until(lambda: len(server.server_state.tasks) == 1)
        server.should_exit = True
        answer = read_answer(slow)
        assert (status(answer), problem_of(answer)) == (503, "draining")
        assert b"retry-after: 5" in answer


@pytest.mark.parametrize(
    "rest",
    [
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nno length\r\n",
        b"no request\r\n\r\n",
    ],
)
def test_a_refusal_is_not_taken_for_the_answer_to_an_earlier_request(
    server: Server, port: int, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    decode = predictor.decode

    def decode_later(*arguments: object, **named: object) -> object:
        go_on.wait(5)
        return decode(*arguments, **named)

    monkeypatch.setattr(predictor, "decode", decode_later)
    picture = flat(1)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with connect(port) as ahead:
        ahead.sendall(head + b"Content-Length: %d\r\n\r\n" % len(picture) + picture + rest)
        try:
            answer = ahead.recv(4096)
        finally:
            go_on.set()
    assert answer == b""
    assert refusals(server, "malformed-request") == 1


def test_a_signal_that_is_another_s_to_pass_on_stops_nothing(settings: Settings) -> None:
    server = Server(create_app(settings), settings)
    server.stops_on = {signal.SIGINT}
    server.handle_exit(signal.SIGTERM, None)
    assert (server._networks.draining, server.should_exit) == (False, False)
    server.handle_exit(signal.SIGINT, None)
    assert (server._networks.draining, server.should_exit) == (True, True)


def test_a_second_signal_waits_for_nobody(server: Server, port: int) -> None:
    state = server.config.app.state
    state.settings = state.settings.model_copy(update={"upload_seconds": 30.0})
    errors = logging.getLogger("uvicorn.error")
    try:
        with connect(port) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n")
            slow.sendall(b"Content-Length: 1000\r\n\r\nabc")
            until(lambda: len(server.server_state.tasks) == 1)
            server.handle_exit(signal.SIGTERM, None)
            assert not server.force_exit
            time.sleep(0.3)
            assert not errors.disabled  # it still waits
            server.handle_exit(signal.SIGTERM, None)
            until(lambda: errors.disabled)  # by `shutdown`, which has ended
    finally:
        errors.disabled = False


def test_a_refusal_is_not_written_into_an_answer_that_has_begun(
    server: Server, port: int, little_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "_expect_reading", lambda _: None)  # which ends it, too
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", port))
        client.sendall(
            b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        until(lambda: any(c.flow.write_paused for c in server.server_state.connections))
        client.sendall(b"zz\r\n")  # no chunk
        until(lambda: refusals(server, "malformed-request") == 1)
        answer = b""
        with suppress(ConnectionError):
            while part := client.recv(1_000_000):
                answer += part
    assert status(answer) == 200
    assert b"urn:mmtl:problem" not in answer


def test_processes_share_what_large_images_may_be_decoded_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.turns.available_cores", lambda: 4)
    monkeypatch.setattr("models.turns.available_memory", lambda: 1_000_000_000_000)
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    tune(settings, processes=4)
    with pytest.raises(NotItsTurn):
        in_turn(lambda: in_turn(int, wait=False))
    tune(settings, processes=2)
    assert in_turn(lambda: in_turn(int, wait=False)) == 0
