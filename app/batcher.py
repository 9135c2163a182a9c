"""Work-conserving micro-batching: a free engine takes everything that waits, and waits for nothing.

One thread runs the engine. Requests reserve their place before they are decoded, so that what is in
memory is bounded; a job whose caller has gone, or whose deadline has passed, is dropped when it is
taken off the queue.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from app.engines import Engine
from app.telemetry import Metrics

Pixels = NDArray[np.uint8]
log = structlog.get_logger()


class Refused(Exception):
    """An image that the batcher does not take, or gives up."""


class Saturated(Refused):
    """As many images are admitted as the queue may hold."""


class Draining(Refused):
    """The batcher is closing."""


class NotReady(Refused):
    """The engine is warming up, or its runner has died."""


class DeadlineExceeded(Refused):
    """The image was not run in time."""


class InferenceFailed(Refused):
    """The engine failed on this image alone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The engine's outputs for one image, and how long it took to get them.

    Attributes:
        outputs: By name, the row of this image.
        queue_seconds: From being queued to the start of its batch.
        inference_seconds: The run of its batch.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    queue_seconds: float
    inference_seconds: float


@dataclass(slots=True)
class _Job:
    pixels: Pixels
    deadline: float
    future: "Future[Answer]" = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)

    def take(self, now: float) -> bool:
        """Whether the job is still worth running."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if now > self.deadline:
            self.future.set_exception(DeadlineExceeded())
            return False
        return True


class Batcher:
    """The bounded queue and its runner.

    Args:
        engine: Loaded.
        input_size: Height and width of its images.
        max_batch: Most images in one run.
        queue_size: Most images admitted at once.
        metrics: Told of every batch.
    """

    def __init__(
        self,
        engine: Engine,
        input_size: tuple[int, int],
        max_batch: int,
        queue_size: int,
        metrics: Metrics,
    ):
        self._engine = engine
        self._input_size = input_size
        self._max_batch = max_batch
        self._queue_size = queue_size
        self._metrics = metrics
        self._admitted = 0
        self._queue: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._changed = threading.Condition()
        self._draining = False
        self._closed = False
        self._warm = threading.Event()
        self._runner = threading.Thread(target=self._run, name="mmtl-runner", daemon=True)
        metrics.queue_depth.set_function(lambda: self._admitted)

    @property
    def ready(self) -> bool:
        """Whether images are taken: warmed up, alive and not closing."""
        return self._warm.is_set() and self.alive and not self._draining and not self._closed

    @property
    def alive(self) -> bool:
        """Whether the runner is running, warm or not."""
        return self._runner.is_alive()

    def start(self) -> None:
        """Start the runner, which warms up before it is ready."""
        self._runner.start()

    def drain(self) -> None:
        """Admit no more requests, and answer those that are. Safe in a signal handler."""
        self._draining = True

    def close(self, timeout: float | None = None) -> None:
        """Take no more images, run those that wait, and stop the runner."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._runner.is_alive():
            self._runner.join(timeout)
        self._refuse_all(Draining())

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold places for a request's images while the block runs.

        Raises:
            Draining: The batcher is closing.
            NotReady: The runner is not warm, or has died.
            Saturated: There is no place for all of them.
        """
        with self._changed:
            if self._closed or self._draining:
                raise Draining
            if not self.ready:
                raise NotReady
            if self._admitted + count > self._queue_size:
                raise Saturated
            self._admitted += count
        try:
            yield
        finally:
            with self._changed:
                self._admitted -= count

    async def submit(self, pixels: Pixels, deadline: float) -> Answer:
        """Run one image, within a reservation.

        Args:
            pixels: uint8 [height, width, 3].
            deadline: On `time.monotonic`'s clock.

        Raises:
            Refused: One of its subclasses says why.
        """
        job = _Job(pixels, deadline)
        with self._changed:
            if self._closed:
                raise Draining
            if not self.alive:
                raise NotReady
            self._queue.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def _run(self) -> None:
        try:
            self._warm_up()
            while (jobs := self._take()) is not None:
                if jobs:
                    self._infer(jobs)
        except BaseException as error:  # whatever it was, no caller may hang on it
            log.error("runner died", error=type(error).__name__, reason=str(error))
            raise
        finally:
            reason = Draining() if self._closed else NotReady()
            for job in self._running:
                if not job.future.done():
                    job.future.set_exception(reason)
            self._refuse_all(reason)

    def _warm_up(self) -> None:
        started = time.monotonic()
        for size in range(1, self._max_batch + 1):
            if self._closed:
                return
            self._engine.run(np.zeros((size, *self._input_size, 3), np.uint8))
        self._warm.set()
        log.info("ready", warm_up_seconds=round(time.monotonic() - started, 3))

    def _take(self) -> list[_Job] | None:
        """The next batch's jobs; None when closed and empty."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            now = time.monotonic()
            jobs: list[_Job] = []
            while self._queue and len(jobs) < self._max_batch:
                job = self._queue.popleft()
                if job.take(now):
                    jobs.append(job)
            self._running = jobs
            return jobs

    def _infer(self, jobs: list[_Job]) -> None:
        started = time.monotonic()
        try:
            outputs = self._engine.run(np.stack([job.pixels for job in jobs]))
            rows = [
                {name: values[row] for name, values in outputs.items()} for row in range(len(jobs))
            ]
        except Exception as error:
            if len(jobs) == 1:
                log.error("inference failed", error=type(error).__name__, reason=str(error))
                jobs[0].future.set_exception(InferenceFailed())
            else:  # one image of them may be at fault: each alone
                for job in jobs:
                    self._infer([job])
            return
        took = time.monotonic() - started
        self._metrics.batch_size.observe(len(jobs))
        for job, row in zip(jobs, rows, strict=True):
            if all(np.isfinite(values).all() for values in row.values()):
                job.future.set_result(Answer(row, started - job.queued, took))
            else:
                log.error("inference failed", error="NotFinite", reason="an output is not finite")
                job.future.set_exception(InferenceFailed())

    def _refuse_all(self, reason: Refused) -> None:
        with self._changed:
            jobs = [job for job in self._queue if job.future.set_running_or_notify_cancel()]
            self._queue.clear()
        for job in jobs:
            job.future.set_exception(reason)
