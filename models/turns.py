"""Large images take turns: no more are decoded at once than memory holds, in threads of their own.

glibc's malloc gives each thread a heap of its own, which keeps the size that it once needed. Were
each decoded by the thread that asks, all of those threads would keep a large image's.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from models.cores import available_cores
from models.memory import available_memory, trim_heaps_soon

_T = TypeVar("_T")
# What a large image may take, with what its decoder needs beside it.
_BYTES_A_PIXEL = 20
# Of the memory, that may be for large images: one part in so many.
_PARTS = 3


class NotItsTurn(Exception):
    """A large image must wait for another one."""


class _Turn:
    """A thread that does one piece of work at a time; it begins with the first."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], _T]) -> _T:
        """What it gives, in this one's thread; only for who has taken the turn."""
        if self._thread is None:
            thread = threading.Thread(target=self._work_on, name="mmtl-large", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread is to be had just now
                return work()
            self._thread = thread
        done: Future[_T] = Future()
        self._work.put((work, done))
        try:
            return done.result()
        finally:
            del done  # the error's traceback holds this frame, and it holds the error

    def end(self) -> None:
        """Let the thread go; only where nobody else has the turn."""
        if self._thread is not None:
            self._work.put(None)
            self._thread = None

    def _work_on(self) -> None:
        while (item := self._work.get()) is not None:
            work, done = item
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            del item, work, done  # an image, and what became of it


class _Turns:
    """Those that nobody has; the one given back last is taken first, as its heap is warm.

    Args:
        most: How many turns there are.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._changed = threading.Condition()
        self._free = [_Turn() for _ in range(most)]

    def take(self, wait: bool, sparing: bool) -> _Turn:
        with self._changed:
            while not self.one_is_free(sparing):
                if not wait:
                    raise NotItsTurn
                self._changed.wait()
            return self._free.pop()

    def give_back(self, turn: _Turn) -> None:
        with self._changed:
            self._free.append(turn)
            self._changed.notify_all()  # who is sparing may not take it, and another may

    def one_is_free(self, sparing: bool) -> bool:
        return len(self._free) > (self.most // 2 if sparing else 0)

    def end(self) -> None:
        """Let the threads go of those that nobody has."""
        with self._changed:
            for turn in self._free:
                turn.end()


def most_at_once(pixels: int = 30_000_000, processes: int = 1) -> int:
    """Large images that may be decoded at once: one a core, while a third of the memory holds them.

    Args:
        pixels: Of the largest.
        processes: That share cores and memory, and decode so many each.
    """
    room = available_memory() // _PARTS // (_BYTES_A_PIXEL * pixels)
    return max(min(available_cores(), room) // processes, 1)


# Who decodes a large image keeps to these turns; others may take their place.
_turns = [_Turns(most_at_once())]


def allow_at_once(most: int) -> None:
    """Let so many large images be decoded at once, from now on: `most_at_once`, if nobody says so.

    Args:
        most: At least one.
    """
    _replace(_Turns(most))


def in_turn(work: Callable[[], _T], wait: bool = True, sparing: bool = False) -> _T:
    """What some work gives that takes much memory, in a turn that nobody else has.

    Args:
        work: Without arguments.
        wait: For a turn.
        sparing: Leave half of the turns unused, as there is other work: so less memory is taken.

    Raises:
        NotItsTurn: Others have all turns that may be used, and `wait` is false.
    """
    turns = _turns[0]
    turn = turns.take(wait, sparing)
    try:
        return turn.run(work)
    finally:
        # A large image takes a hundred megabytes.
        trim_heaps_soon()
        turns.give_back(turn)
        if turns is not _turns[0]:  # it was skipped, as one that hung, and has ended after all
            turns.end()


def is_anyones_turn(sparing: bool = False) -> bool:
    """Whether another large image may be decoded just now, `sparing` as for `in_turn`."""
    return _turns[0].one_is_free(sparing)


def skip_turn() -> None:
    """Wait no longer for the large images that are being decoded, as a decoder hangs."""
    _replace(_Turns(_turns[0].most))


def _replace(turns: _Turns) -> None:
    before, _turns[0] = _turns[0], turns
    before.end()


def _begin_anew() -> None:
    _turns[0] = _Turns(_turns[0].most)


# A process that is forked has none of its parent's threads, and nobody to release its locks.
os.register_at_fork(after_in_child=_begin_anew)
