from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from app.engines import EngineError
from app.engines.cuda import CudaEngine
from app.settings import Settings
from models.bundle import load_bundle
from tests.app.engines import load, needs_gpu, needs_no_cuda
from tests.bundles import SIDE, expected_outputs, make_bundle


@needs_no_cuda
def test_a_gpu_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"requirements/gpu\.txt"):
        load(make_bundle(tmp_path / "bundle"), device="cuda:0")


def test_a_gpu_that_fails_is_not_replaced_by_the_cpu_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "onnxruntime.InferenceSession", lambda *_, **named: opened.append(named) or "session"
    )
    engine = CudaEngine.__new__(CudaEngine)
    engine._batch, engine._content, engine._number = "N", b"", 0
    engine._open(4)
    (named,) = opened
    assert named["providers"][0][0] == "CUDAExecutionProvider"
    assert named["enable_fallback"] == 0  # ONNX Runtime's own: it would open another on the CPU


@needs_gpu
def test_a_gpu_answers_as_the_cpu_does_at_any_batch_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), device="cuda:0", max_batch=6)
    assert (engine.name, engine.device) == ("onnxruntime", "cuda:0")
    for count in (1, 3, 6, 7, 2, 1):
        images = np.random.default_rng(count).integers(0, 255, (count, SIDE, SIDE, 3), np.uint8)
        outputs = engine.run(images)
        for name, values in expected_outputs(images).items():
            np.testing.assert_allclose(outputs[name], values, rtol=1e-4, atol=1e-4)
    assert "no CUDA graph" not in "".join(capsys.readouterr())


@needs_gpu
def test_two_networks_on_one_gpu_do_not_disturb_each_other() -> None:
    bundle = load_bundle(Settings().bundle)
    content = bundle.read(bundle.artifact("onnx", "fp32"))
    images = np.random.default_rng(0).integers(0, 255, (4, 160, 160, 3), np.uint8)
    first = CudaEngine("model.onnx", content, 0, 4)
    expected = first.run(images)["melanoma_logit"]
    stop, wrong = Event(), []

    def ask() -> None:
        while not stop.is_set():
            wrong.extend(first.run(images)["melanoma_logit"] - expected)

    asking = Thread(target=ask)
    asking.start()
    for size in (1, 2, 4):
        found = CudaEngine("model.onnx", content, 0, 4).run(images[:size])["melanoma_logit"]
        np.testing.assert_allclose(found, expected[:size], atol=1e-4)
    stop.set()
    asking.join()
    assert np.abs(wrong).max() < 1e-4


@needs_gpu
def test_a_gpu_that_is_not_there_beside_one_that_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="MMTL_DEVICE=cuda:99: ONNX Runtime could not use"):
        load(make_bundle(tmp_path / "bundle"), device="cuda:99")
