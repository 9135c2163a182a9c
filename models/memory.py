"""Keep little memory, and give what nobody uses any more back to the kernel."""

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from models.cgroups import limits

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
_MALLOPT = getattr(ctypes.CDLL(None), "mallopt", None)
# M_ARENA_MAX of glibc's malloc.h.
_ARENA_MAX = -8
# Held while heaps are going to be trimmed.
_due = threading.Lock()


def available_memory() -> int:
    """Bytes of the machine's memory, or of a control group's limit where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(limit) for limit in limits("memory.max") if limit.isdigit())])


def limit_arenas(most: int) -> None:
    """Let threads that begin from now on share so many arenas of glibc's malloc, at most.

    Each thread would get one of its own, which grows to the most that it has ever needed. Who sets
    `MALLOC_ARENA_MAX` has decided that.
    """
    if _MALLOPT is not None and "MALLOC_ARENA_MAX" not in os.environ:
        _MALLOPT(_ARENA_MAX, most)


def give_back() -> None:
    """Collect cycles, and trim the C library's heaps where it can (glibc).

    An engine leaves a hundred megabytes behind, in heaps of threads that have ended.
    """
    with _uninterrupted():
        gc.collect()
    trim_heaps()


def trim_heaps() -> None:
    """Trim the C library's heaps where it can (glibc): each thread's keeps its size otherwise."""
    if _TRIM is not None:
        _TRIM(0)


def trim_heaps_soon(seconds: float = 1.0) -> None:
    """Trim the heaps in a while, once for all who ask until then.

    All threads then take what they need anew, page by page: after each image, that would cost more
    than a small one.
    """
    if _due.acquire(blocking=False):
        timer = threading.Timer(seconds, _trim_now)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # no thread is to be had just now: the next who asks tries again
            _due.release()


def _trim_now() -> None:
    _due.release()
    trim_heaps()


def _begin_anew() -> None:
    if _due.locked():
        _due.release()


# A process that is forked has no timer that would release it.
os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let what stops a process wait for the block's end.

    Python drops what a handler raises in a collection's callbacks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    raising = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in raising:
        signal.signal(number, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
        if came:
            raising[signal.Signals(came[0][0])](*came[0])
