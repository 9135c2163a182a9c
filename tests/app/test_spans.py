"""A trace of each request, for whoever collects them."""

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.datastructures import Headers

from app.settings import Settings
from app.spans import Spans, SpansError
from app.trace import Trace
from tests.conftest import started
from tests.lesions import flat

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Span]]:
    """What a collector is sent by OTLP over HTTP."""
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                import gzip

                body = gzip.decompress(body)
            if self.path != "/v1/traces":
                spans.append(Span(name=self.path))
                body = b""
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                (name,) = [a for a in resource.resource.attributes if a.key == "service.name"]
                assert name.value.string_value == "mmtl"
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield spans
    server.shutdown()
    server.server_close()


def attributes(span: Span) -> dict[str, object]:
    return {
        each.key: getattr(each.value, str(each.value.WhichOneof("value")))
        for each in span.attributes
    }


def test_a_request_is_a_span_of_its_caller_s_trace_and_its_stages_are_in_it(
    settings: Settings, collected: list[Span]
) -> None:
    with started(settings.model_copy(update={"traces": True})) as client:
        answer = client.post(
            "/predict",
            files={"files": ("Jane Doe.png", flat(1))},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
        )
        refused = client.post("/predict", content=b"x", headers={"Content-Type": "text/plain"})
    found = [span for span in collected if span.trace_id.hex() == TRACE]
    (request,) = [span for span in found if span.name == "POST /predict"]
    assert request.parent_span_id.hex() == PARENT
    assert answer.headers["traceparent"] == f"00-{TRACE}-{request.span_id.hex()}-01"
    told = attributes(request)
    assert (told["http.request.method"], told["http.route"]) == ("POST", "/predict")
    assert told["http.response.status_code"] == 200
    assert told["mmtl.model.version"] == "1.2.3"
    assert told["mmtl.request_id"] == answer.headers["X-Request-ID"]
    assert told["mmtl.images"] == 1
    stages = [span for span in found if span is not request]
    assert sorted(span.name for span in stages) == ["decode", "inference", "queue", "queue"]
    for stage in stages:
        assert stage.parent_span_id == request.span_id
        assert stage.start_time_unix_nano <= stage.end_time_unix_nano
        # Two clocks are read, a moment apart.
        assert request.start_time_unix_nano - 2e7 <= stage.start_time_unix_nano
        assert stage.end_time_unix_nano <= request.end_time_unix_nano + 2e7
    (other,) = [
        span
        for span in collected
        if attributes(span).get("mmtl.request_id") == refused.headers["X-Request-ID"]
    ]
    assert attributes(other)["error.type"] == "unsupported-media-type"
    assert other.trace_id.hex() != TRACE
    assert not any("Jane" in str(span) for span in collected)


@pytest.mark.parametrize(
    ("status", "fails"), [(200, False), (499, False), (500, True), (503, True)]
)
def test_the_service_s_own_failures_alone_are_errors(status: int, fails: bool) -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    spans.end(spans.begin("POST", Headers()), "POST", "/predict", status, Trace("a"))
    spans.close()
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code is StatusCode.ERROR) is fails


def test_a_bucket_names_a_trace_of_it(settings: Settings, collected: list[Span]) -> None:
    with started(settings.model_copy(update={"traces": True})) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        client.post("/predict", files={"files": flat(1)}, headers=headers)
        text = client.get("/metrics").text
        openmetrics = client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
    assert TRACE not in text
    assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text")
    named = [line for line in openmetrics.text.splitlines() if TRACE in line]
    assert named
    assert all('route="/predict"' in line for line in named)
    assert openmetrics.text.endswith("# EOF\n")


def test_opentelemetry_s_own_variables_hold(
    settings: Settings, collected: list[Span], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = settings.model_copy(update={"traces": True})
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
        with pytest.raises(SpansError, match=r"its variables OTEL_\*: max_export"):
            Spans()
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_SDK_DISABLED", "true")
        with started(traced) as client:
            answer = client.post("/predict", files={"files": flat(1)})
            assert (answer.status_code, "traceparent" in answer.headers) == (200, False)
    assert not collected


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("OTEL_SERVICE_NAME", "ours", "ours"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=theirs,a=b", "theirs"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=b", "mmtl"),
    ],
)
def test_the_service_has_the_name_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str
) -> None:
    monkeypatch.setenv(variable, value)
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    spans.begin("GET", Headers()).end()
    spans.close()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == name


@pytest.mark.parametrize("others", ["false", "true"])
def test_without_the_setting_nothing_is_sent(
    settings: Settings, collected: list[Span], monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    # Nor by FastAPI, which has telemetry of its own.
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", others)
    with started(settings) as client:
        answer = client.post("/predict", files={"files": flat(1)})
    assert "traceparent" not in answer.headers
    assert not collected


def test_without_opentelemetry_the_setting_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SpansError, match="install the extra `tracing`"):
        Spans()


def test_a_collector_that_is_away_holds_no_service_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(InMemorySpanExporter):
        def export(self, spans: object) -> object:
            over.wait(30)
            return super().export(spans)

    over = threading.Event()
    monkeypatch.setattr("app.spans._LAST_SECONDS", 0.1)
    spans = Spans(Hanging())
    spans.begin("GET", Headers()).end()
    began = time.monotonic()
    spans.close()
    assert time.monotonic() - began < 5
    over.set()
