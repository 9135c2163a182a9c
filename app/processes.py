"""Several processes that answer on one port, and the one that watches them.

Python runs one thread of a process at a time, so that on many cores several processes answer more
(docs/performance-gpu.md). The kernel deals connections out among those that listen
(SO_REUSEPORT). At the start they listen when all are warm: the first would keep every connection.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import structlog

# A process that dies is started again, after a pause from its second death in that time on. Where
# one dies more often than that, and no other listens, all end.
_MOST_DEATHS = 3
_WITHIN_SECONDS = 600.0
_LONGEST_PAUSE = 30.0
# Longest that those that are warm wait for one that is not.
_LONGEST_WAIT = 120.0
# How often it is looked what is due; a signal does not end a wait.
_LOOK_SECONDS = 0.5
# Bytes of a path: a Unix socket's may have 107, with `/N.socket`.
_LONGEST_FOLDER = 90
# What a process says.
WARM, LISTENS = "warm", "listens"
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
        link: To the one that watches: says that this is `WARM`, hears that it may listen, says that
            it `LISTENS`.
    """

    number: int
    folder: Path
    address: tuple[str, int]
    link: Connection

    def listener(self) -> socket.socket:
        """Its own socket for the address that all have."""
        return _bound(self.address, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


# What a process does; first of all it calls `be_watched`.
Target = Callable[[Place], None]


def supervise(target: Target, count: int, host: str, port: int, patience: float) -> int:
    """Run processes until SIGTERM or SIGINT, of which they get SIGINT; SIGHUP is theirs, too.

    Args:
        target: Called in each, in a new interpreter: a function of a module.
        count: Of them.
        host: To listen on.
        port: Likewise; 0 for a free one.
        patience: Seconds that they may take to end.

    Returns:
        The exit status: 0 where they ended because they were told to.

    Raises:
        PortTaken: Somebody else listens there.
        OSError: There is no folder for what the processes share.
    """
    with _reserve(host, port) as reserved, TemporaryDirectory(prefix="mmtl-") as folder:
        if len(os.fsencode(folder)) > _LONGEST_FOLDER:
            reason = "too long a path for Unix sockets in it; set TMPDIR to a shorter one"
            raise OSError(errno.ENAMETOOLONG, reason, folder)
        address = (host, reserved.getsockname()[1])
        return _Supervisor(target, count, Path(folder), address, patience).run()


def be_watched(place: Place) -> None:
    """Take signals from the one that watches, and end with it, in what way it ends."""
    # Ctrl-C at a terminal is for the one that watches, which passes it on.
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a network to load anew
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        # Which would have removed it, unless it was killed.
        shutil.rmtree(place.folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=follow, name="mmtl-follow", daemon=True).start()


@dataclass(slots=True)
class _Child:
    process: SpawnProcess
    link: Connection
    heard: bool = True  # whether there is more to hear from its link
    warm: bool = False
    may_listen: bool = False
    listens: bool = False
    must_reload: bool = False

    def send(self, number: signal.Signals) -> None:
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class _Supervisor:
    def __init__(
        self, target: Target, count: int, folder: Path, address: tuple[str, int], patience: float
    ):
        self._target = target
        self._count = count
        self._folder = folder
        self._address = address
        self._patience = patience
        self._children: dict[int, _Child] = {}
        # When those that died are started again.
        self._due: dict[int, float] = {}
        self._deaths: dict[int, deque[float]] = {}
        self._warm_since = float("inf")
        self._served = False
        self._stopping = False
        self._kill_at = float("inf")
        self._status = 0

    def run(self) -> int:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        try:
            self._start(0)  # the others, once it is known that the bundle and the settings will do
            while self._children or (self._due and not self._stopping):
                self._watch()
        finally:
            for child in self._children.values():  # where something went wrong here
                child.process.kill()
                child.process.join()
        return self._status

    def _watch(self) -> None:
        ends = {child.process.sentinel: n for n, child in self._children.items()}
        links = {child.link: n for n, child in self._children.items() if child.heard}
        for what in wait([*ends, *links], _LOOK_SECONDS):
            # One of two that are told of at once may have changed what the other was about.
            if isinstance(what, Connection):
                child = self._children.get(links[what])
                if child is not None and child.link is what:
                    self._hear(links[what], child)
            elif isinstance(what, int):
                child = self._children.get(ends[what])
                if child is not None and child.process.sentinel == what:
                    self._bury(ends[what], child)
        now = time.monotonic()
        if now >= self._kill_at:
            log.error("processes killed", processes=list(self._children))
            for child in self._children.values():
                child.process.kill()
            self._kill_at = float("inf")
        for number in [number for number, due in self._due.items() if due <= now]:
            del self._due[number]
            if not self._stopping:
                self._start(number)
        self._let_listen()

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # it would unblock SIGINT if it were started below
        link, theirs = context.Pipe()
        with theirs:
            place = Place(number, self._folder, self._address, theirs)
            process = context.Process(target=self._target, args=(place,), name=f"mmtl-{number}")
            # Ctrl-C is not for it, which it can say only once it is there.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            except OSError as error:
                link.close()
                if not self._served:
                    raise
                log.error("process not started", process=number, reason=str(error))
                self._start_later(number)
                return
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._children[number] = _Child(process, link)
        if self._stopping:  # just now
            self._children[number].send(signal.SIGINT)

    def _start_later(self, number: int) -> None:
        now = time.monotonic()
        deaths = self._deaths.setdefault(number, deque())
        deaths.append(now)
        while deaths[0] < now - _WITHIN_SECONDS:
            deaths.popleft()
        others = [each for n, each in self._children.items() if n != number and each.listens]
        if len(deaths) > _MOST_DEATHS and not others:
            log.error("process dies again and again", process=number, deaths=len(deaths))
            self._status = 1
            self._stop()
            return
        pause = min(2.0 ** min(len(deaths) - 2, 9), _LONGEST_PAUSE) if len(deaths) > 1 else 0.0
        self._due[number] = now + pause

    def _hear(self, number: int, child: _Child) -> None:
        try:
            said = child.link.recv()
        except (EOFError, OSError):  # it is dying
            child.heard = False
            return
        if said == LISTENS:
            child.listens = self._served = True
            host, port = self._address
            log.info("process listens", process=number, pid=child.process.pid, host=host, port=port)
            if child.must_reload:
                child.send(signal.SIGHUP)
            return
        child.warm = True
        if number == 0 and not self._served and not self._stopping:
            for other in range(1, self._count):
                if other not in self._children and other not in self._due:
                    self._start(other)
        self._warm_since = min(self._warm_since, time.monotonic())
        self._let_listen()

    def _let_listen(self) -> None:
        warm = [child for child in self._children.values() if child.warm]
        late = time.monotonic() > self._warm_since + _LONGEST_WAIT
        if not (self._served or late or len(warm) == self._count):
            return
        for child in warm:
            if not child.may_listen:
                child.may_listen = True
                with suppress(OSError):  # it has died just now
                    child.link.send(None)

    def _bury(self, number: int, child: _Child) -> None:
        child.process.join()
        status = child.process.exitcode or 0
        del self._children[number]
        child.link.close()
        if self._stopping:
            return
        if not self._served and status > 0:  # it has said why, and would do so again
            self._status = status
            self._stop()
            return
        log.error("process died", process=number, exit=status)
        self._start_later(number)

    def _stop(self, _: int = 0, __: FrameType | None = None) -> None:
        if not self._stopping:
            self._kill_at = time.monotonic() + self._patience
        self._stopping = True
        for child in list(self._children.values()):
            child.send(signal.SIGINT)

    def _reload(self, _: int, __: FrameType | None) -> None:
        for child in list(self._children.values()):
            child.must_reload = not child.listens  # what it loads just now may be the old bundle
            if child.listens:
                child.send(signal.SIGHUP)


def check_address(host: str, port: int) -> None:
    """See whether a service can listen there, before it loads anything.

    Raises:
        PortTaken: Somebody else does, or there is no such address here.
    """
    with _or_taken(host, port):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                made = socket.socket(family, kind, protocol)
            except OSError:  # a kernel without IPv6, which asyncio passes over, too
                continue
            with made:
                _set(made, socket.SO_REUSEADDR)
                made.bind(address)


@contextmanager
def _or_taken(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except UnicodeError:  # an empty part, or one longer than 63 letters
        raise PortTaken(f"{host} is not the name of a host: set another MMTL_HOST.") from None
    except OSError as error:
        raise PortTaken(
            f"{host}:{port} cannot be listened on: {error.strerror}. Set another MMTL_PORT or "
            "MMTL_HOST, or stop what listens there."
        ) from None


def _reserve(host: str, port: int) -> socket.socket:
    """Bound and not listening: it gets no connection, and keeps the port from others.

    Raises:
        PortTaken: Somebody else listens there.
    """
    with _or_taken(host, port):
        with _bound((host, port), socket.SO_REUSEADDR) as alone:
            address = (host, alone.getsockname()[1])
        try:
            # With SO_REUSEADDR, others with it could be bound, too, while none listens yet.
            return _bound(address, socket.SO_REUSEPORT)
        except OSError:  # connections of a service before, which the kernel remembers for a minute
            return _bound(address, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def _bound(address: tuple[str, int], *options: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        _set(made, *options)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _set(made: socket.socket, *options: int) -> None:
    if made.family == socket.AF_INET6:  # and nothing else, as asyncio has it
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    for option in options:
        made.setsockopt(socket.SOL_SOCKET, option, 1)
