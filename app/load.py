"""Load on a running service: closed or open loop, how fast it answered, and with what.

In a closed loop each client sends its next image when it has an answer. The first answers of a slow
service come late and in one burst: what is measured begins after them. In an open loop images
arrive by chance (Poisson), as many as their rate says, whether or not earlier ones are answered; a
time then counts from the arrival, so that waiting for a free connection is not left out
("coordinated omission"). What arrives in the measured time is waited for, so that slow answers are
not left out either.
"""

import asyncio
import random
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import numpy as np
from PIL import Image

from app.forms import FIELD

_BOUNDARY = "mmtl-load-7d1f0c3a5b"
# Connections of an open loop.
OPEN_CLIENTS = 128
# There is no such host, or nothing listens there.
_NOBODY = (ConnectionRefusedError, TimeoutError, socket.gaierror)
# Beyond what any service under test is allowed to take.
_PATIENCE_SECONDS = 120.0


class LoadError(Exception):
    """A service that cannot be reached, or a URL that is none; the message says which."""


@dataclass(slots=True)
class Measured:
    """What one load gave.

    Latencies and statuses are of what arrived in the measured time, whenever it was answered.

    Attributes:
        seconds: That were measured, warm-up left out.
        images: Answers 200 that came in that time.
        answers: Of any status that came in that time.
        latencies: Of the answers 200, in seconds.
        refusals: Latencies of the answers 503.
        statuses: How many answers had which status; `broken` for a connection that ended.
        without_retry_after: Answers 503 that do not say when to try again.
        unsent: Arrivals of an open loop for which no connection became free.
        answers_in_all: Those of the warm-up and of what was still open at the end included.
        generator_seconds: CPU time of this process in that time.
    """

    seconds: float = 0.0
    images: int = 0
    answers: int = 0
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    unsent: int = 0
    answers_in_all: int = 0
    generator_seconds: float = 0.0

    def note(self, status: int, retry_after: bool, seconds: float) -> None:
        """Count one answer; a status of 0 is a connection that ended without one."""
        self.statuses[str(status or "broken")] += 1
        if status == 200:
            self.latencies.append(seconds)
        elif status == 503:
            self.refusals.append(seconds)
            self.without_retry_after += not retry_after

    def summary(self) -> dict[str, Any]:
        """Images a second, percentiles in milliseconds and counts, as JSON takes them."""
        return {
            "images_per_second": self.images / self.seconds if self.seconds else 0.0,
            **{f"p{percent}_ms": _percentile(self.latencies, percent) for percent in (50, 95, 99)},
            "refused": self.statuses["503"],
            "refused_p99_ms": _percentile(self.refusals, 99),
            "failed": sum(self.statuses.values()) - self.statuses["200"] - self.statuses["503"],
            "without_retry_after": self.without_retry_after,
            "statuses": dict(self.statuses),
            "unsent": self.unsent,
            "answers_in_all": self.answers_in_all,
            "seconds": self.seconds,
            "generator_cpu_ms_per_answer": 1000 * self.generator_seconds / max(self.answers, 1),
        }


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return float(1000 * np.percentile(values, percent)) if values else None


class Target:
    """Where the load goes, and one whole request an image, written out beforehand.

    Args:
        url: Of the service; a path of its own replaces `/predict`, a query is kept.
        images: Encoded images.
        headers: Further ones, such as `Authorization`.

    Raises:
        LoadError: The URL is not one.
    """

    def __init__(
        self,
        url: str,
        images: Sequence[bytes],
        headers: Sequence[tuple[str, str]] = (),
    ):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:  # of a port or an IPv6 address that is none
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadError(f"{url} is not a URL such as http://127.0.0.1:8000.")
        if parts.username is not None:
            raise LoadError('Leave the user out of the URL: --header "Authorization: Basic …".')
        self.host = parts.hostname
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = port or (443 if self.tls else 80)
        path = parts.path if parts.path.strip("/") else "/predict"
        path += f"?{parts.query}" if parts.query else ""
        further = "".join(f"{name}: {value}\r\n" for name, value in headers)
        try:
            further.encode()
        except UnicodeEncodeError:
            raise LoadError("A header holds bytes that are no UTF-8.") from None
        self.requests = [_request(parts.netloc, path, further, image) for image in images]


def _request(host: str, path: str, further: str, image: bytes) -> bytes:
    body = (
        (
            f"--{_BOUNDARY}\r\n"
            f'Content-Disposition: form-data; name="{FIELD}"; filename="image.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        + image
        + f"\r\n--{_BOUNDARY}--\r\n".encode()
    )
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{further}"
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.answers = 0
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[tuple[int, bool]] | None = None
        self._retry_after = self._length_told = False
        # Whether the answer says where it ends; else, it is where the connection does.
        self._ends_itself = True
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        whole = exc is None and not self._ends_itself
        self._answer(self._parser.get_status_code() if whole else 0)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
            self._answer(0)

    # The parser calls these.
    def on_message_begin(self) -> None:
        self._retry_after = self._length_told = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._retry_after |= name.lower() == b"retry-after"
        self._length_told |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._ends_itself = self._length_told

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._ends_itself = True
        if status < 200:  # of an interim answer (RFC 9110, section 15.2), which another follows
            return
        self.answers += 1
        if not self._parser.should_keep_alive():
            self.close()
        self._answer(status)

    async def send(self, request: bytes) -> tuple[int, bool]:
        """The status of the answer (0 where none came), and whether it has a `Retry-After`.

        Raises:
            TimeoutError: None came, and the connection is still there; it is closed.
        """
        if self._transport is None:
            return 0, False
        self._parser = httptools.HttpResponseParser(self)
        self._ends_itself = True
        answered = self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await asyncio.wait_for(answered, _PATIENCE_SECONDS)
        except TimeoutError:
            self.close()
            raise

    @property
    def open(self) -> bool:
        return self._transport is not None

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _answer(self, status: int) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result((status, self._retry_after))


def draw_images(seed: int = 0) -> list[bytes]:
    """Some JPEG images of 1024x768 pixels, of skin and a dark spot, for who has none at hand."""
    generator = np.random.default_rng(seed)
    height, width = 768, 1024
    y, x = np.mgrid[0:height, 0:width]
    images = []
    for _ in range(8):
        centre = generator.uniform(0.3, 0.7, 2) * (height, width)
        radius = generator.uniform(0.1, 0.3) * height
        spot = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        noise = generator.normal(0, 12, (height, width, 1))
        pixels = np.where(spot[..., None], (90, 60, 50), (215, 170, 150)) + noise
        buffer = BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


class _Load:
    """One load while it runs: what was sent, and when what is measured begins and ends.

    Args:
        target: As `run_load` has it, and so are all others.
        clients: Likewise.
        seconds: Likewise.
        warm_up_seconds: Likewise.
        rate: Likewise.
        reconnect_every: Likewise.
        seed: Likewise.
    """

    def __init__(
        self,
        target: Target,
        clients: int,
        seconds: float,
        warm_up_seconds: float,
        rate: float | None,
        reconnect_every: int | None,
        seed: int,
    ):
        self._target = target
        self._clients = clients
        self._seconds = seconds
        self._warm_up_seconds = warm_up_seconds
        self._rate = rate
        self._reconnect_every = reconnect_every
        self._seed = seed
        self._requests = cycle(target.requests)
        self._measured = Measured(seconds=seconds)
        self._opened = time.monotonic()
        self._start = self._end = float("inf")
        self._measuring = asyncio.Event()
        self._unanswered = set(range(clients))
        self._heard = False

    async def run(self) -> Measured:
        """All of it."""
        failed: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                if self._rate or not self._warm_up_seconds:
                    self._begin(self._opened + self._warm_up_seconds)
                if self._rate:
                    group.create_task(self._arrive(self._arrivals(self._rate)))
                else:
                    for number in range(self._clients):
                        group.create_task(self._client(number))
                group.create_task(self._meter())
        except* LoadError as errors:  # what is raised in here is a group again in some Pythons
            failed = errors
            while isinstance(failed, ExceptionGroup):  # arrivals have a group of their own
                failed = failed.exceptions[0]
        if failed is not None:
            raise failed
        return self._measured

    def _arrivals(self, rate: float) -> Iterator[float]:
        """Times of arrivals: uniform, as those of a Poisson process are once their number is given.

        In order, as the least of those that are left each time.
        """
        generator = random.Random(self._seed)
        for start, seconds in (
            (self._opened, self._warm_up_seconds),
            (self._start, self._seconds),
        ):
            left = 1.0
            for count in range(max(round(rate * seconds), seconds > 0), 0, -1):
                left *= (1 - generator.random()) ** (1 / count)
                yield start + (1 - left) * seconds

    def _begin(self, at: float) -> None:
        self._start, self._end = at, at + self._seconds
        self._measuring.set()

    async def _connect(self, number: int = 0) -> _Connection:
        host, port = self._target.host, self._target.port
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, host, port, ssl=self._target.tls
            )
        except UnicodeError:  # an empty part, or one longer than 63 letters
            raise LoadError(f"{host} is not the name of a host.") from None
        except OSError as error:
            lacks = "Nobody answers" if isinstance(error, _NOBODY) else "No connection can be had"
            raise LoadError(f"{lacks} at {host}:{port}: {error.strerror or error}.") from None
        # Not all at once again.
        connection.answers = number % (self._reconnect_every or 1)
        return connection

    async def _ask(self, connection: _Connection, asked: float) -> tuple[_Connection, int]:
        status, retry_after = 0, False
        if self._reconnect_every and connection.answers >= self._reconnect_every:
            connection.close()
        try:
            if not connection.open:
                connection = await self._connect()
            status, retry_after = await connection.send(next(self._requests))
        except LoadError:  # of a service that has answered before, and may again
            pass
        except TimeoutError:
            if not self._heard:
                raise LoadError(
                    f"{self._target.host}:{self._target.port} takes connections, and answered "
                    f"nothing in {_PATIENCE_SECONDS:.0f} seconds."
                ) from None
        self._heard = self._heard or status != 0
        answered = time.monotonic()
        self._measured.answers_in_all += 1
        if self._start <= answered <= self._end:
            self._measured.answers += 1
            self._measured.images += status == 200
        if self._start <= asked < self._end:
            self._measured.note(status, retry_after, answered - asked)
        return connection, status

    async def _client(self, number: int) -> None:
        """One of a closed loop."""
        connection = await self._connect(number)
        try:
            while (asked := time.monotonic()) < self._end:
                connection, status = await self._ask(connection, asked)
                self._unanswered.discard(number)
                if not (self._unanswered or self._measuring.is_set()):
                    now = time.monotonic()
                    # Somewhere between two bursts: just after one, a short time holds too few.
                    burst = now + random.random() * (now - asked)
                    self._begin(max(self._opened + self._warm_up_seconds, burst))
                if status in (0, 429, 503):
                    await asyncio.sleep(0.01)  # a client that is refused does not spin
        finally:
            connection.close()

    async def _arrive(self, arrivals: Iterator[float]) -> None:
        """An open loop."""
        # The last one that became free takes the next arrival: one that rests is closed in the end.
        free: asyncio.LifoQueue[_Connection] = asyncio.LifoQueue()

        async def take(connection: _Connection, asked: float) -> None:
            try:
                connection, _ = await self._ask(connection, asked)
            finally:
                free.put_nowait(connection)

        for connection in await asyncio.gather(*map(self._connect, range(self._clients))):
            if self._reconnect_every:  # opened at once, they would all be of one process
                connection.close()
            free.put_nowait(connection)
        try:
            async with asyncio.TaskGroup() as group:
                for asked in arrivals:
                    await asyncio.sleep(max(asked - time.monotonic(), 0))
                    # What waits at the end is sent for as long again, and no longer.
                    left = self._end + self._seconds - time.monotonic()
                    try:
                        async with asyncio.timeout(left):
                            connection = await free.get()
                    except TimeoutError:
                        self._measured.unsent += asked >= self._start
                        continue
                    group.create_task(take(connection, asked))
        finally:
            while not free.empty():
                free.get_nowait().close()

    async def _meter(self) -> None:
        """What this process itself takes."""
        await self._measuring.wait()
        await asyncio.sleep(max(self._start - time.monotonic(), 0))
        before = _cpu_seconds()
        await asyncio.sleep(max(self._end - time.monotonic(), 0))
        self._measured.generator_seconds = _cpu_seconds() - before


async def run_load(
    target: Target,
    clients: int,
    seconds: float,
    warm_up_seconds: float = 1.0,
    rate: float | None = None,
    reconnect_every: int | None = None,
    seed: int = 0,
) -> Measured:
    """Send images for a while.

    Args:
        target: Where to, and what; its images are sent in turn.
        clients: Connections; in an open loop, the most of them.
        seconds: For how long, after the warm-up.
        warm_up_seconds: Sent, but not measured. A closed loop's lasts until every client has been
            answered, refused or cut off, at least; 0 measures all.
        rate: Images a second of an open loop, one at least; None closes it.
        reconnect_every: Answers of a connection, after which another takes its place: of several
            processes behind one port, the one that wakes first takes most of those that are opened
            at once, and would keep them. None keeps connections.
        seed: Of when images arrive in an open loop.

    Raises:
        LoadError: Nobody answers there.
        ValueError: There are no clients.
    """
    if clients < 1:
        raise ValueError("A load takes one client at least.")
    return await _Load(target, clients, seconds, warm_up_seconds, rate, reconnect_every, seed).run()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(
    target: Target,
    clients: int,
    seconds: float,
    warm_up_seconds: float = 1.0,
    rate: float | None = None,
    reconnect_every: int | None = None,
    seed: int = 0,
) -> Measured:
    """`run_load` on a loop of its own, uvloop's where it is installed."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ModuleNotFoundError):
        import uvloop

        new_event_loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        load = run_load(target, clients, seconds, warm_up_seconds, rate, reconnect_every, seed)
        return runner.run(load)
