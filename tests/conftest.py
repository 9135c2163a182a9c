import gc
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from models.cores import instructions
from models.turns import allow_at_once
from tests.bundles import make_bundle

# A machine under load is not a failure.
hypothesis.settings.register_profile("mmtl", deadline=None)
hypothesis.settings.load_profile("mmtl")

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MMTL_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _one_large_image_at_a_time() -> None:
    """Whatever the machine has cores and memory for."""
    allow_at_once(1)


@pytest.fixture(autouse=True)
def _as_the_process_was() -> Iterator[None]:
    """What commands set for the whole process, which is their own."""
    objects, set_objects, root = gc.get_threshold(), gc.set_threshold, logging.getLogger()
    level = root.level
    yield
    set_objects(*objects)
    root.setLevel(level)


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "test").folder


@pytest.fixture
def settings(bundle_folder: Path) -> Settings:
    return Settings(bundle=bundle_folder, threads=1, max_files=4, max_bytes=3_000_000)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with started(settings) as running:
        yield running


def started(settings: Settings) -> TestClient:
    """A client whose service is ready as soon as it is entered."""

    class Ready(TestClient):
        def __enter__(self) -> "Ready":
            super().__enter__()
            deadline = time.monotonic() + 60
            while self.get("/health/ready").status_code != 200:
                assert time.monotonic() < deadline, "it does not get ready"
            return self

    return Ready(create_app(settings), raise_server_exceptions=False)


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Undo what `configure_logs` does to the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the development data is not here")
    return SHARED_DATA


# On other CPUs OpenVINO computes in no bfloat16, and an int8 network's answer for an image hangs on
# the size of its batch (docs/deployment.md).
needs_avx512 = pytest.mark.skipif(
    not (instructions() or "").startswith(("AMX", "AVX-512")), reason="no AVX-512"
)
