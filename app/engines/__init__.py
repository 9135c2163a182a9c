"""Runtimes that execute a bundle's artifact, behind one small protocol."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.cores import available_cores
from app.settings import Settings
from models.bundle import Artifact, Bundle, BundleError, Outputs, check_golden, golden_batch


class EngineError(Exception):
    """A runtime or a device that is not there; the message says what to do."""


class Engine(Protocol):
    """A loaded network.

    Attributes:
        name: Of the runtime, for metrics and logs.
        device: That it runs on: `cpu` or `cuda:N`.
    """

    name: str
    device: str

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name, float32 [N, ...]."""
        ...


def load_engine(bundle: Bundle, artifact: Artifact, settings: Settings) -> Engine:
    """Load an artifact, and check its outputs against the manifest.

    Raises:
        BundleError: The artifact does not fit its manifest.
        EngineError: The runtime or the device is not there, or a torch artifact is not trusted.
    """
    threads = settings.threads or available_cores()
    if artifact.format == "onnx":
        from app.engines.onnx import OnnxEngine

        engine: Engine = OnnxEngine(bundle.path(artifact), settings.device, threads)
    else:
        if not settings.trust_torch:
            raise EngineError(
                f"{artifact.file} is code, and runs only where you say that you trust it: "
                "set MMTL_TRUST_TORCH=true."
            )
        try:
            from app.engines.pytorch import PytorchEngine
        except ModuleNotFoundError:
            raise EngineError(
                f"{artifact.file} needs torch: install requirements/training.txt, "
                "or serve the ONNX artifact."
            ) from None
        engine = PytorchEngine(bundle.path(artifact), artifact.format, settings.device, threads)
    images = golden_batch(bundle.manifest)
    try:
        outputs = engine.run(images)
    except Exception as error:  # each runtime raises types of its own
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{artifact.file} does not take the declared input: {reason}") from None
    shapes = bundle.manifest.output_shapes()
    check_shapes(
        artifact, outputs, {name: (len(images), *shape[1:]) for name, shape in shapes.items()}
    )
    check_golden(bundle.manifest, artifact, outputs)
    return engine


def check_shapes(
    artifact: Artifact, outputs: Outputs, shapes: Mapping[str, Sequence[int | None]]
) -> None:
    """Compare what an engine answers with what its manifest declares.

    Raises:
        BundleError: An output is missing or has another shape.
    """
    for name, shape in shapes.items():
        found = outputs[name].shape if name in outputs else None
        if found is None or len(found) != len(shape):
            raise BundleError(f"{artifact.file}: output {name} has shape {found}, not {shape}.")
        if any(want is not None and want != have for want, have in zip(shape, found, strict=True)):
            raise BundleError(f"{artifact.file}: output {name} has shape {found}, not {shape}.")
