"""OpenVINO, on CPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.engines import BATCH_ON_CPU, EngineError
from app.engines.compiler import CORE, CompilerError, compile_apart, one_line
from models.bundle import BundleError, Outputs
from models.cores import has_amx
from models.memory import limit_arenas

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest, Tensor

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Eight bits of a bfloat16, through some fifty layers; and integers, which it adds up otherwise.
_ROUNDED_BFLOAT16, _ROUNDED = 2**-4, 2**-6
# Images of a whole run with AMX, and the share of a whole run from which on one that is filled up
# takes less time than single images. Each size takes memory, for code made for it: there are no
# others than these.
_WHOLE_WITH_AMX = 8
_WORTH_FILLING = 3 / 4
# Cores of a run that is alone, without AMX.
_LONE_CORES = 2
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
        EngineError: It cannot be compiled here, whatever it is.
    """

    device = "cpu"

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
        # With AMX a run takes so little that larger ones are worth their memory, and that one more
        # worker would only make the others wait longer.
        amx = has_amx()
        self.helpers = 0 if amx else 1
        self.batch = min(_WHOLE_WITH_AMX if amx else BATCH_ON_CPU, max_batch)
        limit_arenas(max(threads // _THREADS_PER_ARENA, 1))
        options = {
            "NUM_STREAMS": 1,
            # Instances on one host would all be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        }
        # A network for each thread, as those that share one wait for each other's streams. One has
        # two cores, for a run that is alone: a further network would take memory, and under load
        # the others run first.
        cores = [1 if amx else min(_LONE_CORES, threads)] + [1] * (threads - 1)
        try:
            compiled = compile_apart(content, options)  # once, as that takes the longest
            each = _at_once(lambda count: _imported(compiled, options, count), cores)
        except CompilerError as error:
            raise EngineError(f"{file}: {error}.") from None
        except Exception as error:  # of whatever its front end makes of the file
            raise BundleError(f"OpenVINO cannot load {file}: {one_line(error)}") from None
        inputs = [(i.any_name, i.element_type.get_type_name()) for i in each[0].inputs]
        if inputs != [("images", "u8")]:
            raise BundleError(f"{file} must take one input, `images` of uint8.")
        self._outputs = [output.any_name for output in each[0].outputs]
        try:
            free = _at_once(lambda network: self._warmed(network, input_size), each)
        except Exception as error:
            raise BundleError(
                f"{file} does not take the declared input: {one_line(error)}"
            ) from None
        # The one for a run that is alone is the first while it is free. Of the others the last is
        # the next to run: what it needs is still in the caches.
        self._free, self._lone = free, free[0]
        self._freed = threading.Condition()

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        return self._run(images, alone=False)

    def run_alone(self, images: NDArray[np.uint8]) -> Outputs:
        """The same, on two cores where there are two, without AMX."""
        return self._run(images, alone=True)

    def _run(self, images: NDArray[np.uint8], alone: bool) -> Outputs:
        parts: list[Outputs] = []
        while len(images):
            size = self.batch if len(images) >= self.batch * _WORTH_FILLING else 1
            parts.append(self._run_at_once(images[:size], size, alone))
            images = images[size:]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _warmed(self, network: CompiledModel, input_size: tuple[int, int]) -> InferRequest:
        """A request of a network, with code for each size of its runs."""
        request = network.create_infer_request()
        for size in (self.batch, 1):
            images = np.zeros((size, *input_size, 3), np.uint8)
            request.infer({"images": images}, share_inputs=True)
        return request

    def _run_at_once(self, images: NDArray[np.uint8], size: int, alone: bool) -> Outputs:
        """Their outputs, of a run of that size."""
        rows = len(images)
        if rows < size:
            filler = np.zeros((size - rows, *images.shape[1:]), np.uint8)
            images = np.concatenate([images, filler])
        with self._freed:
            self._freed.wait_for(lambda: self._free)
            request = self._free.pop(0 if alone else -1)
        try:
            values = request.infer({"images": images}, share_inputs=True)
            return {name: values[row][:rows] for row, name in enumerate(self._outputs)}
        finally:
            with self._freed:
                self._free.insert(0 if request is self._lone else len(self._free), request)
                self._freed.notify()


def _imported(compiled: Tensor, options: Mapping[str, object], cores: int) -> CompiledModel:
    return CORE.import_model(compiled, "CPU", {**options, "INFERENCE_NUM_THREADS": cores})


def _at_once(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """What some work gives for each item, in threads that keep no process alive if they hang."""

    def do(item: _Item, future: Future[_Result]) -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:
            future.set_exception(error)

    futures: list[Future[_Result]] = [Future() for _ in items]
    for item, future in zip(items, futures, strict=True):
        threading.Thread(target=do, args=[item, future], daemon=True).start()
    return [future.result() for future in futures]
