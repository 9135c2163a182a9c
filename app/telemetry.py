"""What an operator sees: Prometheus metrics, structured logs, request ids and timings."""

import asyncio
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from math import ceil
from typing import TextIO
from uuid import uuid4

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.schemas import ModelFacts
from app.spans import Spans, traceparent
from app.trace import KEY, Trace
from models.bundle import Manifest

STAGES = ("decode", "queue", "inference", "explain")
# Of images: as their results say it, or the request was refused as a whole, or nobody waited.
OUTCOMES = ("ok", "error", "refused", "gone")
# Scrapes and probes come every few seconds and say nothing new.
QUIET_ROUTES = frozenset({"/health/live", "/health/ready", "/metrics"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# Of every answer of the application, and what they mean.
HEADERS = {
    "X-Request-ID": "The caller's, where it has a sane form, else a new one; in the log as well.",
    "X-Model-Version": "Of the bundle that answered, or is served.",
    "Server-Timing": "Milliseconds by stage.",
}
# Of `POST /predict`, that the application gives.
_STATUSES = (200, 400, 401, 403, 408, 413, 415, 422, 429, 499, 500, 503)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# As nginx counts it: the caller went before there was an answer.
_GONE = 499
# What metrics tell of a probability: a sum of exact ones would tell each, scrape by scrape.
_STEPS = 20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
log = structlog.get_logger()
# A `_created` series beside every counter and histogram would double what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]  # their own gap


class Metrics:
    """The service's metrics, in a registry of their own.

    Args:
        max_batch: Largest batch, the last bucket of the batch sizes.
        reasons: Why a request may be refused.
    """

    def __init__(self, max_batch: int, reasons: Iterable[str]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Histogram(
            "mmtl_http_request_duration_seconds",
            "From the end of a request's headers to the last byte of its answer.",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "mmtl_stage_duration_seconds",
            "Time of one image in a stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        sizes = [2**power for power in range(9) if 2**power < max_batch]
        self.batch_size = Histogram(
            "mmtl_batch_size",
            "Images in one run of the network.",
            buckets=[*sizes, max_batch],
            registry=registry,
        )
        self.queue_depth = Gauge(
            "mmtl_queue_depth", "Images admitted and not yet answered.", registry=registry
        )
        self.queue_limit = Gauge(
            "mmtl_queue_limit", "Most images admitted at once.", registry=registry
        )
        self.images = Counter(
            "mmtl_images", "Images, by what became of them.", ("outcome",), registry=registry
        )
        self.rejected = Counter(
            "mmtl_rejected",
            "Requests and images answered with a problem, by its type.",
            ("reason",),
            registry=registry,
        )
        self.melanoma_probability = Histogram(
            "mmtl_melanoma_probability",
            "Calibrated probability of melanoma; its sum is of the middles of the buckets.",
            buckets=[round(step / _STEPS, 2) for step in range(1, _STEPS + 1)],
            registry=registry,
        )
        self.predicted = Counter(
            "mmtl_predicted",
            "Images by most probable label; for melanoma, by decision.",
            ("task", "label"),
            registry=registry,
        )
        self.out_of_distribution = Counter(
            "mmtl_out_of_distribution", "Images unlike the training images.", registry=registry
        )
        self.dropped = Counter(
            "mmtl_dropped",
            "Images given up before they were run: the caller had gone, or they would be late.",
            ("reason",),
            registry=registry,
        )
        self.failed_runs = Counter(
            "mmtl_failed_runs",
            "Runs of the network that failed.",
            registry=registry,
        )
        self.ready = Gauge("mmtl_ready", "1 while images are taken, else 0.", registry=registry)
        self.processes = Gauge(
            "mmtl_processes", "Processes that the service should have.", registry=registry
        )
        self.reloads = Counter(
            "mmtl_reloads",
            "Bundles that were to replace the served one.",
            ("outcome",),
            registry=registry,
        )
        self.replacements = Counter(
            "mmtl_network_replacements",
            "Networks loaded anew because a worker had died or hung, or every image failed.",
            registry=registry,
        )
        self.keys_stale = Gauge(
            "mmtl_keys_stale",
            "1 while the key file cannot be read, and the keys before it hold, else 0.",
            registry=registry,
        )
        self.model_info = Gauge(
            "mmtl_model_info",
            "The served network; always 1.",
            ("name", "version", "sha256", "manifest_sha256", "engine", "device"),
            registry=registry,
        )
        # Looked up for every image: the library checks and hashes the labels at each call.
        self.stage = cache(self.stages.labels)
        self.predicted_as = cache(self.predicted.labels)
        for stage in STAGES:
            self.stage(stage)
        for status in _STATUSES:  # the first of a kind is a rise from zero, too
            self.requests.labels("POST", "/predict", status)
        for outcome in OUTCOMES:
            self.images.labels(outcome)
        for reason in reasons:
            self.rejected.labels(reason)
        for reason in ("gone", "deadline"):
            self.dropped.labels(reason)
        for outcome in ("switched", "refused"):
            self.reloads.labels(outcome)
        for decision in ("at_or_above_threshold", "below_threshold"):
            self.predicted_as("melanoma", decision)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and their media type.

        Args:
            accept: The header of who asks: for OpenMetrics, or Prometheus' text format.
        """
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # of a version that is no number
            encode, media_type = choose_encoder("")
        return encode(self.registry), media_type

    def observe_probability(self, probability: float) -> None:
        """Count a melanoma probability, as exactly as its bucket."""
        self.melanoma_probability.observe((max(ceil(probability * _STEPS), 1) - 0.5) / _STEPS)

    def serve(self, manifest: Manifest, facts: ModelFacts, engine: str, device: str) -> None:
        """Name the network that is served from now on; its labels are created up front."""
        for task in manifest.tasks:
            if task.kind != "binary":
                for label in task.labels:
                    self.predicted_as(task.name, label)
        self.model_info.clear()
        labels = facts.model_dump() | {"engine": engine, "device": device}
        self.model_info.labels(**labels).set(1)


class Telemetry:
    """Middleware: gives every answer its headers, and counts and logs every request.

    Args:
        app: The application.
        metrics: Told of every request.
        model_version: Of the network that is served now, for `X-Model-Version` where none answered.
        spans: Told of every request, where traces are sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        model_version: Callable[[], str],
        spans: Spans | None = None,
    ):
        self.app = app
        self.metrics = metrics
        self.model_version = model_version
        self.spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        given = Headers(scope=scope)
        wanted = given.get("x-request-id", "")
        sane = _REQUEST_ID.fullmatch(wanted) is not None
        trace = scope[KEY] = Trace(wanted if sane else uuid4().hex)
        span = self.spans.begin(scope["method"], given) if self.spans else None
        if span is not None and span.get_span_context().trace_flags.sampled:
            trace.trace_id = f"{span.get_span_context().trace_id:032x}"
        status = _GONE
        # A client that asks before it sends a body may send it, or not, once it is refused
        # (RFC 9110, section 10.1.1): what follows on this connection is not known.
        unknown = given.get("expect", "").lower() == "100-continue"

        async def receive_as_asked() -> Message:
            nonlocal unknown
            unknown = False
            return await receive()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                spent = {**trace.stages, "total": time.monotonic() - started}
                added = {
                    "x-request-id": trace.request_id,
                    "x-model-version": trace.model.version if trace.model else self.model_version(),
                    "server-timing": ", ".join(
                        f"{name};dur={1000 * seconds:.1f}" for name, seconds in spent.items()
                    ),
                }
                if span is not None and (sent := traceparent(span)) is not None:
                    added["traceparent"] = sent
                if unknown:
                    added["connection"] = "close"
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in added.items()),
                ]
            await send(message)

        async def refuse(kind: problems.Kind, detail: str) -> None:
            answer = problems.answer(scope, problems.Problem(kind, detail))
            await answer(scope, receive, send_with_headers)

        try:
            await self.app(scope, receive_as_asked if unknown else receive, send_with_headers)
        except ClientDisconnect:
            pass  # in mid-upload: nobody is there to answer
        except asyncio.CancelledError:  # the server ends before it is answered
            if status != _GONE:
                raise
            await refuse(
                problems.DRAINING, "It stopped before the request was answered. Send it again."
            )
        except Exception:
            log.exception("request failed", request_id=trace.request_id)
            if status != _GONE:  # the answer has begun; the server can only cut it off
                raise
            await refuse(problems.INTERNAL, "Try again, or tell the operator the X-Request-ID.")
        finally:
            status = _GONE if trace.unread else status
            self._record(scope, trace, status, time.monotonic() - started)
            if self.spans and span is not None:
                self.spans.end(span, *_route(scope), status, trace)

    def _record(self, scope: Scope, trace: Trace, status: int, seconds: float) -> None:
        method, route = _route(scope)
        exemplar = {"trace_id": trace.trace_id} if trace.trace_id else None
        self.metrics.requests.labels(method, route, status).observe(seconds, exemplar)
        for name in trace.problems:
            self.metrics.rejected.labels(name).inc()
        write = log.debug if route in QUIET_ROUTES and status < 400 else log.info
        write(
            "request",
            request_id=trace.request_id,
            key=trace.key,
            method=method,
            route=route,
            status=status,
            problems=trace.problems,
            images=trace.images,
            milliseconds=round(1000 * seconds, 1),
            **{f"{name}_ms": round(1000 * value, 1) for name, value in trace.stages.items()},
        )


def _route(scope: Scope) -> tuple[str, str]:
    """Method and route, of which there are only so many."""
    method = scope["method"] if scope["method"] in _METHODS else "other"
    return method, getattr(scope.get("route"), "path", "other")


class _Lines:
    """Writes lines to a file, as structlog's own would; one that cannot be written is dropped."""

    def __init__(self, file: TextIO):
        self._file = file

    def info(self, line: str) -> None:
        """Write a line."""
        with suppress(OSError):  # nobody is left to be told
            self._file.write(f"{line}\n")
            self._file.flush()

    debug = warning = error = critical = info


def configure_logs(level: str, process: int | None = None) -> None:
    """Write every log line of the process, ours and the libraries', as JSON to standard error.

    Args:
        level: The least that is written.
        process: Its number, where the service has several.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if process is not None:
        shared.insert(0, lambda _, __, line: {"process": process, **line})
    to_json = structlog.processors.JSONRenderer()
    lines = _Lines(sys.stderr)
    # Our own lines do without the standard library's records, which took a request longer than
    # anything else in this module.
    structlog.configure(
        processors=[*shared, to_json],
        logger_factory=lambda *_: lines,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, to_json],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a picture can hold one for each EXIF tag
    logging.getLogger("PIL").setLevel(logging.WARNING)  # its DEBUG: what a file says of its patient
    # Its warnings name bytes of an upload; what is wrong with one is a problem of ours.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
