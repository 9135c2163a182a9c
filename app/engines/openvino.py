"""OpenVINO, on CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from math import ceil
from queue import Empty, LifoQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from app.engines import BATCH_ON_CPU, EngineError, one_line
from app.engines.compiler import CompilerError, compile_apart, core
from models.bundle import BundleError, Outputs
from models.memory import limit_arenas
from models.threads import begin

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest, Tensor

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Eight bits of a bfloat16, through some fifty layers; and integers, which it adds up otherwise.
_ROUNDED_BFLOAT16, _ROUNDED = 2**-4, 2**-6
# The share of a whole run from which on one that is filled up takes less time than single images.
_WORTH_FILLING = 3 / 4
# Cores of a run of one image, where there are as many.
_CORES_OF_ONE = 2
# Longest to wait for a network: it is another run that hangs, then.
_WAIT_SECONDS = 60.0
# Fewer arenas of malloc take less memory, and threads wait for each other there.
_THREADS_PER_ARENA = 2
log = structlog.get_logger()


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
        EngineError: It cannot be compiled here, whatever it is.
    """

    device = "cpu"
    helpers = 1

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
        self.batch = min(BATCH_ON_CPU, max_batch)
        options = {
            "NUM_STREAMS": 1,
            # Instances on one host would all be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        }
        # For single images and for whole batches, as a network that takes any number plans each
        # layer anew in every run. Threads that share one wait for each other: each core has one for
        # whole batches. Those for single images have two cores each, for one that is alone; two
        # that are not wait no longer than if each had a core, and a network less takes less memory.
        wide = min(_CORES_OF_ONE, threads)
        planned = [(1, wide)] * ceil(threads / wide)
        if self.batch > 1:
            planned += [(self.batch, 1)] * threads
        sizes = sorted({size for size, _ in planned})
        began = time.monotonic()
        try:
            # No more than these: a container may use fewer cores than its machine has.
            limited = {**options, "INFERENCE_NUM_THREADS": threads}
            blobs, peak = compile_apart(content, sizes, limited)
            took = round(time.monotonic() - began, 3)
            log.info("compiled", file=file, seconds=took, megabytes=peak // 1_000_000)
            # As tensors, of which networks share one: of bytes, each would make a copy.
            tensors = [_tensor(each) for each in blobs]
            del blobs
            limit_arenas(max(threads // _THREADS_PER_ARENA, 1))
            compiled = dict(zip(sizes, tensors, strict=True))
            networks = _at_once(
                lambda plan: core().import_model(
                    compiled[plan[0]], "CPU", {**options, "INFERENCE_NUM_THREADS": plan[1]}
                ),
                planned,
            )
        except CompilerError as error:
            raise EngineError(f"{file}: {error}.") from None
        except Exception as error:  # of whatever its front end makes of the file
            raise BundleError(f"OpenVINO cannot load {file}: {one_line(error)}") from None
        inputs = [(i.any_name, i.element_type.get_type_name()) for i in networks[0].inputs]
        if inputs != [("images", "u8")]:
            raise BundleError(f"{file} must take one input, `images` of uint8.")
        self._outputs = [output.any_name for output in networks[0].outputs]
        # By size. The last that became free is the next to run: what it needs is still in the
        # caches.
        self._free: dict[int, LifoQueue[InferRequest]] = {size: LifoQueue() for size in sizes}

        def warm_up(sized: tuple[int, CompiledModel]) -> None:
            size, network = sized
            request = network.create_infer_request()
            images = np.zeros((size, *input_size, 3), np.uint8)
            request.infer({"images": images}, share_inputs=True)
            self._free[size].put(request)

        try:
            _at_once(warm_up, zip((size for size, _ in planned), networks, strict=True))
        except Exception as error:
            raise BundleError(
                f"{file} does not take the declared input: {one_line(error)}"
            ) from None

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
        try:
            request = self._free[size].get(timeout=_WAIT_SECONDS)
        except Empty:
            raise TimeoutError("another run hangs") from None
        try:
            values = request.infer({"images": images}, share_inputs=True)
            return {name: values[row][:rows] for row, name in enumerate(self._outputs)}
        finally:
            self._free[size].put(request)


def _tensor(content: memoryview) -> Tensor:
    """A copy, which outlives what it is made of."""
    from openvino import Tensor

    return Tensor(np.frombuffer(content, np.uint8))


def _at_once(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """What some work gives for each item, each in a thread of its own."""
    return [future.result() for future in [begin(partial(work, item)) for item in items]]
