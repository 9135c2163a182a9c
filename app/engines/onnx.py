"""ONNX Runtime."""

import re

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from app.engines import EngineError
from models.bundle import BundleError, Outputs

_CUDA = "CUDAExecutionProvider"


def uses_gpu(device: str) -> bool:
    """Whether this ONNX Runtime would take a GPU for `auto`, `cpu` or `cuda:N`."""
    return device != "cpu" and _CUDA in onnxruntime.get_available_providers()


class OnnxEngine:
    """A session of ONNX Runtime.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        device: `auto`, `cpu` or `cuda:N`.
        threads: On the CPU: each runs batches of its own. One run on several cores waits at every
            node for the slowest of them (benchmarks/serving/steps.py).

    Raises:
        BundleError: The file is not a network with the input that the contract names.
        EngineError: A GPU is asked for and cannot be used.
    """

    name = "onnxruntime"
    rounding = 0.0

    def __init__(self, file: str, content: bytes, device: str, threads: int):
        if device.startswith("cuda") and not uses_gpu(device):
            raise EngineError(
                f"MMTL_DEVICE={device}: this ONNX Runtime has no CUDA. "
                "Install requirements/gpu.txt in place of requirements/cpu.txt."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # A plan of memory for each size of batch, all of which are kept: on a CPU there are few.
        options.enable_mem_pattern = not uses_gpu(device)
        providers: list[object] = ["CPUExecutionProvider"]
        if uses_gpu(device):
            onnxruntime.preload_dlls()  # CUDA's own libraries, where they came as wheels
            number = int(device.removeprefix("cuda:")) if device != "auto" else 0
            providers.insert(0, (_CUDA, {"device_id": number}))
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises types of its own, some of them private
            reason = re.sub(r"\s+", " ", str(error))[:200]
            raise BundleError(f"ONNX Runtime cannot load {file}: {reason}") from None
        on_gpu = self._session.get_providers()[0] == _CUDA
        if device.startswith("cuda") and not on_gpu:
            raise EngineError(f"MMTL_DEVICE={device}: ONNX Runtime could not use that GPU.")
        self.device = ("cuda:0" if device == "auto" else device) if on_gpu else "cpu"
        self.runs_at_once = 2 if on_gpu else threads
        inputs = self._session.get_inputs()
        if [(i.name, i.type) for i in inputs] != [("images", "tensor(uint8)")]:
            raise BundleError(f"{file} must take one input, `images` of uint8.")
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        values = self._session.run(self._outputs, {"images": images})
        return dict(zip(self._outputs, values, strict=True))
