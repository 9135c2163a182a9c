"""The HTTP contract of `POST /predict`."""

import asyncio
import base64
import gc
import hashlib
import threading
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.routing import Router
from starlette.types import Message

from app.engines.onnx import OnnxEngine
from app.predictor import _Picture
from app.problems import Problem
from app.quality import measure
from app.routes.predict import _HeldResponse
from app.settings import Settings
from app.uploads import Held
from models.bundle import Calibration, save_bundle, sha256_of
from models.images import CorruptImageError, DecodedImage, decode
from tests.bundles import logit_of, make_manifest, network
from tests.conftest import started
from tests.lesions import encode, flat, huge_png, lesion


def form(*contents: bytes, field: str = "files") -> list:
    return [(field, (f"{number}.png", content)) for number, content in enumerate(contents)]


def probability(red: float) -> float:
    return 1 / (1 + np.exp(-logit_of(red)))


def test_a_file_is_answered_as_the_contract_says(client: TestClient) -> None:
    data = flat(160, 80, 60)
    answer = client.post("/predict", files=form(data))
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"  # by browsers and proxies
    body = answer.json()
    artifact, manifest = (body["model"].pop(name) for name in ("sha256", "manifest_sha256"))
    bundle = client.app.state.settings.bundle
    assert artifact == sha256_of(bundle / "model.onnx")
    assert manifest == sha256_of(bundle / "bundle.json")  # by which recalibrations differ
    assert body == {
        "request_id": answer.headers["X-Request-ID"],
        "model": {"name": "test", "version": "1.2.3"},
        "results": [
            {
                "filename": "0.png",
                "status": "ok",
                "image": {
                    "width": 80,
                    "height": 60,
                    "format": "PNG",
                    "sha256": hashlib.sha256(data).hexdigest(),
                },
                "prediction": {
                    "melanoma": {
                        "probability": pytest.approx(probability(160), abs=1e-5),
                        "threshold": 0.5,
                        "decision": "at_or_above_threshold",
                    },
                    "age": {
                        "label": "45-59",
                        "years": 52.0,
                        "probabilities": {
                            "0-29": 0.1,
                            "30-44": 0.2,
                            "45-59": 0.4,
                            "60-74": 0.2,
                            "75+": 0.1,
                        },
                    },
                    "site": {"label": "torso", "probabilities": {"head/neck": 0.25, "torso": 0.75}},
                },
                "quality": {"ood_score": 100.0, "in_distribution": True, "warnings": ["blurred"]},
            }
        ],
    }


@pytest.mark.parametrize("content", [flat(160, 80, 60), b"nothing", lesion()[:900]])
def test_an_upload_is_freed_without_a_collection(client: TestClient, content: bytes) -> None:
    def held() -> int:
        return sum(type(one) is _Picture for one in gc.get_objects())

    client.post("/predict", files=form(content))
    before = held()
    gc.disable()  # uploads are large, and collections are far between
    try:
        for _ in range(10):
            client.post("/predict", files=form(content))
        assert held() <= before + 2  # a worker keeps its last job until it has another
    finally:
        gc.enable()


def test_several_files_keep_the_order_of_the_upload(client: TestClient) -> None:
    reds = (200, 10, 128, 90)
    body = client.post("/predict", files=form(*map(flat, reds))).json()
    found = [r["prediction"]["melanoma"]["probability"] for r in body["results"]]
    assert found == pytest.approx([probability(red) for red in reds], abs=1e-5)
    assert [r["filename"] for r in body["results"]] == ["0.png", "1.png", "2.png", "3.png"]


def test_below_the_threshold(client: TestClient) -> None:
    body = client.post("/predict", files=form(flat(100))).json()
    assert body["results"][0]["prediction"]["melanoma"]["decision"] == "below_threshold"


def test_a_body_that_is_compressed_is_refused_by_the_name_of_its_coding(client) -> None:
    sent = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
    refused = client.post("/predict", content=flat(1), headers=sent)
    assert refused.status_code == 415
    assert "Content-Encoding gzip" in refused.json()["detail"]
    assert refused.headers["Accept-Encoding"] == "identity"
    as_it_is = {**sent, "Content-Encoding": "Identity"}
    assert client.post("/predict", content=flat(1), headers=as_it_is).status_code == 200


@pytest.mark.parametrize("content_type", ["image/png", "image/jpg", "application/octet-stream"])
def test_a_raw_body_has_no_file_name(client: TestClient, content_type: str) -> None:
    answer = client.post("/predict", content=flat(1), headers={"Content-Type": content_type})
    assert answer.status_code == 200
    assert answer.json()["results"][0]["filename"] is None


def test_a_bad_file_fails_alone(client: TestClient) -> None:
    answer = client.post("/predict", files=form(flat(1), b"text", lesion()))
    assert answer.status_code == 200
    first, second, third = answer.json()["results"]
    assert (first["status"], second["status"], third["status"]) == ("ok", "error", "ok")
    assert second["filename"] == "1.png"
    assert second["error"]["type"] == "urn:mmtl:problem:unsupported-image"


def test_an_explanation_is_a_picture_of_what_was_seen(client: TestClient) -> None:
    answer = client.post("/predict?explain=true", files=form(lesion(0, 640, 480)))
    explanation = answer.json()["results"][0]["explanation"]
    picture = Image.open(BytesIO(base64.b64decode(explanation["overlay"])))
    assert explanation["media_type"] == "image/png"
    assert (picture.format, picture.size) == ("PNG", (512, 384))
    assert explanation["box"] == {"left": 0, "top": 0, "width": 640, "height": 480}
    assert "explain;dur=" in answer.headers["Server-Timing"]


@pytest.mark.parametrize(
    ("size", "box", "drawn"),
    [((300, 150), (50, 0, 200, 150), (512, 384)), ((90, 240), (0, 60, 90, 120), (384, 512))],
)
def test_an_explanation_says_which_part_of_the_image_it_shows(
    client: TestClient,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    drawn: tuple[int, int],
) -> None:
    answer = client.post("/predict?explain=true", files=form(lesion(0, *size)))
    explanation = answer.json()["results"][0]["explanation"]
    assert explanation["box"] == dict(zip(("left", "top", "width", "height"), box, strict=True))
    assert Image.open(BytesIO(base64.b64decode(explanation["overlay"]))).size == drawn


def test_an_image_that_cannot_be_explained_fails_alone(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = lesion()

    def decode_larger(data: bytes, *more: Any, wait: bool) -> DecodedImage:
        assert not wait  # a worker, for the turn of a large one
        if data == damaged:
            raise CorruptImageError("The image is damaged.")
        return decode(data, *more, wait=wait)

    monkeypatch.setattr("app.heatmap.decode", decode_larger)
    answer = client.post("/predict?explain=true", files=form(flat(1), damaged))
    assert answer.status_code == 200
    good, bad = answer.json()["results"]
    assert good["explanation"]["overlay"]
    assert bad["error"]["type"] == "urn:mmtl:problem:corrupt-image"
    # What nobody was told is in no metric of what was predicted.
    assert "mmtl_melanoma_probability_count 1.0" in client.get("/metrics").text


def test_heat_maps_of_large_images_wait_for_their_turn(client: TestClient) -> None:
    large = encode(np.full((2100, 2100, 3), (1, 100, 50), np.uint8), "PNG")
    answer = client.post("/predict?explain=true", files=form(*[large] * 4))
    assert [r["explanation"]["media_type"] for r in answer.json()["results"]] == ["image/png"] * 4


@pytest.mark.parametrize("others_wait", [True, False])
def test_a_large_image_is_decoded_sparingly_while_others_wait(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, others_wait: bool
) -> None:
    told = []

    def decode_and_tell(*arguments: Any, **named: Any) -> DecodedImage:
        told.append(named)
        return decode(*arguments, **named)

    monkeypatch.setattr("app.predictor.decode", decode_and_tell)
    monkeypatch.setattr("app.batcher.Batcher.others_wait", others_wait)
    assert client.post("/predict", files=form(flat(160, 80, 60))).status_code == 200
    assert told == [{"wait": False, "sparing": others_wait}]


@pytest.mark.parametrize(
    ("images", "most", "by_worker"),
    [(1, 1_000_000, False), (1, 10, True), (2, 1_000_000, True)],
)
def test_an_image_that_is_alone_is_hashed_while_a_worker_decodes_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, images: int, most: int, by_worker: bool
) -> None:
    threads, hashed = [], threading.Event()

    def sha256(data: bytes) -> Any:
        threads.append(threading.current_thread().name)
        hashed.set()
        return hashlib.sha256(data)

    def decode_late(*arguments: Any, **named: Any) -> DecodedImage:
        assert by_worker or hashed.wait(5)  # or it might be through before
        return decode(*arguments, **named)

    monkeypatch.setattr("app.predictor.hashlib", SimpleNamespace(sha256=sha256))
    monkeypatch.setattr("app.predictor.decode", decode_late)
    monkeypatch.setattr("app.predictor._MOST_TO_HASH_HERE", most)
    files = [flat(60 + number) for number in range(images)]
    results = client.post("/predict", files=form(*files)).json()["results"]
    found = [result["image"]["sha256"] for result in results]
    assert found == [hashlib.sha256(data).hexdigest() for data in files]
    first = [name.startswith("mmtl-work-") for name in threads[:images]]
    assert first == [by_worker] * images


@pytest.mark.anyio
async def test_an_answer_that_nobody_reads_takes_the_room_of_others() -> None:
    held, read = Held(100_000, 100_000), asyncio.Event()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        if len(sent) == 2:  # the connection takes no more
            await read.wait()
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    text = 70_000 * "x"
    answering = asyncio.create_task(_HeldResponse(text, held)({}, receive, send))
    await asyncio.sleep(0)
    with pytest.raises(Problem, match="are in memory"):
        _HeldResponse(text, held)
    read.set()
    await answering
    assert b"".join(message.get("body", b"") for message in sent) == text.encode()
    assert [message.get("more_body", False) for message in sent] == [False, True, False]
    for _ in range(3):
        _HeldResponse(text, held)  # which is not sent, as its caller has gone
    assert _HeldResponse("short", Held(1, 1)).body == b"short"


def test_strange_pictures_are_flagged(client: TestClient) -> None:
    green = encode(np.full((64, 64, 3), (10, 220, 10), np.uint8), "PNG")
    quality = client.post("/predict", files=form(green)).json()["results"][0]["quality"]
    assert quality["in_distribution"] is False
    assert "out_of_distribution" in quality["warnings"]


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"", 400, "empty-image"),
        (b"some text", 415, "unsupported-image"),
        (lesion()[:3000], 422, "corrupt-image"),
        (huge_png(), 413, "image-too-large"),
    ],
)
def test_an_only_file_that_fails_is_the_answer(
    client: TestClient, content: bytes, status: int, kind: str
) -> None:
    as_file = client.post("/predict", files=form(content))
    as_body = client.post("/predict", content=content, headers={"Content-Type": "image/jpeg"})
    for answer in (as_file, as_body):
        check_problem(answer, status, kind)


def test_when_all_files_fail_each_has_its_problem_inside(client: TestClient) -> None:
    answer = client.post("/predict", files=form(b"text", huge_png()))
    check_problem(answer, 422, "all-files-failed")
    assert answer.headers["Cache-Control"] == "no-store"  # it names files
    types = [result["error"]["type"] for result in answer.json()["results"]]
    assert types == ["urn:mmtl:problem:unsupported-image", "urn:mmtl:problem:image-too-large"]


def test_a_wrong_field_name_is_named(client: TestClient) -> None:
    answer = client.post("/predict", files=form(flat(1), field="image"))
    check_problem(answer, 422, "unexpected-field")
    assert "`image`" in answer.json()["detail"]
    check_problem(
        client.post("/predict", data={"files": "text"}, files=form(flat(1))),
        422,
        "unexpected-field",
    )


def test_a_form_without_files(client: TestClient) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    check_problem(client.post("/predict", content=b"--x--\r\n", headers=headers), 400, "no-files")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "multipart/form-data; boundary=x"},
    ],
)
def test_a_form_that_cannot_be_read(client: TestClient, headers: dict) -> None:
    answer = client.post("/predict", content=b"nonsense", headers=headers)
    check_problem(answer, 400, "malformed-form")


def test_too_many_files(client: TestClient) -> None:
    for count in (5, 9):
        answer = client.post("/predict", files=form(*[flat(1)] * count))
        check_problem(answer, 413, "too-many-files")


def test_too_many_bytes_by_header_or_by_what_comes(client: TestClient) -> None:
    def unannounced():
        for _ in range(40):
            yield bytes(100_000)

    headers = {"Content-Type": "image/jpeg"}
    for content in (bytes(4_000_000), unannounced()):
        answer = client.post("/predict", content=content, headers=headers)
        check_problem(answer, 413, "body-too-large")


@pytest.mark.parametrize("content_type", ["text/plain", "image/gif", ""])
def test_another_content_type(client: TestClient, content_type: str) -> None:
    answer = client.post("/predict", content=flat(1), headers={"Content-Type": content_type})
    check_problem(answer, 415, "unsupported-media-type")


def test_a_parameter_that_does_not_fit(client: TestClient) -> None:
    answer = client.post("/predict?explain=perhaps", files=form(flat(1)))
    check_problem(answer, 422, "invalid-parameter")
    answer = client.post("/predict?expalin=true", files=form(flat(1)))
    check_problem(answer, 422, "invalid-parameter")
    assert "`explain` is one" in answer.json()["detail"]


def test_no_upload_touches_the_disk(
    settings: Settings, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    # A folder that is not there: whoever tries to write a temporary file fails.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    large = encode(np.random.default_rng(0).integers(0, 255, (700, 900, 3)).astype(np.uint8), "PNG")
    assert 1_500_000 < len(large) < settings.max_bytes
    with started(settings) as client:
        assert client.post("/predict", files=form(large)).status_code == 200


def check_problem(answer, status: int, kind: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"urn:mmtl:problem:{kind}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"].endswith(".")
    assert answer.headers["X-Request-ID"]


@pytest.mark.parametrize("image", [lesion(1, 60, 40), b"no picture"])
def test_without_parameters_the_router_is_not_asked_and_the_answer_is_the_same(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, image: bytes
) -> None:
    files = {"files": ("a.jpg", image, "image/jpeg")}
    routed = client.post("/predict?explain=false", files=files)
    entered = []
    monkeypatch.setattr(Router, "__call__", lambda *_: entered.append(1) or 1 / 0)
    direct = client.post("/predict", files=files)
    assert not entered
    assert direct.status_code == routed.status_code
    assert direct.headers.keys() == routed.headers.keys()
    same = [{k: v for k, v in x.json().items() if k != "request_id"} for x in (direct, routed)]
    assert same[0] == same[1]


def test_probabilities_add_up_to_one_however_a_runtime_rounds(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {**measure(pixels), "site": np.full((len(pixels), 2), 0.502, np.float32)}

    monkeypatch.setattr("app.networks.measure", rounded)
    with started(settings) as client:
        answer = client.post("/predict", files=form(flat(7))).json()
    site = answer["results"][0]["prediction"]["site"]
    assert list(site["probabilities"].values()) == [0.5, 0.5]


def test_an_answer_is_by_the_calibration_and_thresholds_of_the_artifact_that_ran(
    tmp_path: Path,
) -> None:
    files = {name: tmp_path / name for name in ("model.onnx", "model.int8.onnx")}
    files["model.onnx"].write_bytes(network())
    files["model.int8.onnx"].write_bytes(network(note="other bytes"))
    manifest = make_manifest(files["model.onnx"])
    (first,) = manifest.artifacts
    changes = {
        "file": "model.int8.onnx",
        "precision": "int8",
        "bytes": files["model.int8.onnx"].stat().st_size,
        "sha256": sha256_of(files["model.int8.onnx"]),
        "calibration": Calibration(slope=0.5, intercept=-1.0),
        "melanoma_threshold": 0.3,
        "ood_threshold": 50.0,
    }
    second = first.model_copy(update=changes)
    manifest = manifest.model_copy(update={"artifacts": (first, second)})
    save_bundle(tmp_path / "bundle", manifest, files)
    chosen = Settings(
        bundle=tmp_path / "bundle", precision="int8", device="cpu", runtime="onnxruntime", threads=1
    )
    with started(chosen) as client:
        body = client.post("/predict", files=form(flat(132))).json()
    (result,) = body["results"]
    assert body["model"]["sha256"] == second.sha256
    assert result["prediction"]["melanoma"] == {
        "probability": pytest.approx(1 / (1 + np.exp(1 - 0.5 * logit_of(132))), abs=1e-5),
        "threshold": 0.3,
        "decision": "below_threshold",
    }
    assert result["quality"]["in_distribution"] is False


@pytest.mark.parametrize(
    ("red", "decision"), [(127, "below_threshold"), (128, "at_or_above_threshold")]
)
def test_a_probability_that_is_the_threshold_is_at_it(
    client: TestClient, red: int, decision: str
) -> None:
    picture = encode(np.full((64, 64, 3), (red, 100, 50), np.uint8), "PNG")
    (result,) = client.post("/predict", files=form(picture)).json()["results"]
    assert result["prediction"]["melanoma"]["decision"] == decision


def test_a_heat_map_is_of_its_own_image_and_the_right_way_round(client: TestClient) -> None:
    dark_right = np.full((96, 96, 3), (60, 100, 50), np.uint8)
    dark_right[:, :48, 0] = 250
    pictures = dark_right, np.ascontiguousarray(dark_right[:, ::-1])
    files = form(*(encode(picture, "PNG") for picture in pictures))
    results = client.post("/predict?explain=true", files=files).json()["results"]
    for result, picture in zip(results, pictures, strict=True):
        overlay = base64.b64decode(result["explanation"]["overlay"])
        drawn = np.asarray(Image.open(BytesIO(overlay))).astype(int)
        plain = np.asarray(Image.fromarray(picture).resize(drawn.shape[1::-1])).astype(int)
        bluer = (drawn - plain)[:, :, 2]  # where the test network's logit is lowered: little red
        third = drawn.shape[1] // 3
        left, right = bluer[:, :third].mean(), bluer[:, -third:].mean()
        dark, bright = (right, left) if picture[0, 0, 0] == 250 else (left, right)
        assert dark > bright + 20


def test_a_picture_too_long_and_thin_for_a_large_heat_map_has_a_coarse_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = encode(np.full((1600, 130, 3), 90, np.uint8), "JPEG")
    few = settings.model_copy(update={"max_pixels_in_full": 14_000})
    monkeypatch.setattr("models.images._LARGE", 14_000)
    with started(few) as client:
        (result,) = client.post("/predict?explain=true", files=form(thin)).json()["results"]
    assert result["status"] == "ok"
    drawn = Image.open(BytesIO(base64.b64decode(result["explanation"]["overlay"])))
    assert max(drawn.size) == 512


def test_limits_of_the_settings_are_those_of_images(settings: Settings) -> None:
    few = settings.model_copy(update={"max_pixels": 3000, "max_pixels_in_full": 2000})
    squares = [np.full((side, side, 3), 9, np.uint8) for side in (40, 50, 50, 60)]
    kinds = ("PNG", "PNG", "JPEG", "JPEG")
    files = form(*(encode(*each) for each in zip(squares, kinds, strict=True)))
    with started(few) as client:
        results = client.post("/predict", files=files).json()["results"]
    assert [result["status"] for result in results] == ["ok", "error", "ok", "error"]


def test_every_image_of_a_request_takes_a_place(settings: Settings) -> None:
    with (
        started(settings.model_copy(update={"queue_size": 4})) as client,
        client.app.state.networks.current.batcher.reserve(2),
    ):
        refused = client.post("/predict", files=form(*[flat(1)] * 3))
        check_problem(refused, 503, "saturated")
        assert refused.headers["Retry-After"] == "1"
        assert client.post("/predict", files=form(*[flat(1)] * 2)).status_code == 200


def test_a_request_that_would_wait_for_too_long_is_refused_before_it_is_read(
    settings: Settings,
) -> None:
    with started(settings) as client:
        batcher = client.app.state.networks.current.batcher
        batcher._pace.note_done(64, 0.0, 64 * settings.deadline_seconds)
        with batcher.reserve(1):
            refused = client.post("/predict", content=b"", headers={"Content-Type": "image/png"})
        check_problem(refused, 503, "saturated")
        assert "MMTL_DEADLINE_SECONDS" in refused.json()["detail"]
        assert refused.headers["Retry-After"] == "1"
        # The slowest service takes what it can: none waits here.
        assert client.post("/predict", files=form(flat(1))).status_code == 200


def test_a_request_that_waits_for_too_long_is_told_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    run = OnnxEngine._run

    def hang(*arguments: Any) -> Any:
        go_on.wait(30)
        return run(*arguments)

    with started(settings.model_copy(update={"deadline_seconds": 0.3})) as client:
        monkeypatch.setattr(OnnxEngine, "_run", hang)
        refused = client.post("/predict", files=form(flat(1)))
        hangs = not go_on.is_set()
        go_on.set()
    assert hangs  # the answer did not wait for the run
    check_problem(refused, 503, "deadline-exceeded")
    assert refused.headers["Retry-After"] == "5"


def test_a_network_that_fails_on_an_image_is_500(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxEngine._run

    def fail(engine: OnnxEngine, session: Any, images: np.ndarray) -> Any:
        if images.any():
            raise RuntimeError("of this image")
        return run(engine, session, images)  # of a blank one: the network is not broken

    monkeypatch.setattr(OnnxEngine, "_run", fail)
    check_problem(client.post("/predict", files=form(flat(1))), 500, "inference-failed")


def test_what_nobody_expects_of_one_image_costs_the_others_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(data: bytes, *arguments: Any, **named: Any) -> DecodedImage:
        if data == flat(1):
            raise MemoryError
        return decode(data, *arguments, **named)

    monkeypatch.setattr("app.predictor.decode", short_of_memory)
    found = client.post("/predict", files=form(flat(160), flat(1)))
    good, bad = found.json()["results"]
    assert (found.status_code, good["status"]) == (200, "ok")
    assert bad["error"]["type"] == "urn:mmtl:problem:internal"
    check_problem(client.post("/predict", files=form(flat(1))), 500, "internal")
    # Where all fail, one that failed here makes it no fault of who sent them.
    answer = client.post("/predict", files=form(b"text", flat(1)))
    check_problem(answer, 500, "internal")
    types = [result["error"]["type"] for result in answer.json()["results"]]
    assert types == ["urn:mmtl:problem:unsupported-image", "urn:mmtl:problem:internal"]
