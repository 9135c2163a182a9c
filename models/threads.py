"""Threads: work in one of its own; those that a library begins, and what cores they may run on."""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_TASKS = Path("/proc/self/task")
_OWN_NAME = Path("/proc/thread-self/comm")
# PyDLL: the interpreter is not let go for it.
_this_core = getattr(ctypes.PyDLL(None), "sched_getcpu", None)
_numbers = count()


def begin(work: Callable[[], _T]) -> Future[_T]:
    """Do some work in a thread of its own, which keeps no process from ending if it hangs.

    An executor's threads are waited for at the interpreter's end, without a limit.

    Args:
        work: Without arguments.

    Returns:
        Gets what the work gives, or raises.

    Raises:
        RuntimeError: No thread is to be had.
    """
    future: Future[_T] = Future()

    def do() -> None:
        try:
            found = work()
        except BaseException as error:
            with suppress(InvalidStateError):  # nobody waits any more
                future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(found)

    threading.Thread(target=do, daemon=True).start()
    return future


def begun_by(work: Callable[[], _T]) -> tuple[_T, list[int]]:
    """Do some work, and find the threads that it starts.

    On Linux a thread inherits the name of the one that starts it. So the calling thread is renamed
    meanwhile: whatever has that name afterwards was started by the work.

    Args:
        work: Without arguments.

    Returns:
        Its result, and the kernel's numbers of the threads; none where the kernel is not Linux.
    """
    name = b"mmtl-begun-%d" % (next(_numbers) % 1000)  # of 15 bytes at most: proc_pid_comm(5)
    try:
        before = _OWN_NAME.read_bytes().removesuffix(b"\n")
        _OWN_NAME.write_bytes(name)
    except OSError:
        return work(), []
    try:
        found = work()
        return found, [number for number in _called(name) if number != threading.get_native_id()]
    finally:
        _OWN_NAME.write_bytes(before)


def _called(name: bytes) -> list[int]:
    """Threads of this process that have the name."""
    numbers = []
    for task in _TASKS.iterdir():
        with suppress(OSError):  # it has ended
            if (task / "comm").read_bytes().removesuffix(b"\n") == name:
                numbers.append(int(task.name))
    return numbers


def keep_off_this_core(threads: Sequence[int]) -> None:
    """Let threads run on any core but the one that the calling thread is on.

    The kernel may wake a thread on the core of the one that waits for it there, busily, though
    another core is idle, and moves it only milliseconds later. Where this may not be said, or there
    is no other core, they stay where they may be.

    Args:
        threads: Of this process, by the kernel's numbers.
    """
    if threads and _this_core is not None:
        others = os.sched_getaffinity(0) - {_this_core()}
        for thread in threads:
            with suppress(OSError):
                os.sched_setaffinity(thread, others)
