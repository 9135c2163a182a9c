"""ONNX Runtime on an NVIDIA GPU."""

import sys
from contextlib import redirect_stdout
from functools import cache

import numpy as np
import onnxruntime
import structlog
from onnxruntime import OrtValue

from app.engines import EngineError, one_line
from app.engines.graphs import Busy, Graphs, Pixels, Run, alone
from app.engines.onnx import open_session
from models.bundle import Outputs

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# benchmarks/serving/gpu_steps.py undoes each.
_OPTIONS = {
    "enable_cuda_graph": "1",
    # TensorFloat-32 moves an age by days.
    "use_tf32": "0",
    # To try out every algorithm takes seconds more, and gains little.
    "cudnn_conv_algo_search": "HEURISTIC",
}
log = structlog.get_logger()


@cache
def why_not(number: int) -> str | None:
    """Why ONNX Runtime cannot use that GPU here; None where it can."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA"
    onnxruntime.set_default_logger_severity(4)  # or it would log what it does not find
    with redirect_stdout(sys.stderr):  # where it says what it lacks
        onnxruntime.preload_dlls()  # CUDA's own libraries, where they came as wheels
    try:
        OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", number)
    except RuntimeError as error:
        return one_line(error)
    return None


class CudaEngine:
    """A network on a GPU, in a CUDA graph for each size of batch where it fits into one.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        number: Of the GPU.
        max_batch: Most images in one run.

    Raises:
        BundleError: The file is not a network with the input that the contract names.
        EngineError: There is no such GPU, or no CUDA.
    """

    name = "onnxruntime"
    rounding = 0.0
    # One batch is put together while another runs.
    runs_at_once = helpers = 2

    def __init__(self, file: str, content: bytes, number: int, max_batch: int):
        self.device = f"cuda:{number}"
        self.batch = max_batch
        if _CUDA not in onnxruntime.get_available_providers():
            raise EngineError(
                f"MMTL_DEVICE={self.device}: this ONNX Runtime has no CUDA. "
                "Install requirements/gpu.txt in place of requirements/cpu.txt."
            )
        if reason := why_not(number):
            raise EngineError(
                f"MMTL_DEVICE={self.device}: ONNX Runtime could not use that GPU ({reason}). "
                "`nvidia-smi` lists those that there are, and their driver; CUDA's libraries are "
                "in requirements/gpu.txt."
            )
        # What is no network is refused before the GPU has a part in it.
        described = open_session(file, content)
        self._batch = described.get_inputs()[0].shape[0]
        self._outputs = {output.name: output.shape[1:] for output in described.get_outputs()}
        self._content = content
        self._number = number
        self._graphs = Graphs(max_batch)

    def run(self, images: Pixels) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        return self._graphs.run(images, self._record)

    run_alone = run

    def _record(self, images: Pixels) -> Run:
        return self._graph_that_runs(images) or self._without_graph(images)

    def _graph_that_runs(self, images: Pixels) -> Run | None:
        try:
            run = self._graph(images)
            with alone():
                run(images)
        except Busy:
            raise
        except Exception as error:  # an operator that CUDA has not, or a shape that is not known
            log.warning("no CUDA graph", images=len(images), reason=one_line(error))
            return None
        return run

    def _graph(self, images: Pixels) -> Run:
        session = self._open(len(images))
        taken = OrtValue.ortvalue_from_shape_and_type(images.shape, np.uint8, *self._place())
        binding = session.io_binding()
        binding.bind_ortvalue_input("images", taken)
        given = {}  # kept, as what it is bound to would not be
        for name, shape in self._outputs.items():
            given[name] = OrtValue.ortvalue_from_shape_and_type(
                [len(images), *shape], np.float32, *self._place()
            )
            binding.bind_ortvalue_output(name, given[name])

        # What ONNX Runtime plans and allocates in its first runs takes long, and is not recorded.
        unrecorded = onnxruntime.RunOptions()
        unrecorded.add_run_config_entry("gpu_graph_id", "-1")
        for _ in range(2):
            session.run_with_iobinding(binding, unrecorded)

        def run(images: Pixels) -> Outputs:
            taken.update_inplace(images)
            session.run_with_iobinding(binding)
            return dict(zip(given, binding.copy_outputs_to_cpu(), strict=True))

        return run

    def _without_graph(self, images: Pixels) -> Run:
        session = self._open(len(images), enable_cuda_graph="0")
        names = list(self._outputs)
        return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))

    def _open(self, size: int, **changes: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if isinstance(self._batch, str):
            options.add_free_dimension_override_by_name(self._batch, size)
        cuda = {"device_id": str(self._number), **_OPTIONS, **changes}
        # Without a fallback: it would run on the CPU, and say that it is on the GPU.
        return onnxruntime.InferenceSession(
            self._content, options, providers=[(_CUDA, cuda), _CPU], enable_fallback=0
        )

    def _place(self) -> tuple[str, int]:
        return "cuda", self._number
