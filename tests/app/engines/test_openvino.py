import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from app.engines import load_engine, open_engine
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
