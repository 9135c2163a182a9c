"""OpenVINO, on CPUs."""

import queue
import re
import sys
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from models.bundle import BundleError, Outputs
from models.memory import limit_arenas

# Its tools for conversion, which are imported with it where they are found, and report home.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # not to be found

import openvino  # noqa: E402  # after that line, so that it holds

# Eight bits of a bfloat16, through some fifty layers; and integers, which it adds up otherwise.
_ROUNDED_BFLOAT16, _ROUNDED = 2**-4, 2**-6
# Images of a whole run, and the share of them from which on one that is filled up takes less time
# than single images. Each size takes memory, for code made for it: there are no others than these.
_WHOLE = 8
_WORTH_FILLING = 3 / 4
# Fewer arenas of malloc take less memory, and threads wait for each other there.
_THREADS_PER_ARENA = 2
# One for the process: where each network had its own, a process crashed at its end after a reload.
_CORE = openvino.Core()


class OpenVinoEngine:
    """A network compiled by OpenVINO, and warmed up.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, an ONNX network, verified.
        input_size: Height and width of its images.
        threads: Each runs batches of its own.
        bfloat16: Compute in it what the network has in floats.
        max_batch: Most images in one run.

    Raises:
        BundleError: The file is not a network with the input that the contract names.
    """

    device = "cpu"
    helpers = 0

    def __init__(
        self,
        file: str,
        content: bytes,
        input_size: tuple[int, int],
        threads: int,
        bfloat16: bool,
        max_batch: int,
    ):
        self.name = "openvino-bfloat16" if bfloat16 else "openvino"
        self.rounding = _ROUNDED_BFLOAT16 if bfloat16 else _ROUNDED
        self.runs_at_once = threads
        self.batch = min(_WHOLE, max_batch)
        limit_arenas(max(threads // _THREADS_PER_ARENA, 1))
        options = {
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": 1,
            # Instances on one host would all be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        }
        try:
            model = _CORE.read_model(BytesIO(content))
            exported = _CORE.compile_model(model, "CPU", options).export_model().getbuffer()
            # One for each thread, as those that share one wait for each other's streams; compiled
            # once, as that takes the longest. A tensor is not copied, as a stream is.
            compiled = openvino.Tensor(np.frombuffer(exported, np.uint8))
            each = [_CORE.import_model(compiled, "CPU", options) for _ in range(threads)]
        except Exception as error:  # of whatever its front end makes of the file
            raise BundleError(f"OpenVINO cannot load {file}: {_reason(error)}") from None
        inputs = [(i.any_name, i.element_type.get_type_name()) for i in each[0].inputs]
        if inputs != [("images", "u8")]:
            raise BundleError(f"{file} must take one input, `images` of uint8.")
        self._outputs = [output.any_name for output in each[0].outputs]
        # The one that ran last is the first to run again: what it needs is still in the caches.
        self._requests: queue.LifoQueue[openvino.InferRequest] = queue.LifoQueue()
        for network in each:
            request = network.create_infer_request()
            try:
                for size in (self.batch, 1):
                    images = np.zeros((size, *input_size, 3), np.uint8)
                    request.infer({"images": images}, share_inputs=True)
            except Exception as error:
                raise BundleError(
                    f"{file} does not take the declared input: {_reason(error)}"
                ) from None
            self._requests.put(request)

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        parts: list[Outputs] = []
        while len(images):
            size = self.batch if len(images) >= self.batch * _WORTH_FILLING else 1
            parts.append(self._run_at_once(images[:size], size))
            images = images[size:]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    run_alone = run

    def _run_at_once(self, images: NDArray[np.uint8], size: int) -> Outputs:
        """Their outputs, of a run of that size."""
        rows = len(images)
        if rows < size:
            filler = np.zeros((size - rows, *images.shape[1:]), np.uint8)
            images = np.concatenate([images, filler])
        request = self._requests.get()
        try:
            values = request.infer({"images": images}, share_inputs=True)
            return {name: values[row][:rows] for row, name in enumerate(self._outputs)}
        finally:
            self._requests.put(request)


def _reason(error: Exception) -> str:
    """The end of what it says, which names the cause, in one line."""
    return re.sub(r"\s+", " ", str(error))[-200:]
