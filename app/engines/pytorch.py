"""PyTorch: TorchScript and torch.export artifacts, for those who trust them."""

from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray

from app.engines import EngineError
from models.bundle import ArtifactFormat, BundleError, Outputs


class PytorchEngine:
    """A TorchScript or torch.export program.

    Args:
        file: Name of the artifact's file, for messages.
        content: Of that file, verified.
        artifact_format: Which of the two.
        device: `auto`, `cpu` or `cuda:N`.
        threads: Within one run, on the CPU.

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
    ):
        available = torch.cuda.device_count()
        if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= available:
            raise EngineError(f"MMTL_DEVICE={device}: torch finds {available} GPUs here.")
        self.name: str = artifact_format
        self.device = device if device != "auto" else ("cuda:0" if available else "cpu")
        self.runs_at_once = 1 if self.device == "cpu" else 2
        torch.set_num_threads(threads)
        try:
            if artifact_format == "torchscript":
                self._program = torch.jit.load(BytesIO(content), map_location=self.device)  # type: ignore[no-untyped-call]  # torch's own gap
            else:
                self._program = torch.export.load(BytesIO(content)).module().to(self.device)
        except Exception as error:  # either loader raises whatever its unpickler does
            raise BundleError(f"torch cannot load {file}: {error}") from None

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name."""
        values = self._program(torch.from_numpy(images).to(self.device))
        return {name: value.float().cpu().numpy() for name, value in values.items()}
