import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from app.engines import EngineError, load_engine, open_engine
from app.engines.openvino import OpenVinoEngine
from app.settings import Settings
from models.bundle import BundleError, load_bundle
from tests.app.engines import load, needs_openvino
from tests.bundles import SIDE, make_bundle
from tests.conftest import needs_avx512
from tests.lesions import draw_lesion


@needs_openvino
@pytest.mark.parametrize(
    ("precision", "bfloat16", "name"),
    [
        pytest.param("auto", True, "openvino-bfloat16", marks=needs_avx512),
        ("auto", False, "openvino"),
        ("int8", True, "openvino"),
    ],
)
def test_openvino_computes_in_bfloat16_where_it_may_and_the_processor_does(
    precision: str, bfloat16: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.multiplies_bfloat16", lambda: bfloat16)
    settings = Settings(runtime="openvino", precision=precision)
    artifact, engine = open_engine(load_bundle(settings.bundle), settings)
    assert (artifact.precision, engine.name) == ("int8", name)
    assert isinstance(engine, OpenVinoEngine)
    for free in engine._free.values():
        for network in (request.get_compiled_model() for request in free.queue):
            precise = str(network.get_property("INFERENCE_PRECISION_HINT"))
            assert ("bfloat16" in precise) is (name == "openvino-bfloat16")
            assert network.get_property("ENABLE_CPU_PINNING") is False


@needs_openvino
def test_openvino_reports_home_nothing() -> None:
    code = (
        "import sys; from app.engines.compiler import core; core(); "
        "print('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_openvino
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")  # OpenVINO takes no more
@pytest.mark.parametrize(
    ("threads", "max_batch", "expected"),
    [
        (1, 4, {1: [1], 4: [1]}),
        (2, 4, {1: [2], 4: [1, 1]}),
        (2, 8, {1: [2], 4: [1, 1]}),
        (2, 1, {1: [2]}),
        (3, 2, {1: [2, 2], 2: [1, 1, 1]}),
    ],
)
def test_an_image_has_two_cores_and_a_whole_batch_one(
    threads: int, max_batch: int, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    engine = load(bundle, runtime="openvino", threads=threads, max_batch=max_batch)
    assert isinstance(engine, OpenVinoEngine)
    assert (engine.helpers, engine.batch) == (1, max(expected))
    found: dict[int, list[int]] = {}
    for size, free in engine._free.items():
        for network in (request.get_compiled_model() for request in free.queue):
            assert network.inputs[0].shape[0] == size
            found.setdefault(size, []).append(network.get_property("INFERENCE_NUM_THREADS"))
    assert found == expected


@needs_openvino
@pytest.mark.parametrize(
    ("images", "runs"), [(1, [1]), (2, [1, 1]), (3, [4]), (4, [4]), (6, [4, 1, 1]), (7, [4, 4])]
)
def test_a_batch_that_is_nearly_whole_is_filled_up_and_other_images_run_by_themselves(
    images: int, runs: list[int], tmp_path: Path
) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=1, max_batch=4)
    assert isinstance(engine, OpenVinoEngine)
    taken = []
    for size, free in engine._free.items():
        request = free.get()

        class Watched:
            def infer(self, inputs: Any, request: Any = request, **named: Any) -> Any:
                taken.append(len(inputs["images"]))
                return request.infer(inputs, **named)

        engine._free[size].put(Watched())
    values = np.arange(1, images + 1, dtype=np.uint8)
    found = engine.run(np.full((images, SIDE, SIDE, 3), values[:, None, None, None]))
    assert taken == runs
    np.testing.assert_allclose(found["ood_score"], values, atol=1e-3)


@needs_openvino
@pytest.mark.parametrize("broken", [1, 4])
def test_golden_predictions_are_asked_of_the_networks_of_each_size(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OpenVinoEngine._run_at_once

    def run_wrongly(self: OpenVinoEngine, images: Any, size: int) -> Any:
        outputs = run(self, images, size)
        return {name: values + (size == broken) for name, values in outputs.items()}

    monkeypatch.setattr(OpenVinoEngine, "_run_at_once", run_wrongly)
    with pytest.raises(BundleError, match="differs from its golden prediction"):
        load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=2)


@needs_openvino
def test_a_network_whose_run_failed_runs_again(tmp_path: Path) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=1)
    images = np.full((1, SIDE, SIDE, 3), 7, np.uint8)
    with pytest.raises(RuntimeError):
        engine.run(images[:, 1:])
    np.testing.assert_allclose(engine.run(images)["ood_score"], 7, atol=1e-3)


@needs_openvino
def test_who_waits_for_a_network_that_hangs_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=1)
    assert isinstance(engine, OpenVinoEngine)
    monkeypatch.setattr("app.engines.openvino._WAIT_SECONDS", 0.01)
    engine._free[1].get()  # and does not put it back
    with pytest.raises(TimeoutError, match="another run hangs"):
        engine.run(np.zeros((1, SIDE, SIDE, 3), np.uint8))


@needs_openvino
def test_who_asks_for_openvino_is_told_where_its_compiler_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    settings = Settings(runtime="openvino")
    with pytest.raises(EngineError, match=r"^model\.int8\.onnx: .*compiler does not start"):
        open_engine(load_bundle(settings.bundle), settings)


@needs_openvino
@needs_avx512
def test_an_image_s_answer_does_not_depend_on_what_is_run_with_it() -> None:
    settings = Settings()
    bundle = load_bundle(settings.bundle)
    engine = load_engine(bundle, bundle.artifact("onnx", "int8"), Settings(runtime="openvino"))
    images = np.stack([draw_lesion(seed, 160, 160) for seed in range(7)])
    together = engine.run(images)
    for row in range(7):
        for name, values in engine.run(images[row : row + 1]).items():
            np.testing.assert_allclose(together[name][row], values[0], rtol=1e-3, atol=1e-3)


@needs_openvino
def test_threads_that_run_at_once_get_their_own_answers(tmp_path: Path) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=2)
    assert engine.runs_at_once == 2
    wrong = []

    def ask(value: int) -> None:
        images = np.full((value // 10, SIDE, SIDE, 3), value, np.uint8)
        for _ in range(50):
            if abs(engine.run(images)["ood_score"] - value).max() > 1e-3:
                wrong.append(value)

    asking = [Thread(target=ask, args=[value]) for value in (10, 20, 30, 70)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert not wrong
