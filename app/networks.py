"""The served network: loaded, succeeded by a reload, replaced when it dies, hangs or only fails."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from os.path import isfile

import structlog

from app.batcher import Batcher, Draining
from app.engines import Engine, EngineError, open_engine, warm_up_failed
from app.quality import measure
from app.schemas import ModelFacts
from app.settings import Settings
from app.telemetry import Metrics
from models.bundle import Artifact, Bundle, load_bundle
from models.memory import give_back, trim_heaps_soon
from models.threads import begin

# How often the workers are looked at.
_WATCH_SECONDS = 0.5
# A worker that hangs cannot be stopped and keeps its memory: after so many, the process ends.
_MOST_REPLACEMENTS = 3
# Longest that loading another one in its place may take.
_LOAD_SECONDS = 120.0
# Longest that one that is being loaded is waited for at the end, while it does not hang.
_LAST_SECONDS = 5.0
log = structlog.get_logger()


class ReloadError(Exception):
    """The served network stays; the message says why."""


@dataclass(frozen=True, slots=True)
class Network:
    """A verified bundle, one of its artifacts in an engine, and the queue before it."""

    bundle: Bundle
    artifact: Artifact
    facts: ModelFacts
    engine: Engine
    batcher: Batcher


class Networks:
    """The network that is served now.

    A request is answered by the network that was served when it had arrived whole; another takes
    over between two requests, and the old one ends with its last.

    Args:
        settings: Which bundle, artifact and device; batch, queue and deadline.
        metrics: Told of every batch, and of the network.

    Raises:
        models.bundle.BundleError: The bundle cannot be used.
        app.engines.EngineError: The runtime or the device is not there.
    """

    def __init__(self, settings: Settings, metrics: Metrics):
        self._settings = settings
        self._metrics = metrics
        # Held while one network takes the place of another, until that one has ended.
        self._switching = threading.Lock()
        # Held by a reload that waits for that.
        self._next = threading.Lock()
        self._stopped = threading.Event()
        self._draining = False
        self._drained_at = 0.0
        # Whether it cannot be replaced.
        self.failed = False
        self._replacements = 0
        # At most one. As an argument it would be in memory until its thread has given that back.
        self._retiring: list[Network] = []
        # The one that is being loaded, which `close` looks for: it has begun before it is noted.
        self._loading: Future[Network] | None = None
        self._noting = threading.Lock()
        # Called when the network cannot be replaced: the process should end, and be started anew.
        self.on_failure: Callable[[], None] = lambda: None
        self.current = self._load()
        self._announce()
        metrics.queue_depth.set_function(
            lambda: sum(each.batcher.admitted for each in (self.current, *self._retiring))
        )
        metrics.queue_limit.set(settings.queue_size)
        metrics.ready.set_function(lambda: self.current.batcher.ready)

    def start(self) -> None:
        """Start the network, and watch it."""
        self.current.batcher.start()
        threading.Thread(target=self._watch, name="mmtl-watch", daemon=True).start()

    def version(self) -> str:
        """Of the bundle that is served."""
        return self.current.facts.version

    @property
    def draining(self) -> bool:
        """Whether the service is to end."""
        return self._draining

    def drain(self) -> None:
        """Admit no more requests, and answer those that have begun. Safe in a signal handler."""
        if not self._draining:
            self._drained_at = time.monotonic()
        self._draining = True
        self.current.batcher.drain()

    def close(self, longest: float) -> None:
        """Stop; what is still queued is run first, for so many seconds (since `drain`) at most."""
        self._stopped.set()
        if self._draining:
            longest = max(longest - (time.monotonic() - self._drained_at), 0)
        self.current.batcher.close(longest)
        # Where the interpreter ends while another is in a runtime's C++, that aborts the process.
        with self._noting:
            loading = self._loading
        if loading is not None:
            wait([loading], _LAST_SECONDS)

    @contextmanager
    def reserve(
        self, count: int, begun: bool = False, deadline: float = math.inf
    ) -> Iterator[Network]:
        """The served network, with places held for a request's images while the block runs.

        Args:
            count: Of the images.
            begun: As `Batcher.reserve` has it.
            deadline: Likewise.

        Raises:
            app.batcher.Refused: As `Batcher.reserve` does.
        """
        with ExitStack() as held:
            while True:
                network = self.current
                try:
                    held.enter_context(network.batcher.reserve(count, begun, deadline))
                    break
                except Draining:
                    if network is self.current:
                        raise
                    # It has retired just now, and its successor is there.
            yield network

    def reload(self) -> Network:
        """Load the bundle again, beside the served one, and let it take over once it is warm.

        Its hashes, shapes and golden predictions are checked as at the start; on any doubt the
        served network stays.

        Raises:
            ReloadError: The bundle cannot be used, or another is taking over just now.
        """
        if not self._switching.acquire(blocking=False):
            # Nothing that an operator has to be told: the other one may be this bundle.
            raise ReloadError("Another network is taking over just now. Try again.")
        return self._switch()

    def _switch(self) -> Network:
        try:
            if self._draining or self._stopped.is_set():
                raise ReloadError("The service is shutting down.")
            old, self.current = self.current, self._load_apart()
            refusal = None
        except Exception as error:  # each runtime raises types of its own
            refusal = self._note_refusal(error)
        except BaseException:
            self._switching.release()
            raise
        if refusal is not None:
            try:
                # Now that the error has gone: frames of its traceback hold what was loaded.
                give_back()
            finally:
                self._switching.release()
            raise refusal
        if self._draining:
            self.current.batcher.drain()
        self._metrics.reloads.labels("switched").inc()
        self._announce()
        log.info("reloaded", before=old.facts.version, now=self.version())
        self._retiring.append(old)
        try:
            begin(self._retire)
        except RuntimeError:  # no thread is to be had just now
            self._retire()
        return self.current

    def begin_reload(self) -> "Future[Network]":
        """`reload`, in a thread of its own: a file system may hang."""
        try:
            return begin(self.reload)
        except RuntimeError as error:  # no thread is to be had just now
            refused: Future[Network] = Future()
            refused.set_exception(self._note_refusal(error))
            return refused

    def hang_up(self) -> None:
        """`begin_reload`, on SIGHUP: after one under way, which may have read the bundle before."""
        if not self._next.acquire(blocking=False):
            return  # one that waits will read what is there by then
        try:
            begin(self._reload_next)
        except RuntimeError as error:  # no thread is to be had just now
            self._next.release()
            self._note_refusal(error)

    def _reload_next(self) -> None:
        self._switching.acquire()
        self._next.release()
        with suppress(ReloadError):  # which is logged
            self._switch()

    def _note_refusal(self, error: Exception) -> ReloadError:
        """Count and log it; what to raise."""
        reason = str(error) or type(error).__name__
        self._metrics.reloads.labels("refused").inc()
        log.error("reload refused", error=type(error).__name__, reason=reason)
        return ReloadError(reason)

    def _retire(self) -> None:
        """End the old network with its last request, and give its memory back."""
        try:
            self._retiring[0].batcher.retire(self._settings.deadline_seconds)
        finally:
            self._retiring.clear()
            give_back()
            self._switching.release()

    def _watch(self) -> None:
        try:
            give_back()  # what loading took; here, as nobody waits for it
            self._replace_what_breaks()
        except BaseException as error:  # nobody would look after the network any more
            log.error("watch died", error=type(error).__name__, reason=str(error))
            self._give_up()
            raise

    def _replace_what_breaks(self) -> None:
        suspect: Batcher | None = None
        while not self._stopped.wait(_WATCH_SECONDS):
            looked_at = self.current.batcher
            broken = looked_at.broken(self._settings.hang_seconds)
            # The same one twice in a row: where the whole process was stopped for a while, all look
            # hung, and one that was succeeded meanwhile has ended.
            replaces = broken and looked_at is suspect
            if replaces and not self._replace(looked_at):
                if not self._stopped.is_set():  # else it is to end anyhow, and well
                    self._give_up()
                return
            suspect = looked_at if broken and not replaces else None
            del looked_at  # which would hold a network that is replaced in memory
            if replaces:
                give_back()

    def _give_up(self) -> None:
        self.failed = True
        self.on_failure()

    def _replace(self, broken: Batcher) -> bool:
        """Load the network anew in the place of a broken one; False where that does not help."""
        broken.abandon()
        # What a reload takes, and the end of the network before it.
        if not self._switching.acquire(timeout=_LOAD_SECONDS + self._settings.deadline_seconds):
            return self.current.batcher is not broken  # else a reload hangs, too
        try:
            if self.current.batcher is not broken:
                return True  # a reload has been faster
            self._replacements += 1
            self._metrics.replacements.inc()
            log.error("network broken", replaced_before=self._replacements - 1)
            if self._replacements > _MOST_REPLACEMENTS:
                return False
            try:
                self.current = self._load_apart()
            except Exception as error:
                if not self._stopped.is_set():
                    log.error("network not replaced", error=type(error).__name__, reason=str(error))
                return False
            self._announce()
        finally:
            self._switching.release()
        if self._draining:
            self.current.batcher.drain()
        log.warning("network replaced", version=self.version())
        return True

    def _load_apart(self) -> Network:
        """A warm one, loaded in another thread, as a runtime or a file system may hang.

        Raises:
            EngineError: It takes too long, failed while it was warmed up, or is not wanted any
                more; else as `__init__`.
        """
        with self._noting:
            self._loading = loading = begin(self._load_warm)
        if loading not in wait([loading], _LOAD_SECONDS).done:
            loading.add_done_callback(self._end_late)
            raise EngineError(f"The network was not loaded in {_LOAD_SECONDS:.0f} seconds.")
        self._loading = None  # which would hold it in memory
        try:
            network = loading.result()
        finally:
            del loading  # its error's traceback holds this frame
        if self._stopped.is_set():
            network.batcher.close(0)
            raise EngineError("The service is shutting down.")
        return network

    def _end_late(self, loading: "Future[Network]") -> None:
        """End a network that nobody waits for any more, and forget it."""
        if loading.exception() is None:
            loading.result().batcher.close(0)
        with self._noting:
            if self._loading is loading:  # and not that of a later try
                self._loading = None
        trim_heaps_soon()

    def _load_warm(self) -> Network:
        network = self._load()
        try:
            network.batcher.start()
            if not network.batcher.wait_ready(_LOAD_SECONDS):
                raise warm_up_failed()
        except BaseException:
            network.batcher.close(0)  # the workers that have started
            raise
        return network

    def _load(self) -> Network:
        settings = self._settings
        bundle = load_bundle(settings.bundle, settings.bundle_signed_by)
        artifact, engine = open_engine(bundle, settings)
        manifest = bundle.manifest
        return Network(
            bundle,
            artifact,
            ModelFacts(
                name=manifest.name,
                version=manifest.version,
                sha256=artifact.sha256,
                manifest_sha256=bundle.manifest_sha256,
            ),
            engine,
            Batcher(
                engine,
                (manifest.input.height, manifest.input.width),
                settings.cores,
                settings.queue_size,
                self._metrics,
                measure,
            ),
        )

    def _announce(self) -> None:
        network = self.current
        log.info(
            "serving",
            version=network.facts.version,
            artifact=network.artifact.file,
            precision=network.artifact.precision,
            runtime=network.engine.name,
            device=network.engine.device,
            sha256=network.artifact.sha256,
            manifest_sha256=network.bundle.manifest_sha256,
        )
        for artifact in network.bundle.manifest.artifacts:
            # Not Path's own, which raises where a file system fails: the network serves already.
            if artifact.format == "onnx" and not isfile(network.bundle.path(artifact)):
                log.warning("artifact absent", artifact=artifact.file, precision=artifact.precision)
        self._metrics.serve(
            network.bundle.manifest, network.facts, network.engine.name, network.engine.device
        )
