"""Run an artifact on pixels: uint8 [N, H, W, 3] in, the outputs by name out."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from models.bundle import ArtifactFormat, Outputs
from training.data.cache import Pixels

Runner = Callable[[NDArray[np.uint8]], Outputs]


@contextmanager
def torchscript() -> Iterator[None]:
    """TorchScript without its warnings: deprecated upstream, and still asked for by its users."""
    with warnings.catch_warnings():
        # Which map is looked at (training/feature_maps.py) depends on its shape, which is fixed.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", TracerWarning)
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
        yield


def eager(served: nn.Module) -> Runner:
    """Run a torch program that returns the outputs by name."""

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> Outputs:
        values: Mapping[str, Tensor] = served(torch.from_numpy(images))
        return {name: value.numpy() for name, value in values.items()}

    return run


def onnx_runner(path: Path) -> Runner:
    """Run an ONNX artifact, as the service does."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: NDArray[np.uint8]) -> Outputs:
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return run


def open_runner(artifact_format: ArtifactFormat, path: Path) -> Runner:
    """Load an artifact that was written here."""
    if artifact_format == "onnx":
        return onnx_runner(path)
    if artifact_format == "torch_export":
        return eager(torch.export.load(path).module())
    with torchscript():
        return eager(torch.jit.load(path))  # type: ignore[no-untyped-call]  # torch's own gap


def run_batches(
    runner: Runner, pixels: Pixels, positions: list[int], batch_size: int
) -> dict[str, NDArray[np.float32]]:
    """The outputs for some images, by name, float32 [len(positions), ...]."""
    parts = [runner(batch.numpy()) for batch in batches(pixels, positions, batch_size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batches(pixels: Pixels, positions: list[int], size: int) -> Iterator[Tensor]:
    """uint8 [n, H, W, 3] at a time."""
    for start in range(0, len(positions), size):
        batch: NDArray[np.uint8] = np.stack([pixels[i] for i in positions[start : start + size]])
        yield torch.from_numpy(batch)
