"""What the tests of all engines share: which are to be had here, and a bundle's network loaded."""

from importlib.util import find_spec

import onnxruntime
import pytest

from app.engines import Engine, load_engine
from app.engines.cuda import why_not
from app.settings import Settings
from models.bundle import Bundle

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
needs_no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
needs_gpu = pytest.mark.skipif(why_not(0) is not None, reason="ONNX Runtime finds no GPU")
runtimes = pytest.mark.parametrize(
    "runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]
)


def load(bundle: Bundle, **settings: object) -> Engine:
    """The first artifact of a bundle, with such settings."""
    return load_engine(bundle, bundle.manifest.artifacts[0], Settings(**settings))
