"""Runtimes that execute a bundle's artifact, behind one small protocol."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from app.engines.graphs import Busy
from app.settings import PREFIX, Settings
from models.bundle import (
    Artifact,
    Bundle,
    BundleError,
    Outputs,
    check_golden,
    golden_batch,
)
from models.cores import multiplies_bfloat16

# Images in one run on a CPU; more of them take more memory than they gain.
BATCH_ON_CPU = 4
# Each takes memory of its own in OpenVINO; on more cores there should be several processes.
_MOST_THREADS = 8
# A tensor's entry for the file that holds it (`TensorProto.external_data` of onnx.proto): the first
# field of a protocol buffer's message. Its number and its length may be written longer than needed.
_OUTSIDE = re.compile(rb"(?:\n|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")
# As CUDA, ONNX Runtime and torch say it.
_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate memory", re.IGNORECASE)
# Characters of what a runtime says.
_SAID_FIRST, _SAID_LAST, _CUT = 60, 160, " … "
log = structlog.get_logger()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a runtime says that it lacks memory, on a GPU most likely."""
    return _OUT_OF_MEMORY.search(str(error)) is not None


def one_line(reason: object) -> str:
    """What a runtime says, shortened: often a path of its source begins it, and the cause ends it.

    Args:
        reason: An error, or its text.
    """
    text = " ".join(str(reason).split())
    short = text[:_SAID_FIRST] + _CUT + text[-_SAID_LAST:]
    return text if len(text) <= len(short) else short


class EngineError(Exception):
    """A runtime or a device that is not there; the message says what to do."""


def warm_up_failed() -> EngineError:
    """What to say of a network that fails before it has answered anything."""
    return EngineError(
        "The network failed while it was warmed up: the log says why. Check the bundle with "
        "`mmtl bundle verify`, or set another MMTL_DEVICE or MMTL_RUNTIME."
    )


class Engine(Protocol):
    """A loaded network.

    Attributes:
        name: Of the runtime, for metrics and logs.
        device: That it runs on: `cpu` or `cuda:N`.
        runs_at_once: Threads that call `run` at the same time: on the CPU one a core where the
            runtime's own threads would wait for each other; on a GPU two, so that one batch is
            prepared while another runs.
        helpers: Worker threads beyond one a core: on a GPU, those that run it; on the CPU one at
            most, for the core that the others leave idle while they wait for the GIL.
        batch: Most images in one run.
        rounding: What it rounds otherwise than the runtime that the artifact was made with, as a
            share of a golden output's largest value, or of 1 where that is smaller.
    """

    name: str
    device: str
    runs_at_once: int
    helpers: int
    batch: int
    rounding: float

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """uint8 [N, H, W, 3] -> each output by name, float32 [N, ...]."""
        ...

    def run_alone(self, images: NDArray[np.uint8]) -> Outputs:
        """The same, while nothing else is to be done: it may use more cores than one."""
        ...


def open_engine(bundle: Bundle, settings: Settings) -> tuple[Artifact, Engine]:
    """The engine that the settings ask for, and the artifact that it runs.

    Where no precision is asked for, a CPU runs the int8 artifact of a bundle that has one, and one
    that multiplies bfloat16 numbers runs it in OpenVINO, unless a runtime is asked for, or more
    than eight threads. What does not answer here as it did when it was made (not every processor
    multiplies integers without overflow) is passed over.

    Raises:
        BundleError: The bundle has no such artifact, or the artifact does not fit its manifest.
        EngineError: The runtime or the device is not there, or a torch artifact is not trusted.
    """
    *preferred, last = _choices(bundle, settings)
    for artifact, chosen in preferred:
        try:
            return artifact, load_engine(bundle, artifact, chosen)
        except (BundleError, EngineError) as error:
            if isinstance(error, EngineError) and chosen is settings:  # it was asked for
                raise
            log.warning(
                "passed over", file=artifact.file, runtime=chosen.runtime, reason=str(error)
            )
    return last[0], load_engine(bundle, *last)


def _choices(bundle: Bundle, settings: Settings) -> list[tuple[Artifact, Settings]]:
    """What may be run, and how: the fastest first.

    Raises:
        BundleError: The bundle has no such artifact.
    """
    asked = None if settings.precision == "auto" else settings.precision
    first = bundle.artifact(settings.artifact, asked)
    if settings.artifact != "onnx" or asked is not None:
        return [(first, settings)]
    # In whatever order a manifest has them.
    there = [
        a for a in bundle.manifest.artifacts if a.format == "onnx" and bundle.path(a).is_file()
    ]
    if not _on_cpu(settings):
        in_floats = [a for a in there if a.precision != "int8"]
        in_floats.sort(key=lambda artifact: artifact.precision != "fp32")
        return [(next(iter(in_floats), first), settings)]
    fastest = bundle.artifact_for_cpu()
    choices = [(fastest, settings)] + [(a, settings) for a in there if a != fastest]
    if fastest.precision == "int8" and settings.runtime == "auto" and _prefers_openvino(settings):
        choices.insert(0, (fastest, settings.model_copy(update={"runtime": "openvino"})))
    return choices


def _prefers_openvino(settings: Settings) -> bool:
    """Whether OpenVINO is there, and the faster for integers, in memory that is not much."""
    few = settings.cores <= _MOST_THREADS
    return few and multiplies_bfloat16() and find_spec("openvino") is not None


def _on_cpu(settings: Settings) -> bool:
    """Whether an ONNX artifact is run on a CPU."""
    if settings.device == "cpu" or settings.runtime == "openvino":
        return True
    if settings.device != "auto":
        return False
    if not _knows_cuda():
        return True
    return not _finds_gpu()


@cache
def _finds_gpu() -> bool:
    """Whether the first GPU can be used; said once, where a runtime is there that could."""
    from app.engines.cuda import why_not

    if (reason := why_not(0)) is not None:
        log.warning("no GPU", setting=f"{PREFIX}DEVICE=auto", reason=reason)
    return reason is None


def _knows_cuda() -> bool:
    """Whether ONNX Runtime was built with CUDA: seen from its files, as to load it takes memory."""
    found = find_spec("onnxruntime")
    folders = (found and found.submodule_search_locations) or []
    name = "*onnxruntime_providers_cuda*"
    return any(any(Path(folder, "capi").glob(name)) for folder in folders)


def load_engine(bundle: Bundle, artifact: Artifact, settings: Settings) -> Engine:
    """Load an artifact, and check its outputs against the manifest.

    Raises:
        BundleError: The artifact does not fit its manifest.
        EngineError: The runtime or the device is not there, or a torch artifact is not trusted.
    """
    engine = _load(bundle, artifact, settings)
    images = golden_batch(bundle.manifest)
    declared = bundle.manifest.output_shapes()

    def run_one_by_one(images: NDArray[np.uint8]) -> Outputs:
        answers = [engine.run_alone(images[row : row + 1]) for row in range(len(images))]
        return {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}

    # What runs a whole batch may be another network than what runs an image that is alone.
    whole = images.take(range(max(len(images), engine.batch)), axis=0, mode="wrap")
    for batch, run in ((whole, engine.run), (images, run_one_by_one)):
        shapes = {name: (len(batch), *shape[1:]) for name, shape in declared.items()}
        try:
            outputs = run(batch)
        except Busy as error:
            raise EngineError(str(error)) from None
        except Exception as error:  # each runtime raises types of its own
            if is_out_of_memory(error):
                raise EngineError(
                    f"There is too little memory for {artifact.file} on {engine.device}: set a "
                    f"smaller {PREFIX}MAX_BATCH, or fewer {PREFIX}PROCESSES, which each hold the "
                    f"network ({one_line(error)})."
                ) from None
            message = f"{artifact.file} does not take the declared input: {one_line(error)}"
            raise BundleError(message) from None
        check_shapes(artifact, outputs, shapes)
        check_golden(bundle.manifest, artifact, outputs, engine.rounding)
    return engine


def _load(bundle: Bundle, artifact: Artifact, settings: Settings) -> Engine:
    threads = settings.cores
    if artifact.format == "onnx" and settings.runtime == "openvino":
        if settings.device.startswith("cuda"):
            raise EngineError(
                f"MMTL_DEVICE={settings.device}: OpenVINO runs on the CPU here. "
                "Leave MMTL_RUNTIME out, or MMTL_DEVICE."
            )
        from app.engines.openvino import OpenVinoEngine

        # Who names a precision gets the same answers from every processor, up to rounding.
        bfloat16 = settings.precision == "auto" and multiplies_bfloat16()
        size = bundle.manifest.input.height, bundle.manifest.input.width
        return OpenVinoEngine(
            artifact.file, _read_onnx(bundle, artifact), size, threads, bfloat16, settings.max_batch
        )
    if artifact.format == "onnx" and _on_cpu(settings):
        from app.engines.onnx import OnnxEngine

        return OnnxEngine(artifact.file, _read_onnx(bundle, artifact), threads, settings.max_batch)
    if artifact.format == "onnx":
        from app.engines.cuda import CudaEngine

        number = 0 if settings.device == "auto" else int(settings.device.removeprefix("cuda:"))
        return CudaEngine(artifact.file, _read_onnx(bundle, artifact), number, settings.max_batch)
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
    return PytorchEngine(
        artifact.file,
        bundle.read(artifact),
        artifact.format,
        settings.device,
        threads,
        settings.max_batch,
    )


def _read_onnx(bundle: Bundle, artifact: Artifact) -> bytes:
    content = bundle.read(artifact)
    if _OUTSIDE.search(content):
        raise BundleError(
            f"{artifact.file} keeps weights in a file of their own, which no hash is of: save it "
            "with all of them inside."
        )
    return content


def check_shapes(
    artifact: Artifact, outputs: Outputs, shapes: Mapping[str, Sequence[int | None]]
) -> None:
    """Compare what an engine answers with what its manifest declares.

    Raises:
        BundleError: An output is missing or has another shape.
    """
    for name, shape in shapes.items():
        found = outputs[name].shape if name in outputs else None
        if (
            found is None
            or len(found) != len(shape)
            or any(want not in (None, have) for want, have in zip(shape, found, strict=True))
        ):
            raise BundleError(f"{artifact.file}: output {name} has shape {found}, not {shape}.")
