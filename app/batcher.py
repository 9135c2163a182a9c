"""Work-conserving micro-batching: one pool of workers does all that an image needs done.

A free worker waits for nothing that has not come, and an image that is alone is run on more cores
than one, where the engine can. Where the network runs on the CPU, on the very cores that decode, a
worker decodes what waits before it runs a small batch, or one beside enough others; a GPU is never
left idle for that. While other images wait, fewer large ones are decoded at once. Requests reserve
their place before anything is decoded, so that what is in memory is bounded; who would most likely
be answered too late is refused at once. A job whose caller has gone, or whose deadline has passed,
is dropped when it is taken up, and, while others wait, one that would hardly be answered in time:
else a wrong guess at the door would have every image late. A batch that fails is tried again in
halves, so that one bad image, or a GPU short of memory, costs the others nothing.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from app.engines import Engine, is_out_of_memory, one_line
from app.pace import Pace
from app.telemetry import Metrics
from models.bundle import Outputs
from models.turns import NotItsTurn, is_anyones_turn, skip_turn

Pixels = NDArray[np.uint8]
T = TypeVar("T")
# Bytes that take long enough to copy for others to use the interpreter meanwhile.
_MUCH = 1_000_000
# How often it is looked whether a large image's turn has come.
_TURN_SECONDS = 0.05
# Longest that a worker that is to stop is waited for, while it finishes one piece of work.
_LAST_SECONDS = 2.0
# Failures in a row, after each of which a blank image failed, too: it is not the images' fault.
_MOST_FAILURES = 3
# Runs after which a batch that was halved, for want of memory, may be twice as large again; each
# time that this was wrong, it takes twice as many.
_RUNS_BEFORE_MORE = 1_000
log = structlog.get_logger()


class Refused(Exception):
    """An image that the batcher does not take, or gives up."""


class Saturated(Refused):
    """As many images are admitted as the queue may hold."""


class Late(Refused):
    """So many wait already that the image would most likely not be run in time."""


class Draining(Refused):
    """The batcher is closing."""


class NotReady(Refused):
    """The engine is warming up, or a worker has died or hangs."""


class DeadlineExceeded(Refused):
    """The image was not run in time."""


class InferenceFailed(Refused):
    """The engine failed on this image alone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The outputs for one image, and how long it took to get them.

    Attributes:
        outputs: By name, the row of this image; and what was measured of its pixels.
        queue_seconds: That it waited, for its decoding and for its batch.
        inference_seconds: The run of its batch, with those measures.
        ended: When that was over, on `time.monotonic`'s clock.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    queue_seconds: float
    inference_seconds: float
    ended: float


@dataclass(slots=True)
class _Job:
    # One; none once a worker has it, or nobody waits for it: it holds the upload.
    work: list[Callable[[], Any]]
    deadline: float
    future: "Future[Any]"
    # Whether the work gives pixels that the network is run on; else, the answer itself.
    decodes: bool = True
    put: float = field(default_factory=time.monotonic)
    since: float = 0.0
    taken: float = 0.0
    waited: float = 0.0
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        self.since = self.put

    def why_not(self, now: float, needed: float = 0.0) -> str | None:
        """Count its wait so far, and say why it is not worth working on, if it is not.

        Args:
            now: On `time.monotonic`'s clock.
            needed: Seconds from here to its answer, if that is known; of its time no more than half
                is kept for it, or a guess that is too long would have nothing answered any more.
        """
        self.waited += now - self.since
        self.since = now
        # At the deadline the request gives its images up, too.
        if self.deadline - now < min(needed, (self.deadline - self.put) / 2):
            self.fail(DeadlineExceeded())
            return "deadline"
        return "gone" if self.future.cancelled() else None

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless nobody waits for it any more."""
        if not self.future.done():
            with suppress(InvalidStateError):  # cancelled just now
                self.future.set_exception(error)

    def succeed(self, answer: object) -> None:
        """Answer, unless nobody waits for it any more."""
        if not self.future.done():
            with suppress(InvalidStateError):
                self.future.set_result(answer)


class Batcher:
    """The bounded queue and its workers.

    Args:
        engine: Loaded.
        input_size: Height and width of its images.
        cores: That decode, and on a CPU run the network; a thread each, and the engine's helpers.
        queue_size: Most images admitted at once.
        metrics: Told of every batch.
        measure: What else there is to find in a batch's pixels; it joins the engine's outputs.
    """

    def __init__(
        self,
        engine: Engine,
        input_size: tuple[int, int],
        cores: int,
        queue_size: int,
        metrics: Metrics,
        measure: Callable[[Pixels], Outputs],
    ):
        self._engine = engine
        self._input_size = input_size
        self._queue_size = queue_size
        self._metrics = metrics
        self._measure = measure
        self._max_batch = engine.batch
        # Runs until it may be twice as large again, where it was halved; and after the next time.
        self._until_more, self._runs_before_more = 0, _RUNS_BEFORE_MORE
        self._admitted = 0
        self._encoded: deque[_Job] = deque()
        # Large images whose turn has not come wait here, so that no worker waits.
        self._large: deque[_Job] = deque()
        self._decoded: deque[_Job] = deque()
        # Images that gave nothing to run since the first of these was decoded.
        self._fruitless = 0
        self._running = 0
        # Who waits for the last answer does not wait where the workers do: `notify` wakes one
        # thread, whichever it is, and the wake-up would be lost on them.
        lock = threading.RLock()
        self._changed, self._emptied = threading.Condition(lock), threading.Condition(lock)
        self._draining = False
        self._closed = False
        self._failed = False
        self._failures = 0
        self._warm = threading.Event()
        # The first one warms the engine up for all.
        self._workers = [
            threading.Thread(target=self._work, args=[i == 0], name=f"mmtl-work-{i}", daemon=True)
            for i in range(cores + engine.helpers)
        ]
        self._pace = Pace()
        # What each worker, by name, has worked on since when.
        self._busy: dict[str, tuple[float, list[_Job]]] = {}

    @property
    def ready(self) -> bool:
        """Whether images are taken: warmed up, not failed and not closing."""
        stopped = self._failed or self._draining or self._closed
        return self._warm.is_set() and not stopped

    @property
    def alive(self) -> bool:
        """Whether the workers are working, warm or not."""
        return not self._failed and all(worker.is_alive() for worker in self._workers)

    @property
    def admitted(self) -> int:
        """Images that are admitted and not answered."""
        return self._admitted

    @property
    def others_wait(self) -> bool:
        """Whether images wait, to be decoded or finished, that are not known to be large."""
        return bool(self._encoded)

    def broken(self, seconds: float) -> bool:
        """Whether a worker has died, or has been at one piece of work for longer than that."""
        now = time.monotonic()
        busy = self._busy.copy().values()
        return not self.alive or any(now - since > seconds for since, _ in busy)

    def wait_ready(self, longest: float = math.inf) -> bool:
        """Wait for the warm-up, for so many seconds at most; whether it went well."""
        until = time.monotonic() + longest
        while not self._warm.wait(0.01):
            if not self.alive or time.monotonic() > until:
                return False
        return True

    def start(self) -> None:
        """Start the workers; the engine is warmed up before it is ready."""
        try:
            for worker in self._workers:
                worker.start()
        except RuntimeError:  # no thread is to be had
            self.close(0)
            raise

    def drain(self) -> None:
        """Admit no more requests, and answer those that have begun. Safe in a signal handler."""
        self._draining = True

    def close(self, timeout: float) -> None:
        """Take no more images, run those that wait, and stop the workers.

        Args:
            timeout: Seconds for those that wait; what is being worked on then is finished, unless
                it hangs.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._join(0 if self._failed else timeout)  # which has refused those that wait
        self._refuse_all(Draining())
        # Where the interpreter ends while one is in a runtime's C++, that aborts the process.
        if not self._join(_LAST_SECONDS):
            skip_turn()  # it may hang in its turn

    def _join(self, timeout: float) -> bool:
        """Wait for the workers' end; whether all have ended, or not begun."""
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            if worker.is_alive():
                worker.join(max(deadline - time.monotonic(), 0))
        return not any(worker.is_alive() for worker in self._workers)

    def retire(self, timeout: float) -> None:
        """Close when the requests that are admitted have been answered, or the time is up."""
        deadline = time.monotonic() + timeout
        with self._emptied:
            self._emptied.wait_for(lambda: self._admitted == 0, timeout)
            self._closed = True  # before another request gets in
        self.close(max(deadline - time.monotonic(), 0))

    def abandon(self) -> None:
        """Refuse everything at once, what is being worked on too; a worker that hangs is left."""
        self._fail(NotReady())
        for _, jobs in self._busy.copy().values():
            for job in jobs:
                job.fail(NotReady())
        skip_turn()

    @contextmanager
    def reserve(
        self, count: int, begun: bool = False, deadline: float = math.inf
    ) -> Iterator[None]:
        """Hold places for a request's images while the block runs.

        Args:
            count: Of the images.
            begun: The request had begun before the batcher drained, if it does: it is answered.
            deadline: Of its answer, on `time.monotonic`'s clock.

        Raises:
            Draining: The batcher is closing.
            Late: There are places, but what waits already would most likely have them late.
            NotReady: The engine is not warm, or a worker has died.
            Saturated: There is no place for all of them.
        """
        with self._changed:
            if self._closed or (self._draining and not begun):
                raise Draining
            if self._failed or not self._warm.is_set():
                raise NotReady
            if self._admitted + count > self._queue_size:
                raise Saturated
            left = deadline - time.monotonic()
            # Where none wait they are taken: what they need may have been guessed too long.
            if self._admitted and self._pace.would_be_late(self._admitted + count, left):
                raise Late
            self._admitted += count
        try:
            yield
        finally:
            with self._changed:
                self._admitted -= count
                if not self._admitted:
                    self._emptied.notify_all()

    def put(self, decode: Callable[[], Pixels], deadline: float, future: "Future[Answer]") -> None:
        """Queue one image, within a reservation, from any thread.

        Args:
            decode: Called in a worker's thread; uint8 [height, width, 3]. Where it raises
                `NotItsTurn` it is called again, when another large image may be decoded.
            deadline: On `time.monotonic`'s clock.
            future: Gets the answer, or what `decode` raised, or the subclass of `Refused` that says
                why there is none. Who no longer wants it cancels it.
        """
        self._queue(_Job([decode], deadline, future), self._encoded.append)

    def finish(self, work: Callable[[], T], deadline: float, future: "Future[T]") -> None:
        """Queue what is still to be done for an image, before images that wait; else as `put`."""
        self._queue(_Job([work], deadline, future, decodes=False), self._encoded.appendleft)

    def _queue(self, job: _Job, add: Callable[[_Job], None]) -> None:
        work = job.work
        # Not the job, which holds the future: each would keep the other from being freed.
        job.future.add_done_callback(lambda _: work.clear())
        with self._changed:
            if not self._failed and not self._closed:
                add(job)
                self._changed.notify()
                return
        job.fail(Draining() if self._closed else NotReady())

    def _work(self, warms_up: bool) -> None:
        jobs: list[_Job] = []
        name = threading.current_thread().name
        try:
            if warms_up:
                self._warm_up(name)
            while (taken := self._take(name)) is not None:
                jobs = taken
                if not jobs:
                    continue
                if jobs[0].pixels is None:
                    self._work_on(jobs[0])
                else:
                    self._run(jobs)
                del self._busy[name]
                del taken, jobs[:]  # an image need not be held until the next one comes
        except BaseException as error:  # whatever it was, no caller may hang on it
            log.error("worker died", error=type(error).__name__, reason=str(error))
            reason = Draining() if self._closed else NotReady()
            self._fail(reason)
            for job in jobs:
                job.fail(reason)
            raise

    def _warm_up(self, name: str) -> None:
        started = time.monotonic()
        # On a GPU, each size has a graph of its own.
        on_cpu = self._engine.device == "cpu"
        for size in {1, self._max_batch} if on_cpu else range(1, self._max_batch + 1):
            if self._closed:
                return
            self._busy[name] = time.monotonic(), []  # the first run may hang as any other
            self._engine.run(np.zeros((size, *self._input_size, 3), np.uint8))
        self._busy[name] = time.monotonic(), []
        self._engine.run_alone(np.zeros((1, *self._input_size, 3), np.uint8))
        del self._busy[name]
        if self._failed:  # somebody waited for too long
            return
        self._warm.set()
        log.info("ready", warm_up_seconds=round(time.monotonic() - started, 3))

    def _worth_a_run(self) -> bool:
        """Whether what is decoded is worth one, while other images wait to be decoded.

        Those that give nothing count: else who sends damaged ones, one after the other, would keep
        what is decoded from being run.
        """
        enough = self._max_batch if self._engine.device == "cpu" else 1
        return len(self._decoded) + self._fruitless >= enough

    def _take(self, name: str) -> list[_Job] | None:
        """One job to decode, or a batch to run; None when closed and empty, or one has died."""
        with self._changed:
            while not self._failed:
                free = self._running < self._engine.runs_at_once
                large = bool(self._large) and is_anyones_turn(self.others_wait)
                to_decode = self._large if large else self._encoded
                if self._decoded and free and (self._worth_a_run() or not to_decode):
                    jobs = self._batch()
                elif to_decode:
                    job = to_decode.popleft()
                    now = job.taken = time.monotonic()
                    guessed = bool(to_decode) and job.decodes
                    needed = self._pace.needed if guessed else 0.0
                    jobs = [job] if self._still_wanted(job, now, needed) else []
                    self._fruitless += not jobs
                elif self._closed and not self._decoded and not self._large:
                    break
                else:
                    # The turn may be one in another network, which tells nobody here of its end.
                    self._changed.wait(_TURN_SECONDS if self._large else None)
                    if self._large:
                        now = time.monotonic()
                        self._large = deque(
                            job for job in self._large if self._still_wanted(job, now)
                        )
                    continue
                if jobs:  # a job is always somewhere where `abandon` finds it
                    self._busy[name] = time.monotonic(), jobs
                return jobs
            # The others wait for what this one was the last to do.
            self._changed.notify_all()
            return None

    def _batch(self) -> list[_Job]:
        """What is decoded, up to the largest batch."""
        now = time.monotonic()
        jobs: list[_Job] = []
        while self._decoded and len(jobs) < self._max_batch:
            job = self._decoded.popleft()
            if self._still_wanted(job, now):
                jobs.append(job)
        self._running += bool(jobs)
        return jobs

    def _still_wanted(self, job: _Job, now: float, needed: float = 0.0) -> bool:
        """Whether somebody still waits for it, and it can be answered in time."""
        if (why := job.why_not(now, needed)) is not None and job.decodes:
            self._metrics.dropped.labels(why).inc()
        return why is None

    def _work_on(self, job: _Job) -> None:
        try:
            work = job.work.pop()
        except IndexError:  # the caller has gone just now
            return
        try:
            found = work()
        except NotItsTurn:
            job.since = time.monotonic()
            job.work.append(work)
            if job.future.done():  # just now: nobody is left to let go of the upload
                job.work.clear()
            with self._changed:
                if self._failed:
                    job.fail(NotReady())
                else:
                    self._large.append(job)
            return
        except Exception as error:
            job.fail(error)
            with self._changed:
                self._fruitless += 1
                self._pace.note_done(1, job.taken, time.monotonic())
            # The error's traceback holds this frame, and the job's future holds the error: the
            # upload would stay until the next collection of garbage.
            del job
            return
        if not job.decodes:
            job.succeed(found)
            return
        job.pixels = found
        job.since = time.monotonic()
        with self._changed:
            if self._failed:  # nobody runs what is decoded any more
                job.fail(NotReady())
                return
            if not self._decoded:
                self._fruitless = 0
            self._decoded.append(job)
            self._changed.notify()

    def _run(self, jobs: list[_Job]) -> None:
        try:
            self._infer(jobs)
        finally:
            with self._changed:
                self._running -= 1
                self._pace.note_done(len(jobs), jobs[0].taken, time.monotonic())
                self._changed.notify()

    def _infer(self, jobs: list[_Job], again: bool = False) -> None:
        started = time.monotonic()
        try:
            pixels = _stack([job.pixels for job in jobs if job.pixels is not None])
            # Who is alone need not leave a core to others; what failed so is run as others are.
            alone = self._admitted == 1 and not again
            run = self._engine.run_alone if alone else self._engine.run
            outputs = {**run(pixels), **self._measure(pixels)}
            if short := [name for name, values in outputs.items() if len(values) != len(jobs)]:
                raise ValueError(f"{short[0]} has not a row for each image")
            rows = [values.reshape(len(jobs), -1) for values in outputs.values()]
            finite = np.all(np.isfinite(np.concatenate(rows, 1)), axis=1)
        except Exception as error:
            self._try_again(jobs, error, again)
            return
        ended = time.monotonic()
        took = ended - started
        self._metrics.batch_size.observe(len(jobs))
        for row, (job, whole) in enumerate(zip(jobs, finite, strict=True)):
            if whole:
                one = {name: values[row] for name, values in outputs.items()}
                job.succeed(Answer(one, job.waited, took, ended))
                self._pace.note_needed(ended - job.taken)
            else:
                log.error("inference failed", error="NotFinite", reason="an output is not finite")
                job.fail(InferenceFailed())
        if finite.all():
            self._failures = 0
        else:
            self._suspect()
        if self._max_batch < self._engine.batch:
            self._until_more -= 1
            if self._until_more <= 0:
                self._max_batch = min(2 * self._max_batch, self._engine.batch)
                self._until_more = self._runs_before_more

    def _try_again(self, jobs: list[_Job], error: Exception, again: bool) -> None:
        """A batch that failed in halves; one image once more."""
        self._metrics.failed_runs.inc()
        log.warning(
            "run failed", images=len(jobs), error=type(error).__name__, reason=one_line(error)
        )
        half = len(jobs) // 2
        if half:
            # What was run may have been filled up to a power of two.
            fewer = 1 << ((len(jobs) - 1).bit_length() - 1)
            if is_out_of_memory(error) and fewer < self._max_batch:
                log.warning("batches halved", most=fewer)
                self._max_batch, self._until_more = fewer, self._runs_before_more
                self._runs_before_more *= 2
            self._infer(jobs[:half])
            self._infer(jobs[half:])
        elif not again:
            self._infer(jobs, again=True)
        else:
            log.error("inference failed", error=type(error).__name__)
            jobs[0].fail(InferenceFailed())
            self._suspect()

    def _suspect(self) -> None:
        """See after a failure whether the network still runs at all: give it up, where not.

        A GPU that has fallen off the bus fails for every image, and nobody else would notice.
        """
        try:
            outputs = self._engine.run(np.zeros((1, *self._input_size, 3), np.uint8))
            runs = all(bool(np.isfinite(values).all()) for values in outputs.values())
        except Exception:
            runs = False
        self._failures = 0 if runs else self._failures + 1
        if self._failures < _MOST_FAILURES:
            return
        log.error("network fails", failures=self._failures)
        self._fail(NotReady())

    def _fail(self, reason: Refused) -> None:
        """Run nothing more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()
        self._refuse_all(reason)

    def _refuse_all(self, reason: Refused) -> None:
        with self._changed:
            jobs = [*self._encoded, *self._large, *self._decoded]
            self._encoded.clear()
            self._large.clear()
            self._decoded.clear()
        for job in jobs:
            job.fail(reason)


def _stack(pixels: list[Pixels]) -> Pixels:
    """What `np.stack` gives, which lets the interpreter go while it copies.

    To get it back, on cores that are all busy, takes a hundred times as long as to copy a few
    images.
    """
    if sum(one.nbytes for one in pixels) > _MUCH:
        return np.stack(pixels)
    joined = np.frombuffer(bytearray().join(one.data for one in pixels), np.uint8)
    return joined.reshape(len(pixels), *pixels[0].shape)
