import os
import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from structlog.testing import capture_logs

from app.engines import Engine, EngineError, load_engine, open_engine
from app.engines.cuda import CudaEngine, has_gpu
from app.engines.onnx import OnnxEngine, open_session, open_sessions
from app.engines.pytorch import PytorchEngine
from app.settings import Settings
from models.bundle import (
    ArtifactFormat,
    Bundle,
    BundleError,
    Outputs,
    Precision,
    load_bundle,
    save_bundle,
)
from tests.bundles import SIDE, expected_outputs, make_bundle
from tests.lesions import draw_lesion

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
needs_no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
needs_gpu = pytest.mark.skipif(not has_gpu(0), reason="ONNX Runtime finds no GPU")
runtimes = pytest.mark.parametrize(
    "runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]
)


def load(bundle: Bundle, **settings: object) -> Engine:
    return load_engine(bundle, bundle.manifest.artifacts[0], Settings(**settings))


@runtimes
def test_a_network_answers_by_name_at_any_batch_size(runtime: str, tmp_path: Path) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), runtime=runtime, precision="fp32", device="cpu")
    assert (engine.name, engine.device) == (runtime, "cpu")
    for count in (1, 2, 3, 4, 7, 8, 13):
        images = np.random.default_rng(0).integers(0, 255, (count, SIDE, SIDE, 3), np.uint8)
        outputs = engine.run(images)
        for name, values in expected_outputs(images).items():
            np.testing.assert_allclose(outputs[name], values, rtol=1e-4, atol=1e-4)


@runtimes
def test_a_run_that_is_alone_answers_alike(runtime: str, tmp_path: Path) -> None:
    engine = load(make_bundle(tmp_path / "bundle"), runtime=runtime, device="cpu", threads=2)
    images = np.random.default_rng(0).integers(0, 255, (1, SIDE, SIDE, 3), np.uint8)
    expected, found = engine.run(images), engine.run_alone(images)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("name", ["run", "run_alone"])
def test_a_run_that_is_not_as_its_golden_prediction_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = getattr(OnnxEngine, name)

    def wrong(engine: OnnxEngine, images: np.ndarray) -> Outputs:
        return {output: values + 1 for output, values in run(engine, images).items()}

    monkeypatch.setattr(OnnxEngine, name, wrong)
    with pytest.raises(BundleError, match="differs from its golden prediction"):
        load(make_bundle(tmp_path / "bundle"), device="cpu", threads=2)


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
    for session in sessions:
        (found,) = session.run(["sum"], {"images": images})
        np.testing.assert_allclose(found, images + bias, rtol=1e-6)
    mapped = Path("/proc/self/maps").read_text().count(f"{tmp_path}/mmtl-network-")
    assert (mapped, [log["event"] for log in logs]) == (
        (2, []) if folder == "." else (0, ["weights not shared"])
    )
    assert list(tmp_path.iterdir()) == []


@runtimes
def test_no_batch_is_larger_than_asked_for(runtime: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    batches = [load(bundle, runtime=runtime, max_batch=most, device="cpu").batch for most in (1, 2)]
    assert batches == [1, 2]


@needs_no_cuda
def test_a_gpu_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"requirements/gpu\.txt"):
        load(make_bundle(tmp_path / "bundle"), device="cuda:0")


@runtimes
@pytest.mark.parametrize("content", [b"not a network", b""])
def test_a_file_that_is_no_network_is_refused(runtime: str, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"cannot load model\.onnx: .+"):
        if runtime == "onnxruntime":
            OnnxEngine("model.onnx", content, 2, 4)
        else:
            from app.engines.openvino import OpenVinoEngine

            OpenVinoEngine("model.onnx", content, (SIDE, SIDE), 1, bfloat16=False, max_batch=4)


def test_a_file_that_was_changed_after_its_bundle_was_verified_is_not_run(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    bundle = load_bundle(made.folder)
    (artifact,) = (a for a in bundle.manifest.artifacts if a.format == "onnx")
    content = bundle.path(artifact).read_bytes()
    bundle.path(artifact).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="is not the file that the manifest describes"):
        load(bundle)
    bundle.path(artifact).unlink()
    bundle.path(artifact).mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.read(artifact)


@runtimes
def test_a_network_that_does_not_fit_its_manifest_is_refused(runtime: str, tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    site = made.manifest.tasks[2].model_copy(update={"labels": ("a", "b", "c")})
    manifest = made.manifest.model_copy(update={"tasks": (*made.manifest.tasks[:2], site)})
    with pytest.raises(BundleError, match=r"output site has shape \(1, 2\), not \(1, 3\)"):
        load(Bundle(made.folder, manifest), runtime=runtime)


@runtimes
def test_an_input_of_another_size_is_refused_in_a_sentence(runtime: str, tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    size = made.manifest.input.model_copy(update={"height": 64})
    manifest = made.manifest.model_copy(update={"input": size})
    with pytest.raises(BundleError, match=r"model\.onnx does not take the declared input"):
        load(Bundle(made.folder, manifest), runtime=runtime)


def two_precisions(folder: Path, golden_shift: float = 0.0) -> Bundle:
    """A bundle whose int8 artifact is the fp32 one, with golden predictions of its own."""
    made = make_bundle(folder)
    (precise,) = made.manifest.artifacts
    golden = tuple(
        each.model_copy(
            update={
                "outputs": {k: tuple(x + golden_shift for x in v) for k, v in each.outputs.items()}
            }
        )
        for each in made.manifest.golden
    )
    fast = precise.model_copy(
        update={"file": "model.int8.onnx", "precision": "int8", "golden": golden}
    )
    manifest = made.manifest.model_copy(update={"artifacts": (precise, fast)})
    path = made.path(precise)
    return save_bundle(folder, manifest, {"model.onnx": path, "model.int8.onnx": path})


def test_a_cpu_runs_integers_where_the_bundle_has_them(tmp_path: Path) -> None:
    bundle = two_precisions(tmp_path / "bundle")
    for settings, expected in (
        (Settings(device="cpu"), "int8"),
        (Settings(device="cpu", precision="fp32"), "fp32"),
        (Settings(device="cpu", precision="int8"), "int8"),
    ):
        artifact, _ = open_engine(bundle, settings)
        assert artifact.precision == expected
    with pytest.raises(BundleError, match="has no onnx fp16 artifact; it has onnx fp32, onnx int8"):
        open_engine(bundle, Settings(precision="fp16"))


def test_integers_that_answer_otherwise_here_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = two_precisions(tmp_path / "bundle", golden_shift=1.0)
    artifact, _ = open_engine(bundle, Settings(device="cpu"))
    assert artifact.precision == "fp32"
    out, err = capsys.readouterr()
    assert "passed over" in out + err
    assert "model.int8.onnx" in out + err
    with pytest.raises(BundleError, match=r"model\.int8\.onnx on this machine differs"):
        open_engine(bundle, Settings(device="cpu", precision="int8"))


def test_an_openvino_that_does_not_load_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "app.engines.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"OpenVINO cannot be used.*requirements/cpu\.txt"):
        open_engine(make_bundle(tmp_path / "bundle"), Settings(runtime="openvino"))


@needs_no_cuda
def test_who_asks_for_a_gpu_is_told_of_the_gpu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="this ONNX Runtime has no CUDA"):
        open_engine(two_precisions(tmp_path / "bundle"), Settings(device="cuda:0"))


def test_openvino_runs_on_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="MMTL_DEVICE=cuda:0: OpenVINO runs on the CPU"):
        load(make_bundle(tmp_path / "bundle"), runtime="openvino", device="cuda:0")


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
@needs_no_cuda
def test_a_runtime_that_is_not_needed_is_not_loaded() -> None:
    code = """
import sys, app.engines
from app.settings import Settings
from models.bundle import load_bundle
app.engines.has_amx = app.engines.multiplies_bfloat16 = lambda: True
settings = Settings(threads=1)
_, engine = app.engines.open_engine(load_bundle(settings.bundle), settings)
print(engine.name, "onnxruntime" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino-bfloat16", "False"]


@needs_openvino
@pytest.mark.parametrize(
    ("amx", "settings", "name"),
    [
        (True, {}, "openvino-bfloat16"),
        (False, {}, "onnxruntime"),
        (True, {"precision": "int8"}, "onnxruntime"),
        (True, {"precision": "fp32"}, "onnxruntime"),
        (True, {"runtime": "onnxruntime"}, "onnxruntime"),
        (True, {"threads": 9}, "onnxruntime"),
    ],
)
def test_the_fastest_runtime_is_taken_where_nothing_is_asked_for(
    amx: bool, settings: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.has_amx", lambda: amx)
    monkeypatch.setattr("app.engines.multiplies_bfloat16", lambda: amx)
    asked = Settings(device="cpu", **settings)
    _, engine = open_engine(load_bundle(asked.bundle), asked)
    assert engine.name == name


def test_a_runtime_that_cannot_be_used_is_passed_over_where_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.engines._prefers_openvino", lambda _: True)
    monkeypatch.delitem(sys.modules, "app.engines.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    bundle = two_precisions(tmp_path / "bundle")
    artifact, engine = open_engine(bundle, Settings(device="cpu"))
    assert (artifact.precision, engine.name) == ("int8", "onnxruntime")
    out, err = capsys.readouterr()
    assert "OpenVINO cannot be used" in out + err


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


def torch_bundle(folder: Path, artifact_format: str) -> Bundle:
    made = make_bundle(folder)
    artifact = made.manifest.artifacts[0].model_copy(update={"format": artifact_format})
    return Bundle(made.folder, made.manifest.model_copy(update={"artifacts": (artifact,)}))


@pytest.mark.parametrize("artifact_format", ["torchscript", "torch_export"])
def test_torch_artifacts_run_only_where_trusted(tmp_path: Path, artifact_format: str) -> None:
    bundle = torch_bundle(tmp_path / "bundle", artifact_format)
    with pytest.raises(EngineError, match="MMTL_TRUST_TORCH"):
        load(bundle)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("artifact_format", ["torchscript", "torch_export"])
def test_a_file_that_is_no_program_is_refused(artifact_format: str) -> None:
    with pytest.raises(BundleError, match=r"torch cannot load model\.pt"):
        PytorchEngine("model.pt", b"not a program", artifact_format, "cpu", 1, 8)


def test_torch_names_a_gpu_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="MMTL_DEVICE=cuda:99"):
        PytorchEngine("model.pt2", b"", "torch_export", "cuda:99", 1, 8)


@runtimes
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_shipped_bundle_loads_and_answers_its_golden_predictions(
    runtime: str, precision: Precision
) -> None:
    bundle = load_bundle(Settings().bundle)
    artifact = bundle.artifact("onnx", precision)
    load_engine(bundle, artifact, Settings(precision=precision, runtime=runtime))
    assert bundle.artifact("onnx").bytes < 16_000_000


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
def test_a_gpu_is_taken_where_there_is_one_and_runs_floats() -> None:
    bundle = load_bundle(Settings().bundle)
    artifact, engine = open_engine(bundle, Settings())
    assert (artifact.precision, engine.device) == ("fp32", "cuda:0")
    images = np.random.default_rng(0).integers(0, 255, (5, 160, 160, 3), np.uint8)
    expected = OnnxEngine("model.onnx", bundle.read(artifact), 1, 4).run(images)
    for name, values in engine.run(images).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-3)


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


class Program(torch.nn.Module):
    """Answers with a mean, and with what a constant that it makes itself is added to."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        means = images.float().mean(dim=(1, 2, 3))
        ages = torch.arange(5, dtype=torch.float32, device=images.device)
        return {"mean": means, "ages": means[:, None] + ages}


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("artifact_format", ["torchscript", "torch_export"])
def test_a_gpu_runs_torch_artifacts_at_any_batch_size(artifact_format: ArtifactFormat) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3), np.uint8)
    example = torch.from_numpy(images)
    content = BytesIO()
    if artifact_format == "torchscript":
        torch.jit.save(torch.jit.script(Program()), content)
    else:
        free = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(Program(), (example,), dynamic_shapes=free)
        torch.export.save(program, content)
    engine = PytorchEngine("model.pt", content.getvalue(), artifact_format, "cuda:0", 1, 4)
    for count in (1, 2, 3, 3):
        found = engine.run(images[:count])
        means = images[:count].astype(np.float32).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found["mean"], means, rtol=1e-4)
        np.testing.assert_allclose(found["ages"], means[:, None] + np.arange(5), rtol=1e-4)
