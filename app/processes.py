"""Several processes that answer on one port, and the one that watches them.

Python runs one thread of a process at a time, so that from some eight cores on several processes
answer more (docs/performance-gpu.md). The kernel deals connections out among those that listen
(SO_REUSEPORT); each listens once it is warm.
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import structlog

# A process that dies is started again; where so many do within that time, all end.
_MOST_DEATHS = 3
_WITHIN_SECONDS = 600.0
log = structlog.get_logger()


class PortTaken(Exception):
    """The address cannot be listened on; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of one process among the others.

    Attributes:
        number: From 0.
        folder: Of what they share, which nobody else can open.
        address: Host and port that all listen on.
    """

    number: int
    folder: Path
    address: tuple[str, int]

    def listener(self) -> socket.socket:
        """Its own socket for the address that all have."""
        return _bound(self.address, shared=True)


# What a process does; it says that it listens by sending something.
Target = Callable[[Place, Connection], None]


def supervise(target: Target, count: int, host: str, port: int) -> int:
    """Run processes until SIGTERM or SIGINT, which they get; SIGHUP is theirs, too.

    Args:
        target: Called in each, in a new interpreter: a function of a module.
        count: Of them.
        host: To listen on.
        port: Likewise; 0 for a free one.

    Returns:
        The exit status: 0 where they ended because they were told to.

    Raises:
        PortTaken: Somebody else listens there.
    """
    with _reserve(host, port) as reserved, TemporaryDirectory(prefix="mmtl-") as folder:
        address = (host, reserved.getsockname()[1])
        return _Supervisor(target, count, Path(folder), address).run()


def end_with_parent() -> None:
    """Stop this process, as SIGTERM does, when the one that watches it is gone."""
    # Ctrl-C at a terminal is for the one that watches, which passes it on.
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="mmtl-follow", daemon=True).start()


class _Supervisor:
    def __init__(self, target: Target, count: int, folder: Path, address: tuple[str, int]):
        self._target = target
        self._count = count
        self._folder = folder
        self._address = address
        self._processes: dict[int, SpawnProcess] = {}
        # That say that they listen.
        self._starting: dict[int, Connection] = {}
        self._listening: set[int] = set()
        self._deaths: deque[float] = deque()
        self._stopping = False
        self._status = 0

    def run(self) -> int:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        self._start(0)  # the others, once it is known that the bundle and the settings will do
        while self._processes:
            ended = {process.sentinel: n for n, process in self._processes.items()}
            said = {connection: n for n, connection in self._starting.items()}
            for what in wait([*ended, *said]):
                if isinstance(what, Connection):
                    self._hear(said[what])
                elif isinstance(what, int):
                    self._bury(ended[what])
        return self._status

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        hears, says = context.Pipe(duplex=False)
        place = Place(number, self._folder, self._address)
        process = context.Process(target=self._target, args=(place, says), name=f"mmtl-{number}")
        process.start()
        says.close()
        self._processes[number] = process
        self._starting[number] = hears
        if self._stopping:  # just now
            process.terminate()

    def _hear(self, number: int) -> None:
        connection = self._starting.pop(number, None)
        if connection is None:  # it has died, and been seen to
            return
        with connection, suppress(EOFError):
            connection.recv()
            self._listening.add(number)
            log.info("process listens", process=number, pid=self._processes[number].pid)
            if len(self._processes) == 1 and not self._stopping and not self._deaths:
                for other in range(1, self._count):
                    self._start(other)

    def _bury(self, number: int) -> None:
        process = self._processes.pop(number)
        listened = number in self._listening
        self._listening.discard(number)
        if (connection := self._starting.pop(number, None)) is not None:
            connection.close()
        if self._stopping:
            return
        status = process.exitcode or 0
        if not listened and status > 0:  # it has said why, and would do so again
            self._status = status
            self._stop()
            return
        log.error("process died", process=number, exit=status)
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - _WITHIN_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > _MOST_DEATHS:
            log.error("processes die too often", deaths=len(self._deaths), seconds=_WITHIN_SECONDS)
            self._status = 1
            self._stop()
        else:
            self._start(number)

    def _stop(self, _: int = 0, __: FrameType | None = None) -> None:
        self._stopping = True
        for process in list(self._processes.values()):
            process.terminate()

    def _reload(self, _: int, __: FrameType | None) -> None:
        for number, process in list(self._processes.items()):
            if number in self._listening and process.pid is not None:  # SIGHUP ends others
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGHUP)


def _reserve(host: str, port: int) -> socket.socket:
    """Bound and not listening: it gets no connection, and keeps the port from others.

    Raises:
        PortTaken: Somebody else listens there.
    """
    try:
        with _bound((host, port), shared=False) as alone:
            address = (host, alone.getsockname()[1])
        return _bound(address, shared=True)
    except OSError as error:
        raise PortTaken(f"{host}:{port} cannot be listened on: {error.strerror}.") from None


def _bound(address: tuple[str, int], shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
