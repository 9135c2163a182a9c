import asyncio
import json
import logging
import warnings
from collections.abc import Callable, Coroutine
from io import StringIO

import pytest
import structlog
import uvloop
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.settings import Settings
from app.telemetry import Metrics, _Lines, configure_logs
from models.images import decode
from tests.conftest import started
from tests.lesions import draw_lesion, encode, flat


def samples(client: TestClient) -> dict[tuple[str, frozenset[str]], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, *labels: str) -> tuple[str, frozenset[str]]:
    return name, frozenset(labels)


def test_every_label_is_there_before_the_first_request(client: TestClient) -> None:
    found = samples(client)
    for stage in ("decode", "queue", "inference", "explain"):
        assert found[key("mmtl_stage_duration_seconds_count", stage)] == 0
    assert found[key("mmtl_images_total", "ok")] == 0
    assert found[key("mmtl_rejected_total", "saturated")] == 0
    assert found[key("mmtl_predicted_total", "site", "torso")] == 0
    assert found[key("mmtl_predicted_total", "melanoma", "below_threshold")] == 0
    for status in ("200", "400", "413", "499", "500", "503"):
        requests = key("mmtl_http_request_duration_seconds_count", "POST", "/predict", status)
        assert found[requests] == 0
    for reason in ("gone", "deadline"):
        assert found[key("mmtl_dropped_total", reason)] == 0
    for outcome in ("switched", "refused"):
        assert found[key("mmtl_reloads_total", outcome)] == 0
    assert found[key("mmtl_queue_depth")] == 0
    assert found[key("mmtl_out_of_distribution_total")] == 0
    info = next(labels for name, labels in found if name == "mmtl_model_info")
    assert {"test", "1.2.3", "onnxruntime", "cpu"} < info


def test_images_of_a_request_that_is_refused_are_counted(settings: Settings) -> None:
    late = settings.model_copy(update={"deadline_seconds": 1e-6})
    with started(late) as client:
        answer = client.post("/predict", files=[("files", flat(1)), ("files", flat(2))])
        found = samples(client)
    assert answer.status_code == 503
    assert found[key("mmtl_images_total", "refused")] == 2
    assert found[key("mmtl_images_total", "ok")] == 0


def test_requests_and_images_are_counted(client: TestClient) -> None:
    import numpy as np

    green = encode(np.full((64, 64, 3), (250, 220, 10), np.uint8), "PNG")
    files = [("files", flat(10)), ("files", green), ("files", flat(11)), ("files", b"text")]
    client.post("/predict", files=files)
    client.post("/predict", content=b"x", headers={"Content-Type": "text/plain"})
    client.request("BREW", "/somewhere")
    found = samples(client)
    assert found[key("mmtl_images_total", "ok")] == 3
    assert found[key("mmtl_images_total", "error")] == 1
    assert found[key("mmtl_rejected_total", "unsupported-image")] == 1
    assert found[key("mmtl_rejected_total", "unsupported-media-type")] == 1
    assert found[key("mmtl_out_of_distribution_total")] == 1
    assert found[key("mmtl_predicted_total", "melanoma", "at_or_above_threshold")] == 1
    assert found[key("mmtl_predicted_total", "melanoma", "below_threshold")] == 2
    predicted = "mmtl_predicted_total"
    for task in ("age", "site"):
        named = [
            value for (name, labels), value in found.items() if name == predicted and task in labels
        ]
        assert sum(named) == 3
    assert found[key("mmtl_melanoma_probability_count")] == 3
    total = 40 * found[key("mmtl_melanoma_probability_sum")]
    assert total == pytest.approx(round(total))  # which tells no more than the buckets
    assert found[key("mmtl_stage_duration_seconds_count", "decode")] == 4
    assert found[key("mmtl_batch_size_sum")] == 3
    requests = "mmtl_http_request_duration_seconds_count"
    assert found[key(requests, "POST", "/predict", "200")] == 1
    assert found[key(requests, "POST", "/predict", "415")] == 1
    assert found[key(requests, "other", "other", "404")] == 1
    assert found[key("mmtl_queue_depth")] == 0


def test_a_probability_is_summed_as_the_middle_of_its_bucket() -> None:
    metrics = Metrics(1, ())
    for probability, middle in ((0.0, 0.025), (0.05, 0.025), (0.0501, 0.075), (1.0, 0.975)):
        before = metrics.melanoma_probability._sum.get()
        metrics.observe_probability(probability)
        assert metrics.melanoma_probability._sum.get() - before == pytest.approx(middle)


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=abc", "text/plain; version=x.y", "*/*", ""]
)
def test_whatever_is_accepted_metrics_are_told(client: TestClient, accept: str) -> None:
    answer = client.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "mmtl_ready" in answer.text


@pytest.mark.usefixtures("logs_as_before")
def test_a_picture_s_odd_metadata_are_not_a_line_each(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = b"".join(
        tag.to_bytes(2, "little") + b"\x07\x00" + (2**30).to_bytes(4, "little") + bytes(4)
        for tag in range(50_000, 50_100)
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + (100).to_bytes(2, "little") + tags + bytes(4)
    with started(settings) as client, warnings.catch_warnings():
        warnings.simplefilter("default")  # pytest's makes errors of them
        configure_logs("INFO")
        picture = encode(draw_lesion(0), "PNG", exif=exif)
        assert client.post("/predict", files={"files": picture}).status_code == 200
    logged = capsys.readouterr().err
    assert '"event": "request"' in logged
    assert "Tag data" not in logged


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_logs_tell_what_happened_and_nothing_of_the_patient(
    settings: Settings, capsys: pytest.CaptureFixture[str], level: str
) -> None:
    configure_logs(level)
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe 1970"  # ImageDescription
    with started(settings) as client:
        client.post(
            "/predict",
            files={"files": ("Jane-Doe-1970.tiff", encode(draw_lesion(0), "TIFF", exif=exif))},
            headers={"X-Request-ID": "abc"},
        )
        client.head("/health/live")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = {(each["method"], each["route"]) for each in lines if each["event"] == "request"}
    assert ("POST", "/predict") in told
    for probe in (("GET", "/health/ready"), ("HEAD", "/health/live")):
        assert (probe in told) == (level == "DEBUG")
    line = next(line for line in lines if line.get("request_id") == "abc")
    assert (line["route"], line["status"], line["images"]) == ("/predict", 200, 1)
    assert {"decode_ms", "queue_ms", "inference_ms", "milliseconds"} <= line.keys()
    assert not any("Jane" in json.dumps(line) for line in lines)
    assert not any(key in line for key in ("probability", "filename", "sha256"))


@pytest.mark.usefixtures("logs_as_before")
def test_nor_do_they_where_images_fail(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_or_fail(data: bytes, *arguments: object, **named: object) -> object:
        if data == flat(2):
            raise MemoryError
        return decode(data, *arguments, **named)

    monkeypatch.setattr("app.predictor.decode", decode_or_fail)
    configure_logs("DEBUG")
    sent = {"Jane-good.png": flat(1), "Jane-text.png": b"text", "Jane-short.png": flat(2)}
    files = [("files", each) for each in sent.items()]
    with started(settings) as client:
        answer = client.post("/predict", files=files)
        client.post("/predict", files=files[1:])
    good, *_ = answer.json()["results"]
    written = capsys.readouterr().err
    assert "image failed" in written
    assert "Jane" not in written
    assert good["image"]["sha256"] not in written
    assert str(good["prediction"]["melanoma"]["probability"]) not in written


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize("body", [b"--xSECRET", b"--x\r\nContent-Disp\x01sition: a\r\n\r\n"])
def test_no_byte_of_a_form_that_cannot_be_read_is_logged(
    settings: Settings, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    configure_logs("DEBUG")
    with started(settings) as client:
        capsys.readouterr()
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        assert client.post("/predict", content=body, headers=form).status_code == 400
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    ours = [line["event"] for line in lines if line["event"].partition(" ")[0] != "HTTP"]
    assert ours == ["request"]  # HTTP: httpx, which asks


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize("process", [None, 3])
def test_what_libraries_log_and_warn_of_is_json_like_our_own_lines(
    capsys: pytest.CaptureFixture[str], process: int | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # pytest's makes errors of them
        configure_logs("WARNING", process)
        structlog.get_logger().warning("ours", images=1)
        logging.getLogger("a.library").warning("%d of theirs", 2)
        logging.getLogger("a.library").info("which nobody asked for")
        warnings.warn("a warning", stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    ours, theirs, warned = lines
    assert (ours["event"], ours["images"]) == ("ours", 1)
    assert theirs["event"] == "2 of theirs"
    assert "a warning" in warned["event"]
    for line in lines:
        assert line["level"] == "warning"
        assert line["timestamp"].endswith("Z")
        assert line.get("process") == process


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_no_line_is_lost_where_an_event_loop_ends(
    run: Callable[[Coroutine[None, None, None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("INFO")
    log = structlog.get_logger()

    async def say(*names: str) -> None:
        for name in names:
            log.info(name)

    run(say("a", "b"))
    log.info("c")
    run(say("d"))
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == [*"abcd"]


def test_every_line_is_written_at_once() -> None:
    file = StringIO()

    async def say() -> None:
        lines = _Lines(file)
        lines.info("first")
        lines.error("then")
        assert file.getvalue() == "first\nthen\n"

    asyncio.run(say())


def test_a_line_that_cannot_be_written_is_dropped() -> None:
    class Broken(StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    lines = _Lines(Broken())
    lines.info("a")
    lines.error("b")
