"""OpenTelemetry: a trace of each request, its stages as spans, W3C `traceparent` in and out.

Where the spans go is OpenTelemetry's own environment: OTEL_EXPORTER_OTLP_ENDPOINT and its kin.
"""

import time
from concurrent.futures import wait
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from app.trace import Trace
from models.threads import begin

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_LAST_SECONDS = 2.0


class SpansError(Exception):
    """OpenTelemetry is not installed, or its own settings do not fit."""


class Spans:
    """Makes a span of each request, and one of each stage in it.

    Args:
        exporter: Where they go; None for OTLP over HTTP.

    Raises:
        SpansError: OpenTelemetry is not installed, or its own settings do not fit.
    """

    def __init__(self, exporter: "SpanExporter | None" = None):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise SpansError(
                f"MMTL_TRACES needs {error.name}: install the extra `tracing`."
            ) from None
        named = Resource.create({"service.name": "mmtl"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        try:
            processor = BatchSpanProcessor(exporter or OTLPSpanExporter())
        except ValueError as error:
            raise SpansError(
                f"OpenTelemetry does not take its variables OTEL_*: {error}."
            ) from None
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("mmtl")

    def begin(self, method: str, headers: Headers) -> "Span":
        """The span of a request, within the caller's where there is one."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        context = extract({"traceparent": headers.get("traceparent", "")})
        return self._tracer.start_span(method, context, SpanKind.SERVER)

    def end(self, span: "Span", method: str, route: str, status: int, trace: Trace) -> None:
        """Name what became of the request, and add its stages."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        span.update_name(f"{method} {route}")
        span.set_attribute("http.request.method", method)
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("mmtl.request_id", trace.request_id)
        span.set_attribute("mmtl.images", trace.images)
        if trace.model:
            span.set_attribute("mmtl.model.version", trace.model.version)
        if trace.problems:
            span.set_attribute("error.type", trace.problems[-1])
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        context = set_span_in_context(span)
        epoch = time.time() - time.monotonic()
        for stage, began, ended in trace.spans:
            child = self._tracer.start_span(stage, context, start_time=_nanoseconds(epoch + began))
            child.end(_nanoseconds(epoch + ended))
        span.end()

    def close(self) -> None:
        """Send what is left; a collector that is away is waited for two seconds, no longer."""
        with suppress(RuntimeError):  # no thread is to be had just now
            wait([begin(self._provider.shutdown)], _LAST_SECONDS)


def traceparent(span: "Span") -> str | None:
    """As W3C Trace Context has it; None where OpenTelemetry is switched off (OTEL_SDK_DISABLED)."""
    found = span.get_span_context()
    if not found.is_valid:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
