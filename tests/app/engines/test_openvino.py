import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from app.engines import EngineError, load_engine, open_engine
from app.settings import Settings
from models.bundle import load_bundle
from tests.app.engines import load, needs_openvino
from tests.bundles import SIDE, make_bundle
from tests.lesions import draw_lesion


@needs_openvino
@pytest.mark.parametrize(
    ("precision", "bfloat16", "name"),
    [
        ("auto", True, "openvino-bfloat16"),
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


@needs_openvino
def test_openvino_reports_home_nothing() -> None:
    code = "import sys, app.engines.openvino; print('openvino_telemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_openvino
@pytest.mark.parametrize(("amx", "helpers", "batch", "cores"), [(True, 0, 8, 1), (False, 1, 4, 2)])
def test_amx_has_larger_batches_and_neither_a_worker_more_nor_two_cores_for_a_lone_run(
    amx: bool,
    helpers: int,
    batch: int,
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from app.engines.openvino import OpenVinoEngine

    monkeypatch.setattr("app.engines.openvino.has_amx", lambda: amx)
    engine = load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=3)
    assert isinstance(engine, OpenVinoEngine)
    assert (engine.helpers, engine.batch) == (helpers, batch)
    found = [
        request.get_compiled_model().get_property("INFERENCE_NUM_THREADS")
        for request in engine._free
    ]
    assert found == [cores, 1, 1]


@needs_openvino
def test_a_run_that_is_alone_takes_the_wide_network_and_others_take_it_last(tmp_path: Path) -> None:
    from app.engines.openvino import OpenVinoEngine

    engine = load(make_bundle(tmp_path / "bundle"), runtime="openvino", threads=2)
    assert isinstance(engine, OpenVinoEngine)
    wide, narrow = engine._free
    taken = []

    class Watched:
        def __init__(self, request: Any):
            self.infer = lambda *_, **__: taken.append(request) or {}

    engine._outputs = []
    engine._free = [Watched(wide), Watched(narrow)]
    engine._lone = engine._free[0]
    one = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    engine.run(one)
    engine.run_alone(one)
    engine.run(one)
    assert taken == [narrow, wide, narrow]
    engine._free.pop()
    engine.run(one)
    assert taken[-1] is wide


@needs_openvino
def test_who_asks_for_openvino_is_told_where_its_compiler_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    settings = Settings(runtime="openvino")
    with pytest.raises(EngineError, match=r"^model\.int8\.onnx: .*compiler does not start"):
        open_engine(load_bundle(settings.bundle), settings)


@needs_openvino
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
