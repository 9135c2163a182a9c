"""PyTorch: TorchScript and torch.export artifacts, for those who trust them."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch.export.passes import move_to_device_pass

from app.engines import BATCH_ON_CPU, EngineError, one_line
from app.engines.graphs import Graphs, Run, alone
from models.bundle import ArtifactFormat, BundleError, Outputs

log = structlog.get_logger()


class PytorchEngine:
    """A TorchScript or torch.export program; on a GPU in CUDA graphs, where it fits into them.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        artifact_format: Which of the two.
        device: `auto`, `cpu` or `cuda:N`.
        threads: Within one run, on the CPU.
        max_batch: Most images in one run.

    Raises:
        BundleError: The file is not such a program.
        EngineError: A GPU is asked for and is not there.
    """

    rounding = 0.0

    def __init__(
        self,
        file: str,
        content: bytes,
        artifact_format: ArtifactFormat,
        device: str,
        threads: int,
        max_batch: int,
    ):
        available = torch.cuda.device_count()
        if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= available:
            raise EngineError(
                f"MMTL_DEVICE={device}: torch finds {available} GPUs here. Leave it out, or name "
                "one that is there."
            )
        self.name: str = artifact_format
        self.device = device if device != "auto" else ("cuda:0" if available else "cpu")
        on_gpu = self.device != "cpu"
        self.runs_at_once = self.helpers = 2 if on_gpu else 1
        self.batch = max_batch if on_gpu else min(BATCH_ON_CPU, max_batch)
        torch.set_num_threads(threads)
        # Their TensorFloat-32 moves an age by days.
        torch.backends.cudnn.allow_tf32 = False
        try:
            if artifact_format == "torchscript":
                self._program = torch.jit.load(BytesIO(content), map_location=self.device)  # type: ignore[no-untyped-call]  # torch's own gap
            else:
                program = torch.export.load(BytesIO(content))
                if on_gpu:  # constants within it, too, which `to` leaves behind
                    program = move_to_device_pass(program, self.device)
                self._program = program.module()
        except Exception as error:  # either loader raises whatever its unpickler does
            raise BundleError(f"torch cannot load {file}: {one_line(error)}") from None
        self._graphs = Graphs(max_batch) if on_gpu else None

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        if self._graphs is not None:
            return self._graphs.run(images, self._record)
        return _run(self._program, self.device, images)

    run_alone = run

    def _record(self, images: NDArray[np.uint8]) -> Run:
        try:
            return self._graph(images)
        except RuntimeError as error:  # it waits for the CPU, as a traced program may
            log.warning("no CUDA graph", images=len(images), reason=one_line(error))
            return partial(_run, self._program, self.device)

    def _graph(self, images: NDArray[np.uint8]) -> Run:
        # Or what torch waits for in between would be the first GPU, where it may not even run.
        with torch.inference_mode(), torch.cuda.device(self.device):
            return self._recorded(images)

    def _recorded(self, images: NDArray[np.uint8]) -> Run:
        taken = torch.from_numpy(images).to(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's own gap
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # what it sets up only once is not recorded
                self._program(taken)
        graph = torch.cuda.CUDAGraph()
        with alone(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            given = self._program(taken)

        @torch.inference_mode()
        def run(images: NDArray[np.uint8]) -> Outputs:
            with torch.cuda.stream(stream):
                taken.copy_(torch.from_numpy(images))
                graph.replay()
                return {name: value.float().cpu().numpy() for name, value in given.items()}

        return run


@torch.inference_mode()
def _run(program: Callable[..., Any], device: str, images: NDArray[np.uint8]) -> Outputs:
    values = program(torch.from_numpy(images).to(device))
    return {name: value.float().cpu().numpy() for name, value in values.items()}
