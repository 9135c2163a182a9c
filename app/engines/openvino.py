"""OpenVINO, on CPUs."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.engines.compiler import CORE, CompilerError, compile_apart, one_line
from models.bundle import BundleError, Outputs
from models.cores import has_amx
from models.memory import limit_arenas

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest

# Eight bits of a bfloat16, through some fifty layers; and integers, which it adds up otherwise.
_ROUNDED_BFLOAT16, _ROUNDED = 2**-4, 2**-6
# Images of a whole run, and the share of them from which on one that is filled up takes less time
# than single images. Each size takes memory, for code made for it: there are no others than these.
_WHOLE = 8
_WORTH_FILLING = 3 / 4
# Fewer arenas of malloc take less memory, and threads wait for each other there.
_THREADS_PER_ARENA = 2


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
    # With AMX a run is so short that one more worker would only make the others wait longer.
    helpers = 0 if has_amx() else 1

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
        with ThreadPoolExecutor(threads) as pool:
            try:
                compiled = compile_apart(content, options)
                # One for each thread, as those that share one wait for each other's streams;
                # compiled once, as that takes the longest.
                each = list(
                    pool.map(lambda _: CORE.import_model(compiled, "CPU", options), range(threads))
                )
            except (CompilerError, RuntimeError) as error:
                raise BundleError(f"OpenVINO cannot load {file}: {one_line(error)}") from None
            inputs = [(i.any_name, i.element_type.get_type_name()) for i in each[0].inputs]
            if inputs != [("images", "u8")]:
                raise BundleError(f"{file} must take one input, `images` of uint8.")
            self._outputs = [output.any_name for output in each[0].outputs]
            try:
                requests = list(pool.map(lambda network: self._warmed(network, input_size), each))
            except RuntimeError as error:
                raise BundleError(
                    f"{file} does not take the declared input: {one_line(error)}"
                ) from None
        # The one that ran last is the first to run again: what it needs is still in the caches.
        self._requests: queue.LifoQueue[InferRequest] = queue.LifoQueue()
        for request in requests:
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

    def _warmed(self, network: CompiledModel, input_size: tuple[int, int]) -> InferRequest:
        """A request of a network, with code for each size of its runs."""
        request = network.create_infer_request()
        for size in (self.batch, 1):
            images = np.zeros((size, *input_size, 3), np.uint8)
            request.infer({"images": images}, share_inputs=True)
        return request

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
