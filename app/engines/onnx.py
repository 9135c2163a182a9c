"""ONNX Runtime on the CPU."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import structlog
from numpy.typing import NDArray

from app.engines import BATCH_ON_CPU, one_line
from models.bundle import BundleError, Outputs
from models.threads import begun_by, keep_off_this_core

# Cores of a run that is alone; of more than two, the gain has not been measured.
_LONE_CORES = 2
# Bytes of a weight from which on sessions share it: a page.
_SHARED_BYTES = 4096
log = structlog.get_logger()


class OnnxEngine:
    """A session of ONNX Runtime on the CPU.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        threads: Each runs batches of its own. One run on several cores would wait at every node for
            the slowest of them, so that only a lone one has more.
        max_batch: Most images in one run.

    Raises:
        BundleError: The file is not a network with the input that the contract names.
    """

    name = "onnxruntime"
    device = "cpu"
    helpers = 1
    rounding = 0.0

    def __init__(self, file: str, content: bytes, threads: int, max_batch: int):
        if threads >= _LONE_CORES:
            # With the threads that its runs have beside their caller's.
            sessions, self._beside = begun_by(
                lambda: open_sessions(file, content, (1, _LONE_CORES))
            )
            self._session, self._lone = sessions
        else:
            self._session = self._lone = open_session(file, content)
            self._beside = []
        self.runs_at_once = threads
        self.batch = min(BATCH_ON_CPU, max_batch)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        return self._run(self._session, images)

    def run_alone(self, images: NDArray[np.uint8]) -> Outputs:
        """The same, on two cores where there are two."""
        keep_off_this_core(self._beside)
        return self._run(self._lone, images)

    def _run(self, session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> Outputs:
        values = session.run(self._outputs, {"images": images})
        return dict(zip(self._outputs, values, strict=True))


def open_session(file: str, content: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """Open a network on the CPU.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        threads: Of each run.

    Raises:
        BundleError: The file is not a network with the input that the contract names.
    """
    return _opened(file, content, _options(threads))


def open_sessions(
    file: str, content: bytes, threads: Sequence[int]
) -> list[onnxruntime.InferenceSession]:
    """Open a network on the CPU several times, with its weights in memory once.

    It is optimised for this processor and written to a temporary folder, from which all sessions
    map the weights; these stay, though the folder is removed. Where there is no room for it, each
    session has weights of its own.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        threads: Of each session's runs.

    Raises:
        BundleError: The file is not a network with the input that the contract names.
    """
    try:
        with TemporaryDirectory(prefix="mmtl-network-") as folder:
            optimised = f"{folder}/network.onnx"
            writing = _options(1)
            writing.optimized_model_filepath = optimised
            weights = "session.optimized_model_external_initializers"
            writing.add_session_config_entry(f"{weights}_file_name", "weights")
            writing.add_session_config_entry(f"{weights}_min_size_in_bytes", str(_SHARED_BYTES))
            _opened(file, content, writing)
            return [_opened(file, optimised, _options(n, optimise=False)) for n in threads]
    except (OSError, BundleError) as error:
        # What is no network is refused here.
        sessions = [open_session(file, content, n) for n in threads]
        log.warning("weights not shared", file=file, sessions=len(sessions), reason=str(error))
        return sessions


def _options(threads: int, optimise: bool = True) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if threads > 1:
        # They wait for the next node awake, as they would come too late for it otherwise; when the
        # run is over, they sleep at once.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _opened(
    file: str, network: str | bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        session = onnxruntime.InferenceSession(
            network, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime raises types of its own, some of them private
        raise BundleError(f"ONNX Runtime cannot load {file}: {one_line(error)}") from None
    session._model_bytes = None  # kept for a fallback to other providers, which there is not
    inputs = session.get_inputs()
    if [(i.name, i.type) for i in inputs] != [("images", "tensor(uint8)")]:
        raise BundleError(f"{file} must take one input, `images` of uint8.")
    return session
