"""OpenVINO, on CPUs."""

import queue
import re
import sys
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from models.bundle import BundleError, Outputs

# Its tools for conversion, which are imported with it where they are found, and report home.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # not to be found

import openvino  # noqa: E402  # after that line, so that it holds

# Eight bits of a bfloat16, through some fifty layers; and integers, which it adds up otherwise.
_ROUNDED_BFLOAT16, _ROUNDED = 2**-4, 2**-6


class OpenVinoEngine:
    """A network compiled by OpenVINO.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, an ONNX network, verified.
        threads: Each runs batches of its own.
        bfloat16: Compute in it what the network has in floats.

    Raises:
        BundleError: The file is not a network with the input that the contract names.
    """

    device = "cpu"

    def __init__(self, file: str, content: bytes, threads: int, bfloat16: bool):
        self.name = "openvino-bfloat16" if bfloat16 else "openvino"
        self.rounding = _ROUNDED_BFLOAT16 if bfloat16 else _ROUNDED
        self.runs_at_once = threads
        try:
            core = openvino.Core()
            compiled = core.compile_model(
                core.read_model(BytesIO(content)),
                "CPU",
                {
                    "PERFORMANCE_HINT": "THROUGHPUT",
                    "NUM_STREAMS": threads,
                    "INFERENCE_NUM_THREADS": threads,
                    # Instances on one host would all be pinned to the same cores.
                    "ENABLE_CPU_PINNING": False,
                    "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
                },
            )
        except Exception as error:  # of whatever its front end makes of the file
            reason = re.sub(r"\s+", " ", str(error))[-200:]
            raise BundleError(f"OpenVINO cannot load {file}: {reason}") from None
        inputs = [(i.any_name, i.element_type.get_type_name()) for i in compiled.inputs]
        if inputs != [("images", "u8")]:
            raise BundleError(f"{file} must take one input, `images` of uint8.")
        self._outputs = [output.any_name for output in compiled.outputs]
        # A request is one thread's at a time.
        self._requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(threads):
            self._requests.put(compiled.create_infer_request())

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        request = self._requests.get()
        try:
            values = request.infer({"images": images}, share_inputs=True)
            return {name: values[row] for row, name in enumerate(self._outputs)}
        finally:
            self._requests.put(request)
