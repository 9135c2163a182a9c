import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from structlog.testing import capture_logs

from app.engines import (
    EngineError,
    _choices,
    _finds_gpu,
    compiler,
    load_engine,
    one_line,
    open_engine,
)
from app.engines.graphs import Busy
from app.engines.onnx import OnnxEngine
from app.engines.openvino import OpenVinoEngine
from app.settings import Settings
from models.bundle import Bundle, BundleError, Outputs, Precision, load_bundle, save_bundle
from tests.app.engines import load, needs_gpu, needs_no_cuda, needs_openvino, runtimes
from tests.bundles import SIDE, expected_outputs, make_bundle, make_manifest


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


@runtimes
def test_no_batch_is_larger_than_asked_for(runtime: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    batches = [load(bundle, runtime=runtime, max_batch=most, device="cpu").batch for most in (1, 2)]
    assert batches == [1, 2]


@runtimes
@pytest.mark.parametrize("content", [b"not a network", b""])
def test_a_file_that_is_no_network_is_refused(runtime: str, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"cannot load model\.onnx: .+"):
        if runtime == "onnxruntime":
            OnnxEngine("model.onnx", content, 2, 4)
        else:
            OpenVinoEngine("model.onnx", content, (SIDE, SIDE), 1, bfloat16=False, max_batch=4)


def test_a_network_whose_weights_lie_outside_of_it_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "whole")
    model = onnx.load(tmp_path / "model.onnx")
    part = tmp_path / "model.onnx"
    onnx.save_model(model, part, save_as_external_data=True, location="weights", size_threshold=0)
    bundle = save_bundle(tmp_path / "parted", make_manifest(part), {part.name: part})
    refused = "in a file of their own, which no hash is of"
    with pytest.raises(BundleError, match=refused):
        open_engine(bundle, Settings(device="cpu"))
    # An entry of a protocol buffer has its fields in any order, and a length in more bytes.
    content = part.read_bytes()
    entry = b"\n\x08location\x12\x07weights"
    assert entry in content
    for other in (b"\x12\x07weights\n\x08location", b"\n\x88\x00location\x12\x06weight"):
        part.write_bytes(content.replace(entry, other))
        bundle = save_bundle(tmp_path / "other", make_manifest(part), {part.name: part})
        with pytest.raises(BundleError, match=refused):
            open_engine(bundle, Settings(device="cpu"))


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
    with pytest.raises(BundleError, match=r"output site has shape \(2, 2\), not \(2, 3\)"):
        load(Bundle(made.folder, manifest), runtime=runtime, max_batch=2)


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
    other = bundle.manifest.model_copy(update={"artifacts": bundle.manifest.artifacts[::-1]})
    artifact, _ = open_engine(Bundle(bundle.folder, other), Settings(device="cpu"))
    assert artifact.precision == "fp32"
    with pytest.raises(BundleError, match=r"model\.int8\.onnx on this machine differs"):
        open_engine(bundle, Settings(device="cpu", precision="int8"))


def test_an_openvino_that_does_not_load_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "core", compiler.core.__wrapped__)
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
@needs_no_cuda
def test_a_runtime_that_is_not_needed_is_not_loaded() -> None:
    code = """
import sys, app.engines
from app.settings import Settings
from models.bundle import load_bundle
app.engines.multiplies_bfloat16 = lambda: True
settings = Settings(threads=1)
_, engine = app.engines.open_engine(load_bundle(settings.bundle), settings)
print(engine.name, "onnxruntime" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["openvino-bfloat16", "False"]


@needs_openvino
@pytest.mark.parametrize(
    ("bfloat16", "settings", "name"),
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
    bfloat16: bool, settings: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.multiplies_bfloat16", lambda: bfloat16)
    asked = Settings(device="cpu", **settings)
    _, engine = open_engine(load_bundle(asked.bundle), asked)
    assert engine.name == name


def test_a_runtime_that_cannot_be_used_is_passed_over_where_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.engines._prefers_openvino", lambda _: True)
    monkeypatch.setattr(compiler, "core", compiler.core.__wrapped__)
    monkeypatch.setitem(sys.modules, "openvino", None)
    bundle = two_precisions(tmp_path / "bundle")
    artifact, engine = open_engine(bundle, Settings(device="cpu"))
    assert (artifact.precision, engine.name) == ("int8", "onnxruntime")
    out, err = capsys.readouterr()
    assert "OpenVINO cannot be used" in out + err


def torch_bundle(folder: Path, artifact_format: str) -> Bundle:
    made = make_bundle(folder)
    artifact = made.manifest.artifacts[0].model_copy(update={"format": artifact_format})
    return Bundle(made.folder, made.manifest.model_copy(update={"artifacts": (artifact,)}))


@pytest.mark.parametrize("artifact_format", ["torchscript", "torch_export"])
def test_torch_artifacts_run_only_where_trusted(tmp_path: Path, artifact_format: str) -> None:
    bundle = torch_bundle(tmp_path / "bundle", artifact_format)
    with pytest.raises(EngineError, match="MMTL_TRUST_TORCH"):
        load(bundle)


@runtimes
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_shipped_bundle_loads_and_answers_its_golden_predictions(
    runtime: str, precision: Precision
) -> None:
    bundle = load_bundle(Settings().bundle)
    artifact = bundle.artifact("onnx", precision)
    load_engine(bundle, artifact, Settings(precision=precision, runtime=runtime))
    assert bundle.artifact("onnx").bytes < 16_000_000


def test_a_gpu_that_cannot_be_used_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = "CUDA driver version is insufficient for CUDA runtime version"
    monkeypatch.setattr("app.engines._knows_cuda", lambda: True)
    monkeypatch.setattr("app.engines.cuda.why_not", lambda _: reason)
    monkeypatch.setattr("app.engines._finds_gpu", cache(_finds_gpu.__wrapped__))
    with capture_logs() as logs:
        for _ in range(2):
            assert open_engine(make_bundle(tmp_path / "bundle"), Settings())[1].device == "cpu"
    said = {"event": "no GPU", "log_level": "warning", "setting": "MMTL_DEVICE=auto"}
    assert [entry for entry in logs if entry["event"] == "no GPU"] == [{**said, "reason": reason}]


@pytest.mark.parametrize("precisions", [("fp16", "fp32"), ("fp32", "fp16")])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_whole_floats_are_taken_where_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precisions: tuple[Precision, ...], on_cpu: bool
) -> None:
    made = make_bundle(tmp_path / "bundle")
    (one,) = made.manifest.artifacts
    artifacts = []
    for precision in precisions:
        file = f"model.{precision}.onnx"
        (made.folder / file).write_bytes(made.path(one).read_bytes())
        artifacts.append(one.model_copy(update={"file": file, "precision": precision}))
    bundle = Bundle(made.folder, made.manifest.model_copy(update={"artifacts": tuple(artifacts)}))
    monkeypatch.setattr("app.engines._on_cpu", lambda _: on_cpu)
    assert _choices(bundle, Settings())[0][0].precision == "fp32"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA failure 2: out of memory"), r"too little memory .*cuda:0.*MAX_BATCH"),
        (Busy("Another run on the GPU does not end."), "Another run on the GPU does not end"),
    ],
    ids=["no-memory", "busy"],
)
def test_what_a_gpu_lacks_is_not_the_bundle_s_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    def fail(_: object) -> None:
        raise error

    engine = SimpleNamespace(device="cuda:0", batch=4, run=fail, run_alone=fail, rounding=0.0)
    monkeypatch.setattr("app.engines._load", lambda *_: engine)
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(EngineError, match=said):
        load_engine(bundle, bundle.manifest.artifacts[0], Settings())


@needs_gpu
def test_a_gpu_is_taken_where_there_is_one_and_runs_floats() -> None:
    bundle = load_bundle(Settings().bundle)
    artifact, engine = open_engine(bundle, Settings())
    assert (artifact.precision, engine.device) == ("fp32", "cuda:0")
    images = np.random.default_rng(0).integers(0, 255, (5, 160, 160, 3), np.uint8)
    expected = OnnxEngine("model.onnx", bundle.read(artifact), 1, 4).run(images)
    for name, values in engine.run(images).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-3)


def test_what_a_runtime_says_keeps_its_beginning_and_its_cause() -> None:
    assert one_line(ValueError("short,\n  on two lines")) == "short, on two lines"
    said = one_line("FAIL : /onnxruntime/core/graph.cc " + "x" * 500 + " Failed to write the file")
    assert said.startswith("FAIL : /onnxruntime/core/graph.cc")
    assert said.endswith(" Failed to write the file")
    assert len(said) < 250
    assert one_line(said) == said
