import os
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from app.engines import compiler
from app.engines.compiler import CompilerError, NetworkError, compile_apart, core
from tests.app.engines import load, needs_openvino
from tests.bundles import SIDE, make_bundle

pytestmark = needs_openvino
OPTIONS = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_network_is_compiled_in_another_process_and_imported_in_this_one(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (one, two), peak = compile_apart(bundle.read(bundle.manifest.artifacts[0]), [1, 2], OPTIONS)
    network = core().import_model(BytesIO(one), "CPU", OPTIONS)
    assert [*network.inputs[0].shape] == [1, SIDE, SIDE, 3]
    network = core().import_model(BytesIO(two), "CPU", OPTIONS)
    assert [(i.any_name, [*i.shape]) for i in network.inputs] == [("images", [2, SIDE, SIDE, 3])]
    images = np.full((2, SIDE, SIDE, 3), 7, np.uint8)
    answers = network.create_infer_request().infer({"images": images})
    np.testing.assert_allclose(answers["ood_score"], 7, atol=1e-3)
    assert 20_000_000 < peak < 2_000_000_000


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", r"was ended by signal 9: is there memory for it\?$"),
        ("echo an assertion >&2; kill -6 $$", "was ended by signal 6: an assertion$"),
        ("sleep 9", "did not end in 1 seconds$"),
        ("exit 0", "ended without a word$"),
    ],
)
def test_a_compiler_that_crashes_or_hangs_takes_nothing_along(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.compiler._MOST_SECONDS", 1.0)
    monkeypatch.setattr("sys.executable", interpreter(tmp_path, script))
    with pytest.raises(CompilerError, match=reason):
        compile_apart(b"a network", [1], OPTIONS)


def test_what_it_does_not_take_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NetworkError, match=r"^[^\n]+$"):
        compile_apart(b"no network", [1], OPTIONS)
    script = "printf 'first\n\nsecond\n' >&2; exit 1"
    monkeypatch.setattr("sys.executable", interpreter(tmp_path, script))
    with pytest.raises(NetworkError, match=r"^first second$"):
        compile_apart(b"a network", [1], OPTIONS)


def test_it_is_told_no_secrets_and_gives_nothing_that_a_library_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    script = f'env > {started}; ONEDNN_VERBOSE=1 exec {sys.executable} "$@"'
    for name in ("MMTL_JWT_SECRET", "mmtl_keys", "OTEL_EXPORTER_OTLP_HEADERS"):
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setattr("sys.executable", interpreter(tmp_path, script))
    bundle = make_bundle(tmp_path / "bundle")
    (compiled,), _ = compile_apart(bundle.read(bundle.manifest.artifacts[0]), [2], OPTIONS)
    assert "a secret" not in started.read_text()
    assert core().import_model(BytesIO(compiled), "CPU", OPTIONS).inputs


def test_its_process_ends_where_openvino_is_not_imported_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"

    def fail() -> None:
        while not started.exists():
            time.sleep(0.01)
        raise ImportError("no such library")

    script = f"echo $$ > {started}.part; mv {started}.part {started}; exec sleep 99"
    monkeypatch.setattr("sys.executable", interpreter(tmp_path, script))
    monkeypatch.setattr(compiler, "core", fail)
    with pytest.raises(CompilerError, match=r"cannot be used \(no such library\)"):
        compile_apart(b"a network", [1], OPTIONS)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_ctrl_c_while_openvino_is_imported_is_no_fault_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        # As pybind11 has it.
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr(compiler, "core", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(make_bundle(tmp_path / "bundle"), runtime="openvino")


def test_a_compiler_that_does_not_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    with pytest.raises(CompilerError, match=r"compiler does not start: .*No such file"):
        compile_apart(b"a network", [1], OPTIONS)
