import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from structlog.testing import capture_logs

from app.engines.onnx import OnnxEngine, open_session, open_sessions
from models.bundle import Outputs
from tests.app.engines import load
from tests.bundles import SIDE, make_bundle


@pytest.mark.parametrize(("threads", "cores"), [(1, 1), (2, 2), (4, 2)])
def test_onnx_runtime_has_two_cores_for_a_run_that_is_alone(
    threads: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), device="cpu", threads=threads)
    taken = []

    def take(_: OnnxEngine, session: onnxruntime.InferenceSession, images: np.ndarray) -> Outputs:
        taken.append(session.get_session_options().intra_op_num_threads)
        return {}

    monkeypatch.setattr(OnnxEngine, "_run", take)
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    engine.run(images)
    engine.run_alone(images)
    assert taken == [1, cores]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_the_threads_of_a_run_that_is_alone_are_on_a_core_each(tmp_path: Path) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), device="cpu", threads=2)
    assert isinstance(engine, OnnxEngine)
    engine.run_alone(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    [beside] = engine._beside
    assert len(os.sched_getaffinity(0) - os.sched_getaffinity(beside)) == 1


def test_threads_of_onnx_runtime_rest_between_runs(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    content = bundle.read(bundle.manifest.artifacts[0])
    options = open_session("model.onnx", content, 2).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def adds(bias: np.ndarray) -> bytes:
    """A network with one weight."""
    kind, shape = onnx.TensorProto, ["n", SIDE, SIDE, 3]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["images"], ["pixels"], to=kind.FLOAT),
            onnx.helper.make_node("Add", ["pixels", "bias"], ["sum"]),
        ],
        "test",
        [onnx.helper.make_tensor_value_info("images", kind.UINT8, shape)],
        [onnx.helper.make_tensor_value_info("sum", kind.FLOAT, shape)],
        [onnx.numpy_helper.from_array(bias, "bias")],
    )
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


@pytest.mark.parametrize("folder", [".", "absent"])
def test_sessions_of_one_network_have_its_weights_once_where_a_folder_can_be_made(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / folder))
    generator = np.random.default_rng(0)
    bias = generator.normal(size=(SIDE, SIDE, 3)).astype(np.float32)
    with capture_logs() as logs:
        sessions = open_sessions("model.onnx", adds(bias), (1, 2))
    images = generator.integers(0, 255, (2, SIDE, SIDE, 3), np.uint8)
    # Sessions of what has been optimised do not do it again.
    levels = onnxruntime.GraphOptimizationLevel
    level = levels.ORT_DISABLE_ALL if folder == "." else levels.ORT_ENABLE_ALL
    for session in sessions:
        assert session.get_session_options().graph_optimization_level == level
        (found,) = session.run(["sum"], {"images": images})
        np.testing.assert_allclose(found, images + bias, rtol=1e-6)
    mapped = Path("/proc/self/maps").read_text().count(f"{tmp_path}/mmtl-network-")
    assert (mapped, [log["event"] for log in logs]) == (
        (2, []) if folder == "." else (0, ["weights not shared"])
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["app.engines.onnx", "training.runners"])
def test_onnx_runtime_reports_home_nothing(module: str, tmp_path: Path) -> None:
    # It keeps what it is going to report, and an id of the machine, in these folders.
    folders = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    # Where these are set, it does not report anyhow.
    hidden = {"CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | folders
    command = [sys.executable, "-c", f"import {module}"]
    subprocess.run(command, env=environment, check=True, timeout=120)
    kept = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert kept <= {"matplotlib", "fontconfig"}
