"""CUDA graphs: a network's kernels, recorded once for each size of batch and started as one.

To start so many small kernels one by one takes longer than to run them, and ONNX Runtime plans its
convolutions anew, for a second, whenever a batch has another size than the last
(docs/performance-gpu-steps.md). A graph has one size, so there is one for every power of two, and a
batch is filled up to the next. One thread runs all of a network's: ONNX Runtime keeps a graph for
the thread that recorded it.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.bundle import Outputs

Pixels = NDArray[np.uint8]
# uint8 [N, H, W, 3], always as many -> each output by name, float32 [N, ...].
Run = Callable[[Pixels], Outputs]
Record = Callable[[Pixels], Run]
_turn = threading.Lock()
_LONGEST_SECONDS = 60.0
_Tasks = queue.SimpleQueue["tuple[Callable[[], Outputs], Future[Outputs]] | None"]


class Busy(Exception):
    """A run elsewhere on the GPU does not end."""


@contextmanager
def alone() -> Iterator[None]:
    """Have the GPU to oneself in this process, as a recording must: another network may serve.

    Raises:
        Busy: A run elsewhere does not end.
    """
    if not _turn.acquire(timeout=_LONGEST_SECONDS):
        raise Busy("Another run on the GPU does not end.")
    try:
        yield
    finally:
        _turn.release()


class Graphs:
    """A graph for each size of batch, recorded when it is first needed.

    Args:
        max_batch: The largest size.
    """

    def __init__(self, max_batch: int):
        self.sizes = [2**power for power in range(9) if 2**power < max_batch] + [max_batch]
        self._recorded: dict[int, Run] = {}
        self._tasks: _Tasks = queue.SimpleQueue()
        threading.Thread(target=_work, args=[self._tasks], name="mmtl-cuda", daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def run(self, images: Pixels, record: Record) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name, float32 [N, ...].

        Args:
            images: As many as there are.
            record: Makes the graph of a batch's size, given such a batch. What it makes must not
                hold whoever has this, or the GPU's memory is given back late.
        """
        most = self.sizes[-1]
        parts = [self._run_part(images[i : i + most], record) for i in range(0, len(images), most)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run_part(self, images: Pixels, record: Record) -> Outputs:
        size = next(size for size in self.sizes if size >= len(images))
        filled = np.zeros((size, *images.shape[1:]), np.uint8)
        filled[: len(images)] = images
        done: Future[Outputs] = Future()
        self._tasks.put((partial(self._replay, filled, record), done))
        try:
            found = done.result()
        finally:
            del done  # its error's traceback holds this frame
        return {name: values[: len(images)] for name, values in found.items()}

    def _replay(self, images: Pixels, record: Record) -> Outputs:
        run = self._recorded.get(len(images))
        if run is None:
            run = self._recorded[len(images)] = record(images)
        with alone():
            return run(images)


def _work(tasks: _Tasks) -> None:
    # No method: the thread would keep the graphs from being freed.
    while (task := tasks.get()) is not None:
        work, done = task
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it was, its caller may not hang on it
            done.set_exception(error)
        del task, work, done
