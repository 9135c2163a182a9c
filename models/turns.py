"""Large images take turns, in one thread: its heap alone grows to what one of them needs.

glibc's malloc gives each thread a heap of its own, which keeps the size that it once needed. Were
each decoded by the thread that asks, all of those threads would keep a large image's.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from models.memory import trim_heaps_soon

_T = TypeVar("_T")


class NotItsTurn(Exception):
    """A large image must wait for another one."""


class _Turns:
    """One at a time."""

    def __init__(self) -> None:
        self.taken = threading.Lock()
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
        """Let the thread go, where nobody has the turn."""
        if self.taken.acquire(blocking=False):
            if self._thread is not None:
                self._work.put(None)
                self._thread = None
            self.taken.release()

    def _work_on(self) -> None:
        while (item := self._work.get()) is not None:
            work, done = item
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            del item, work, done  # an image, and what became of it


# Who decodes a large image keeps to these turns; `skip_turn` puts others in their place.
_turns = [_Turns()]


def in_turn(work: Callable[[], _T], wait: bool = True) -> _T:
    """What some work gives that takes much memory, when nobody else's is done.

    Args:
        work: Without arguments.
        wait: For its turn.

    Raises:
        NotItsTurn: Other such work is being done, and `wait` is false.
    """
    turns = _turns[0]
    if not turns.taken.acquire(blocking=wait):
        raise NotItsTurn
    try:
        return turns.run(work)
    finally:
        # A large image takes a hundred megabytes.
        trim_heaps_soon()
        turns.taken.release()
        if turns is not _turns[0]:  # this work hung, and has gone on after all
            turns.end()


def is_anyones_turn() -> bool:
    """Whether no large image is being decoded just now."""
    return not _turns[0].taken.locked()


def skip_turn() -> None:
    """Wait no longer for the large image that is being decoded, as its decoder hangs."""
    skipped, _turns[0] = _turns[0], _Turns()
    skipped.end()


# A process that is forked has none of its parent's threads, and nobody to release its locks.
os.register_at_fork(after_in_child=skip_turn)
