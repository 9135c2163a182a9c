from pathlib import Path

import numpy as np
import pytest

from tests.app.engines import needs_openvino
from tests.bundles import SIDE, make_bundle

pytestmark = needs_openvino
OPTIONS = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_network_is_compiled_in_another_process_and_imported_in_this_one(tmp_path: Path) -> None:
    from app.engines.compiler import CORE, compile_apart

    bundle = make_bundle(tmp_path / "bundle")
    compiled = compile_apart(bundle.read(bundle.manifest.artifacts[0]), OPTIONS)
    network = CORE.import_model(compiled, "CPU", OPTIONS)
    assert [i.any_name for i in network.inputs] == ["images"]
    images = np.full((1, SIDE, SIDE, 3), 7, np.uint8)
    answers = network.create_infer_request().infer({"images": images})
    np.testing.assert_allclose(answers["ood_score"], 7, atol=1e-3)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", r"ended by signal 9: is there memory for it\?"),
        ("printf 'first\n\nsecond\n' >&2; exit 1", "^first second$"),
    ],
)
def test_a_compiler_that_fails_takes_nothing_along(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.engines.compiler import CompilerError, compile_apart

    monkeypatch.setattr("sys.executable", interpreter(tmp_path, script))
    with pytest.raises(CompilerError, match=reason):
        compile_apart(b"a network", OPTIONS)


def test_a_compiler_that_does_not_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.engines.compiler import CompilerError, compile_apart

    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    with pytest.raises(CompilerError, match=r"its compiler does not start: .*No such file"):
        compile_apart(b"a network", OPTIONS)
