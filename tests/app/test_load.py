import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app import load
from app.load import LoadError, Measured, Target, draw_images, run_load
from models.images import decode

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def server(answer: bytes, seconds: float = 0.0) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Reads a request, waits, and answers; notes every body."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                await asyncio.sleep(seconds)
                writer.write(answer)
                if not answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", bodies


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"


async def test_a_closed_loop_sends_the_images_in_turn_and_times_the_answers() -> None:
    async with server(OK, 0.01) as (url, bodies):
        found = await run_load(Target(url, [b"one", b"two"]), 2, 0.3, 0.05)
    assert found.statuses.keys() == {"200"}
    assert {b"one" in body for body in bodies} == {True, False}
    summary = found.summary()
    assert summary["p50_ms"] >= 10
    assert 0 < summary["images_per_second"] <= 210
    assert summary["answers_in_all"] == len(bodies) >= len(found.latencies)


async def test_a_closed_loop_is_measured_once_every_client_has_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of answers that come all together every 0.3 seconds, half that later: then 0.3 hold one."""
    monkeypatch.setattr("random.random", lambda: 0.5)
    async with server(OK, 0.3) as (url, _):
        found = await run_load(Target(url, [b"x"]), 4, 0.3, 0.01)
    assert found.images == 4
    assert found.answers_in_all == 12


async def test_answers_that_come_after_the_end_are_waited_for_and_timed() -> None:
    async with server(OK, 0.3) as (url, _):
        found = await run_load(Target(url, [b"x"]), 2, 0.1, 0.0)
    assert len(found.latencies) == 2
    assert min(found.latencies) >= 0.3
    assert found.summary()["images_per_second"] == 0  # none came in that time


async def test_an_open_loop_counts_from_the_arrival() -> None:
    """One connection that answers 20 a second, and 100 arrivals: who comes late waits long."""
    async with server(OK, 0.05) as (url, _):
        found = await run_load(Target(url, [b"x"]), 1, 0.5, 0.0, rate=100)
    assert max(found.latencies) > 0.25
    # For as long again what waits is sent; the rest never is.
    assert 15 <= len(found.latencies) <= 22
    assert found.unsent > 10
    assert found.summary()["images_per_second"] <= 20


@pytest.mark.parametrize("seed", [0, 1])
async def test_as_many_arrive_as_the_rate_says(seed: int) -> None:
    async with server(OK) as (url, bodies):
        found = await run_load(Target(url, [b"x"]), 8, 0.4, 0.2, rate=50, seed=seed)
    assert (sum(found.statuses.values()), len(bodies)) == (20, 30)


def test_when_they_arrive_is_of_the_seed() -> None:
    def arrivals(seed: int) -> list[float]:
        made = load._Load(Target("http://a", [b"x"]), 1, 10.0, 0.0, 5.0, None, seed)
        made._begin(made._opened)
        return [at - made._opened for at in made._arrivals(5.0)]

    assert arrivals(0) == pytest.approx(arrivals(0))
    assert arrivals(0) != pytest.approx(arrivals(1))
    assert arrivals(1) == sorted(arrivals(1))
    assert 0 <= arrivals(1)[0] < arrivals(1)[-1] < 10


async def test_an_open_loop_keeps_to_few_connections_while_they_suffice() -> None:
    connections = set()

    class Noted(load._Connection):
        async def send(self, request: bytes) -> tuple[int, bool]:
            connections.add(id(self))
            return await super().send(request)

    async with server(OK) as (url, _):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(load, "_Connection", Noted)
            found = await run_load(Target(url, [b"x"]), 20, 0.5, 0.0, rate=60)
    assert found.statuses["200"] > 10
    assert len(connections) < 8


@pytest.mark.parametrize("rate", [None, 100.0])
async def test_connections_are_opened_anew_after_so_many_answers(rate: float | None) -> None:
    ports: list[int] = []

    class Noted(load._Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            ports.append(transport.get_extra_info("sockname")[1])
            super().connection_made(transport)

    async with server(OK, 0.005) as (url, bodies):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(load, "_Connection", Noted)
            await run_load(Target(url, [b"x"]), 2, 0.3, 0.0, rate, reconnect_every=3)
    # The two clients do not begin with the same number of answers left; and connections that are
    # opened at the beginning of an open loop, to see whether anybody is there, are not used.
    unused = 2 if rate else 0
    assert len(bodies) / 3 <= len(ports) - unused <= len(bodies) / 3 + 2
    assert len(ports) > 5


async def test_each_arrival_may_have_a_connection_of_its_own() -> None:
    used: list[int] = []

    class Noted(load._Connection):
        async def send(self, request: bytes) -> tuple[int, bool]:
            assert self._transport is not None
            used.append(self._transport.get_extra_info("sockname")[1])
            return await super().send(request)

    async with server(OK) as (url, bodies):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(load, "_Connection", Noted)
            await run_load(Target(url, [b"x"]), 4, 0.3, 0.0, 100.0, reconnect_every=1)
    assert len(set(used)) == len(used) == len(bodies) > 10


async def test_refusals_are_told_apart_and_must_say_when_to_try_again() -> None:
    async with server(BUSY + b"\r\n") as (url, _):
        mute = (await run_load(Target(url, [b"x"]), 1, 0.1, 0.0)).summary()
    async with server(BUSY + b"Retry-After: 1\r\n\r\n") as (url, _):
        polite = (await run_load(Target(url, [b"x"]), 1, 0.1, 0.0)).summary()
    assert mute["refused"] == mute["without_retry_after"] > 0
    assert polite["refused"] > polite["without_retry_after"] == 0
    assert mute["failed"] == mute["images_per_second"] == 0
    assert mute["p50_ms"] is None


async def test_a_connection_that_breaks_is_a_failure_and_another_is_opened() -> None:
    async with server(b"") as (url, bodies):
        found = await run_load(Target(url, [b"x"]), 1, 0.1, 0.0)
    assert found.summary()["failed"] == len(found.statuses) * found.statuses["broken"] > 1
    assert len(bodies) > 1


@asynccontextmanager
async def closing(*pieces: bytes) -> AsyncIterator[str]:
    """Reads a request, answers in pieces, and ends the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_an_answer_may_end_with_its_connection(version: bytes) -> None:
    async with closing(b"HTTP/%b 200 OK\r\nServer: old\r\n\r\n" % version, b"{", b"}") as url:
        found = await run_load(Target(url, [b"x"]), 2, 0.2, 0.05)
    assert found.statuses.keys() == {"200"}


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nServ", OK[:-1]], ids=["head", "body"])
async def test_an_answer_that_is_cut_off_is_none(answer: bytes) -> None:
    async with closing(answer) as url:
        found = await run_load(Target(url, [b"x"]), 1, 0.1, 0.0)
    assert found.statuses.keys() == {"broken"}


async def test_an_interim_answer_is_not_the_answer() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nRetry-After: 1\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    async with server(interim + BUSY + b"\r\n", 0.01) as (url, _):
        found = await run_load(Target(url, [b"x"]), 1, 0.1, 0.0)
    assert found.statuses.keys() == {"503"}
    assert found.without_retry_after == found.statuses["503"]


async def test_a_service_that_goes_is_failures_and_what_was_measured_is_kept() -> None:
    once = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    async with server(once, 0.01) as (url, _):
        running = asyncio.create_task(run_load(Target(url, [b"x"]), 2, 0.5, 0.0))
        await asyncio.sleep(0.2)
    found = await running
    assert found.statuses["200"] > 1
    assert found.statuses["broken"] > 1


async def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(LoadError, match=r"Nobody answers at 127\.0\.0\.1:1"):
        await run_load(Target("http://127.0.0.1:1", [b"x"]), 3, 0.1)


async def test_a_service_that_never_answers_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "_PATIENCE_SECONDS", 0.1)
    async with server(OK, 0.5) as (url, _):
        for rate in (None, 50.0):
            with pytest.raises(LoadError, match="takes connections, and answered nothing"):
                await run_load(Target(url, [b"x"]), 2, 5, rate=rate)
        await asyncio.sleep(0.6)  # until it has seen that they are gone


async def test_nobody_is_no_load() -> None:
    with pytest.raises(ValueError, match="one client at least"):
        await run_load(Target("http://127.0.0.1:1", [b"x"]), 0, 0.1)


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://host", "http://", "http://h:99999", "http://h:x", "http://[::1"],
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(LoadError, match="is not a URL"):
        Target(url, [b"x"])


@pytest.mark.parametrize("url", ["http://a..b:80", f"http://{'a' * 70}:80"])
async def test_a_host_that_can_be_none_is_one_sentence(url: str) -> None:
    with pytest.raises(LoadError, match="is not the name of a host"):
        await run_load(Target(url, [b"x"]), 1, 0.1)


def test_a_target_keeps_a_path_and_adds_headers() -> None:
    (request,) = Target("http://h:1/v2/x", [b"x"], [("Authorization", "Bearer y")]).requests
    assert request.startswith(b"POST /v2/x HTTP/1.1\r\nHost: h:1\r\nAuthorization: Bearer y\r\n")
    (request,) = Target("http://h:1?explain=true", [b"x"]).requests
    assert request.startswith(b"POST /predict?explain=true HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("url", "port"),
    [("http://a", 80), ("https://a", 443), ("http://a:8000", 8000), ("https://a:80", 80)],
)
def test_a_url_without_a_port_has_its_scheme_s(url: str, port: int) -> None:
    assert Target(url, [b"x"]).port == port


def test_what_was_measured_is_told_in_images_a_second_and_milliseconds() -> None:
    measured = Measured(seconds=4.0, images=100, answers=125, generator_seconds=0.5, unsent=3)
    for hundredths in range(101):
        measured.note(200, False, hundredths / 100)
    for seconds, says_when in ((0.002, True), (0.002, False)):
        measured.note(503, says_when, seconds)
    for status in (422, 0, 500):
        measured.note(status, False, 9.0)
    assert measured.summary() == {
        "images_per_second": 25.0,
        "p50_ms": pytest.approx(500),
        "p95_ms": pytest.approx(950),
        "p99_ms": pytest.approx(990),
        "refused": 2,
        "refused_p99_ms": pytest.approx(2),
        "failed": 3,
        "without_retry_after": 1,
        "statuses": {"200": 101, "503": 2, "422": 1, "broken": 1, "500": 1},
        "unsent": 3,
        "answers_in_all": 0,
        "seconds": 4.0,
        "generator_cpu_ms_per_answer": 4.0,
    }


def test_where_nothing_was_measured_there_are_no_percentiles() -> None:
    found = Measured().summary()
    assert (found["images_per_second"], found["generator_cpu_ms_per_answer"]) == (0, 0)
    assert found["p50_ms"] is None
    assert found["refused_p99_ms"] is None


def test_drawn_images_are_images() -> None:
    found = decode(draw_images()[0], 48, 64)
    assert (found.width, found.height, found.format) == (1024, 768, "JPEG")
    assert load.OPEN_CLIENTS > 1
