"""What the drill's clients take for wrong: a service that fails must not pass."""

import hashlib
import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from benchmarks.reliability.clients import Clients

IMAGE = b"\xff\xd8 a picture"
SHA256 = hashlib.sha256(IMAGE).hexdigest()


def answer(status: int, content: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


def predicted(
    version: str = "1.0.0", sha256: str = SHA256, probability: float = 0.25, served: str = "1.0.0"
) -> bytes:
    result = {
        "image": {"sha256": sha256},
        "prediction": {"melanoma": {"probability": probability}},
    }
    body = json.dumps({"model": {"version": version}, "results": [result]}).encode()
    return answer(200, body, f"X-Model-Version: {served}")


@contextmanager
def service(sends: bytes, reset: bool = False, before: Callable[[], None] = lambda: None):
    """One connection: reads the whole request, then sends and closes (or resets) it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                read = b""
                while not read.endswith(b"--\r\n"):
                    read += connection.recv(65_536)
                before()
                connection.sendall(sends)
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            thread.join()


def clients(port: int) -> Clients:
    return Clients(port, "a key", [IMAGE], {"1.0.0": [0.25]})


def asked(port: int) -> Clients:
    asking = clients(port)
    asking.ask(0, b"POST /predict HTTP/1.1\r\n\r\n--\r\n")
    return asking


@pytest.fixture
def nobody() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        yield free.getsockname()[1]


def test_the_right_answer_is_counted_for_the_network_that_gave_it() -> None:
    with service(predicted()) as port:
        tally = asked(port).tally
    assert (dict(tally.answered), tally.wrong) == ({"1.0.0": 1}, [])


@pytest.mark.parametrize(
    ("sends", "why"),
    [
        pytest.param(answer(500, b"Internal Server Error"), "status 500", id="a text 500"),
        pytest.param(answer(503, b"{}"), "status 503", id="503 that does not say when"),
        pytest.param(answer(503, b"x", "Retry-After: 1"), "JSONDecodeError", id="503 of text"),
        pytest.param(answer(200, b"text", "X-Model-Version: 1.0.0"), "JSONDecodeError", id="text"),
        pytest.param(
            answer(200, b'{"results": []}', "X-Model-Version: 1.0.0"), "ValueError", id="no result"
        ),
        pytest.param(predicted(sha256="0" * 64), "another image", id="another image"),
        pytest.param(predicted(probability=0.5), "0.5 is not 0.25", id="another probability"),
        pytest.param(predicted("2.0.0", served="2.0.0"), "KeyError", id="an unknown network"),
        pytest.param(predicted("2.0.0"), "two networks", id="two networks"),
        pytest.param(b"", "lost", id="closed without an answer"),
        pytest.param(predicted()[:-5], "lost", id="closed in mid-answer"),
        pytest.param(b"HTTP/1.1 200", "JSONDecodeError", id="closed in the headers"),
    ],
)
def test_anything_else_is_wrong(sends: bytes, why: str) -> None:
    with service(sends) as port:
        tally = asked(port).tally
    (wrong,) = tally.wrong
    assert why in wrong
    assert not tally.answered


def test_a_refusal_that_says_when_to_come_back_is_none_of_them() -> None:
    body = b'{"type": "urn:mmtl:problem:overloaded"}'
    with service(answer(503, body, "Retry-After: 1")) as port:
        tally = asked(port).tally
    assert (dict(tally.refused), tally.wrong) == ({"overloaded": 1}, [])


def test_before_the_stop_everybody_is_let_in(nobody: int) -> None:
    assert len(asked(nobody).tally.wrong) == 1


def test_after_the_stop_nobody_need_be(nobody: int) -> None:
    late = clients(nobody)
    late.stopping = True
    late.ask(0, b"")
    assert (late.tally.not_let_in, late.tally.wrong) == (1, [])


@pytest.mark.parametrize("part", [b"", predicted()[:-5]], ids=["at once", "in mid-answer"])
def test_what_was_sent_before_the_stop_may_not_be_lost(
    part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking: list[Clients] = []
    waits = threading.Event()

    class Answer(http.client.HTTPResponse):
        def begin(self) -> None:
            waits.set()
            super().begin()

    monkeypatch.setattr(http.client, "HTTPResponse", Answer)

    def stop() -> None:
        assert waits.wait(30)
        asking[0].stopping = True

    with service(part, before=stop) as port:
        asking.append(clients(port))
        asking[0].ask(0, b"POST /predict HTTP/1.1\r\n\r\n--\r\n")
    assert "lost" in asking[0].tally.wrong[0]


def test_a_connection_that_the_kernel_took_and_nobody_accepted_is_not_let_in() -> None:
    asking: list[Clients] = []

    def stop() -> None:
        asking[0].stopping = True

    with service(b"", reset=True, before=stop) as port:
        asking.append(clients(port))
        asking[0].ask(0, b"POST /predict HTTP/1.1\r\n\r\n--\r\n")
    assert (asking[0].tally.not_let_in, asking[0].tally.wrong) == (1, [])


@pytest.mark.parametrize(
    ("sends", "passes"),
    [
        pytest.param(answer(422, b"{}"), True, id="refused"),
        pytest.param(answer(503, b"{}", "Retry-After: 1"), True, id="full"),
        pytest.param(answer(503, b"{}"), False, id="full, and does not say when"),
        pytest.param(answer(500, b""), False, id="an error"),
        pytest.param(predicted(), False, id="answered"),
        pytest.param(b"", False, id="closed"),
    ],
)
def test_garbage_is_refused(sends: bytes, passes: bool) -> None:
    with service(sends) as port:
        sending = clients(port)
        sending.send_garbage("noise", b"POST /predict HTTP/1.1\r\n\r\n--\r\n")
    assert bool(sending.tally.wrong) != passes
