"""The HTTP server: uvicorn, with signals, and limits on what comes before a request is one."""

import asyncio
import gc
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from math import ceil
from pathlib import Path
from socket import socket
from types import FrameType, NoneType
from typing import Any
from uuid import uuid4

import httptools
import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import problems
from app.access import as_cors
from app.networks import Networks
from app.problems import Kind, Problem, respond
from app.settings import Settings
from app.telemetry import Metrics
from app.trace import KEY, Trace
from models.turns import allow_at_once, most_at_once

# Beyond the upload's own time: the deadline of a request that is answered while it still arrives.
_MARGIN_SECONDS = 10.0
# For what a client still sends on a connection that is one too many; of so many such, or of such a
# share of those that may be, whichever is more.
_LINGER_SECONDS = 2.0
_LINGERING, _LINGERING_SHARE = 4, 0.02
# Open files beside connections: a bundle that is loaded, logs, other processes.
_OWN_FILES = 200
_OBJECTS_PER_COLLECTION = 20_000
# Which memory a core dump holds (core(5)).
_DUMPED = Path("/proc/self/coredump_filter")
# Answered on such a connection, too: who holds all others would make this service look dead, and
# have it started anew.
_ALWAYS_ANSWERED = (b"/health/live", b"/health/ready", b"/metrics")
# Requests that a client may send before the first is answered.
_MOST_PIPELINED = 8
_MALFORMED = Problem(
    problems.MALFORMED_REQUEST,
    "Send HTTP/1.1 without TLS: a known method, a percent-encoded URL, one Host, one length of the "
    "body, no transfer coding but chunked.",
)
_TOO_LARGE = Problem(problems.HEADERS_TOO_LARGE, "Send fewer or shorter headers, or a shorter URL.")
_TOO_SLOW = Problem(problems.UPLOAD_TOO_SLOW, "The headers did not end in time. Send it again.")
_FAILED = Problem(problems.INTERNAL, "Try again, or tell the operator the X-Request-ID.")
_TOO_MANY = Problem(
    problems.SATURATED, "Too many connections are open. Try again after Retry-After seconds."
)
log = structlog.get_logger()


class Protocol(HttpToolsProtocol):
    """Uvicorn's protocol, which bounds headers in bytes and seconds, and connections in number.

    Uvicorn waits for ever for the end of the headers of a client that sends a byte now and then
    (slowloris), and keeps headers of any size. It loses the body of a client that offers to speak
    another protocol from here on (Java's and curl's HTTP/2, RFC 9110, section 7.8), which a server
    may ignore.

    Args:
        settings: The limits.
        metrics: Told of what is refused, which the application never sees.
        model_version: Of the network that is served now.
        spare: The server's connections that are too many, the oldest first.
        arguments: Uvicorn's own.
        named: Likewise.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        model_version: Callable[[], str],
        spare: dict["Protocol", None],
        *arguments: Any,
        **named: Any,
    ):
        super().__init__(*arguments, **named)
        self._settings = settings
        self._metrics = metrics
        self._model_version = model_version
        self._spare = spare
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False
        self._lingers = False
        self._reading_headers = True
        self._header_bytes = 0
        # Whether the request offers another protocol, and so is parsed a second time, without that.
        self._offered = False
        # Calls of on_body: bytes that caused none are not body.
        self._bodies = 0
        self._unread: asyncio.TimerHandle | None = None
        # Requests that are not answered: uvicorn knows the last, and those whose turn has not come.
        self._open: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client has connected; the first bytes are waited for like a request's headers."""
        super().connection_made(transport)
        most = self._settings.max_connections
        if len(self.connections) - len(self._spare) > most and not self._take_place():
            if len(self._spare) >= max(most * _LINGERING_SHARE, _LINGERING):
                next(iter(self._spare))._give_way()
            self._spare[self] = None
            self._start_timer(_LINGER_SECONDS)
            return
        self._start_timer(self._settings.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop_timer()
        self._stop_unread()
        self._spare.pop(self, None)
        super().connection_lost(exc)
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._deaf:
            return
        self._heard = True
        bodies = self._bodies
        if self._reading_headers:
            self._header_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._deaf:
            return
        if not self._reading_headers and self._bodies == bodies:
            self._header_bytes += len(data)  # extensions of chunks, or trailers
        if self._header_bytes > self._settings.max_header_bytes:
            self._refuse(_TOO_LARGE)
        elif self._timer is None and self.timeout_keep_alive_task is None and self._answered:
            # A byte between two requests: the next one's headers have begun.
            self._start_timer(self._settings.header_seconds)

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offered:  # CONNECT, which is answered; what follows is not for us
                    return
                self._offered = False
                data = self._head_without_offer() + data[upgrade.args[0] :]
            except httptools.HttpParserError as error:
                # Of a URL: it cannot be parsed, is no ASCII, or has no path.
                known = (httptools.HttpParserError, UnicodeError, AttributeError, NoneType)
                if not isinstance(error.__context__, known):  # no memory for the body, most likely
                    log.exception("request failed", request_id=self._refuse(_FAILED))
                else:
                    self._refuse(_MALFORMED)
                return

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [
            self.parser.get_method() + b" " + self.url + b" HTTP/" + version,
            *(name + b": " + value for name, value in self.headers if name != b"upgrade"),
        ]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._reading_headers = True
        self._unset_keepalive_if_required()
        self._start_timer(self._settings.header_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which says nothing here (RFC 9110, section 6.5.1)."""
        if self._reading_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the request is answered; its body has its own time."""
        self._reading_headers = False
        self._header_bytes = 0
        if self._deaf:
            return
        if self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers):
            self._offered = True
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._settings.max_header_bytes:
            self._refuse(_TOO_LARGE)
            return
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._refuse(_MALFORMED)  # RFC 9112, section 3.2
            return
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):  # section 6.1: the parser would leave the body coded
            self._refuse(_MALFORMED)
            return
        if len(self.pipeline) >= _MOST_PIPELINED:
            self._note(problems.MALFORMED_REQUEST)
            self.transport.abort()
            return
        spare = self in self._spare
        if spare:
            if self.url.partition(b"?")[0] not in _ALWAYS_ANSWERED:
                self._refuse(_TOO_MANY)
                return
            self.headers.append((b"connection", b"close"))  # which uvicorn says in the answer, too
        self._start_timer(self._settings.upload_seconds + _MARGIN_SECONDS)
        super().on_headers_complete()
        if spare:
            self.cycle.keep_alive = False
        self._open = [cycle for cycle in self._open if not cycle.response_complete]
        self._open.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """A part of a request's body; that of a refused one is dropped."""
        self._bodies += 1
        self._header_bytes = 0  # a client may send each chunk's size by itself
        if self._deaf or self.cycle.response_complete:
            return
        # Uvicorn would copy it here, and once more for who receives it, though it is alone mostly.
        if not self.cycle.body:
            self.cycle.body, body = body, b""  # type: ignore[assignment]  # it only adds to it
        elif isinstance(self.cycle.body, bytes):  # which would be copied for each small chunk
            self.cycle.body = bytearray(self.cycle.body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is here; what comes next begins with headers."""
        if self._offered:
            return
        self._stop_timer()
        self._reading_headers = True
        self._header_bytes = 0
        if self._deaf:
            return
        super().on_message_complete()
        if self._answered and not self.pipeline:  # before its body had come, which ended the rest
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        """The client does not read its answer: it has as long for it as for an upload."""
        super().pause_writing()
        self._expect_reading()

    def on_response_complete(self) -> None:
        """An answer has been written: one too short for `pause_writing` has its time, too."""
        for cycle in self._open:
            if cycle.response_complete:
                cycle.body = bytearray()  # which nobody may have asked for: the connection stays
        self._expect_reading()
        super().on_response_complete()

    def _expect_reading(self) -> None:
        self._stop_unread()
        self._unread = self.loop.call_later(self._settings.upload_seconds, self._cut_off)

    def _cut_off(self) -> None:
        self._unread = None
        if not self.transport.get_write_buffer_size():
            return
        # Of several requests sent ahead, it is not known here whose answer it is.
        if not self.pipeline and self.cycle is not None:
            trace = dict(self.cycle.scope).get(KEY)
            if isinstance(trace, Trace):
                trace.unread = True
        self.transport.abort()

    @property
    def _deaf(self) -> bool:
        """Whether no more is read."""
        return self._lingers or self.transport.is_closing()

    @property
    def _answered(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        spare = self in self._spare
        # Where nothing was heard it is a probe of the port, or a browser's spare connection; where
        # headers are not what is waited for, an answer may be under way.
        if self._reading_headers and (self._heard or spare):
            self._refuse(_TOO_MANY if spare else _TOO_SLOW)
        self.transport.close()

    def _take_place(self) -> bool:
        """Whether a connection whose requests are answered has made room for this one."""
        for other in self.connections:
            if isinstance(other, Protocol) and other._rests:
                other.transport.close()
                return True
        return False

    @property
    def _rests(self) -> bool:
        """Whether what was asked is answered (though more of it may come), and nothing else begun.

        What has not been read of an answer would keep it open.
        """
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            return False
        if self._lingers:
            return self not in self._spare
        begun = self._timer is not None and self._reading_headers
        return self.cycle is not None and self.cycle.response_complete and not begun

    def _give_way(self) -> None:
        """Another connection takes the place of this one, of those that are too many."""
        del self._spare[self]
        self._refuse(_TOO_MANY)
        self.transport.close()

    def _note(self, kind: Kind) -> str:
        """Count and log a refusal, under an id that is new."""
        request_id = uuid4().hex
        self._metrics.rejected.labels(kind.name).inc()
        log.info("refused", request_id=request_id, problems=[kind.name])
        return request_id

    def _refuse(self, problem: Problem) -> str | None:
        """Answer, and heed no more; under which id, unless that was done before.

        A client that is cut off while it sends may see a broken connection instead of the answer:
        for a while, what it sends is dropped.
        """
        self._stop_timer()
        if self._deaf:
            return None
        request_id = self._note(problem.kind)
        if not self._answered:
            cycle = self.cycle
            if self.pipeline or cycle.response_started or not cycle.more_body:
                # It would be taken for the answer to an earlier request.
                self.transport.close()
                return request_id
            # The request at hand is what is refused, in mid-body: the application has no say in it.
            cycle.disconnected = True
            cycle.message_event.set()
        origin = dict(self.headers or ()).get(b"origin", b"").decode("latin-1")
        answer = respond(
            problem,
            headers={
                "X-Request-ID": request_id,
                "X-Model-Version": self._model_version(),
                "Server-Timing": "total;dur=0.0",  # which begins with the end of the headers
                **as_cors(self._settings.cors_origins, origin),
            },
        )
        status = HTTPStatus(answer.status_code)
        lines = [
            f"HTTP/1.1 {status} {status.phrase}".encode(),
            b"connection: close",
            *(b": ".join(header) for header in self.server_state.default_headers),
            *(b": ".join(header) for header in answer.raw_headers),
        ]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self._lingers = True
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        return request_id


def tune(settings: Settings, processes: int) -> None:
    """Set what is of the whole process: large images decoded at once, how often garbage is sought.

    Args:
        settings: Of this process.
        processes: Of the service, which share the cores and the memory.
    """
    allow_at_once(most_at_once(settings.max_pixels_in_full, processes))
    # An answer makes hundreds of objects, none of them in cycles; all threads wait for each
    # collection (benchmarks/serving/steps.py).
    gc.set_threshold(_OBJECTS_PER_COLLECTION)


def allow_files(most_connections: int) -> None:
    """Let this process open two files for each connection, and say so where it may not.

    Usual limits (`ulimit -n`) are for programs of a few files, and may be raised by those of many.
    Where they are reached no connection is taken, not even one that asks whether the service lives.
    A connection that is sent one of the documentation's files has that open, too.

    Args:
        most_connections: That it may have.
    """
    needed = 2 * ceil(most_connections * (1 + _LINGERING_SHARE)) + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # macOS has a lower limit than it says
        allowed = soft
    if allowed < needed:
        log.warning("too few open files", allowed=allowed, needed=needed)


def keep_no_core() -> None:
    """Let this process leave no core dump, which would hold pictures and keys.

    A limit of 1 byte is less than any file, and Linux gives none to a program that collects dumps
    then, either (core(5), `fs/coredump.c`), which it does with 0. Where no more than that may be
    set, a dump has at least no memory in it.
    """
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    soft = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    with suppress(OSError):  # of another system than Linux
        _DUMPED.write_text("0")


class Server(uvicorn.Server):
    """Uvicorn with this service's signals.

    SIGTERM and SIGINT drain: not ready at once, what was accepted is answered, then exit 0. A
    second one does not wait. SIGHUP reloads the bundle. Where the network cannot be replaced, the
    server ends, and `failed` says so.

    Args:
        app: Of `create_app`.
        settings: Of the same.
    """

    def __init__(self, app: FastAPI, settings: Settings):
        self._networks: Networks = app.state.networks
        protocol = partial(Protocol, settings, app.state.metrics, self._networks.version, {})
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol,  # type: ignore[arg-type]  # called like the class
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_seconds,
                # What was admitted has its deadline; a caller who never ends an upload has this.
                timeout_graceful_shutdown=ceil(settings.deadline_seconds) + 5,
            )
        )
        self.failed = False
        # Called when it listens, and takes its signals.
        self.on_start: Callable[[], None] = lambda: None
        self.stops_on = {signal.SIGINT, signal.SIGTERM}
        self._networks.on_failure = self._fail

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and take SIGHUP."""
        await super().startup(sockets)
        # The main thread alone gets signals, as uvicorn has it, too.
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._networks.hang_up)
        self.on_start()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop; what a second signal cuts off is not logged as a failure."""
        await super().shutdown(sockets)
        if self.force_exit:
            logging.getLogger("uvicorn.error").disabled = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT and SIGTERM."""
        if sig not in self.stops_on:
            return
        self._networks.drain()
        # Not uvicorn's own, which raises the signal again in the end: a drained stop is a good end.
        self.force_exit = self.should_exit
        self.should_exit = True

    def _fail(self) -> None:
        self.failed = True
        self.should_exit = True
        # What hung may keep the process from ending, and so from being started anew.
        longest = float(self.config.timeout_graceful_shutdown or 0) + _MARGIN_SECONDS
        end = threading.Timer(longest, os._exit, [1])
        end.daemon = True
        end.start()
