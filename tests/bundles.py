"""A bundle whose network is a known function of the picture's mean colour."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.bundle import (
    Artifact,
    Bundle,
    Calibration,
    DataSource,
    Golden,
    InputSpec,
    Manifest,
    OperatingPoint,
    Task,
    TrainingData,
    golden_image,
    save_bundle,
    sha256_of,
)

SIDE = 32
AGE_LABELS = ("0-29", "30-44", "45-59", "60-74", "75+")
SITES = ("head/neck", "torso")
THRESHOLD = 0.5
OOD_THRESHOLD = 200.0


def logit_of(red: float) -> float:
    """What the test network answers for a picture of this mean red."""
    return (red - 128) / 16


def expected_outputs(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    means = images.astype(np.float32).mean(axis=(1, 2))
    count = len(images)
    ages = np.tile(np.float32([0.1, 0.2, 0.4, 0.2, 0.1]), (count, 1))
    return {
        "melanoma_logit": (means[:, 0] - 128) / 16,
        "age": ages,
        "age_years": np.full(count, 52.0, np.float32),
        "site": np.tile(np.float32([0.25, 0.75]), (count, 1)),
        "melanoma_map": ((images[:, ::8, ::8, 0].astype(np.float32)) - 128) / 16,
        "ood_score": means[:, 1],
    }


def network(note: str = "") -> bytes:
    """The network as ONNX, written node by node; a note in it makes it other bytes."""
    constants = {
        "spatial": np.array([1, 2], np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "half": np.float32(128),
        "sixteen": np.float32(16),
        "nothing": np.float32(0),
        "years": np.float32(52),
        "ages": np.float32([[0.1, 0.2, 0.4, 0.2, 0.1]]),
        "sites": np.float32([[0.25, 0.75]]),
        "column": np.array([1], np.int64),
        "starts": np.array([0, 0], np.int64),
        "ends": np.array([SIDE, SIDE], np.int64),
        "steps": np.array([8, 8], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        node("ReduceMean", ["float", "spatial"], ["means"], keepdims=0),
        node("Gather", ["means", "zero"], ["red"], axis=1),
        node("Gather", ["means", "one"], ["ood_score"], axis=1),
        node("Sub", ["red", "half"], ["centred"]),
        node("Div", ["centred", "sixteen"], ["melanoma_logit"]),
        node("Mul", ["red", "nothing"], ["zeros"]),
        node("Add", ["zeros", "years"], ["age_years"]),
        node("Unsqueeze", ["zeros", "column"], ["rows"]),
        node("Add", ["rows", "ages"], ["age"]),
        node("Add", ["rows", "sites"], ["site"]),
        node("Gather", ["float", "zero"], ["plane"], axis=3),
        node("Slice", ["plane", "starts", "ends", "spatial", "steps"], ["coarse"]),
        node("Sub", ["coarse", "half"], ["coarse_centred"]),
        node("Div", ["coarse_centred", "sixteen"], ["melanoma_map"]),
    ]
    shapes: dict[str, list[str | int]] = {
        "melanoma_logit": ["n"],
        "age": ["n", 5],
        "age_years": ["n"],
        "site": ["n", 2],
        "melanoma_map": ["n", 4, 4],
        "ood_score": ["n"],
    }
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.doc_string = note
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make_manifest(artifact: Path) -> Manifest:
    outputs = expected_outputs(np.stack([golden_image(0, SIDE, SIDE)]))
    return Manifest(
        name="test",
        version="1.2.3",
        description="A test.",
        input=InputSpec(height=SIDE, width=SIDE),
        tasks=(
            Task(name="melanoma", kind="binary", labels=("no", "yes")),
            Task(name="age", kind="ordinal", labels=AGE_LABELS, bin_edges=(30, 45, 60, 75)),
            Task(name="site", kind="categorical", labels=SITES),
        ),
        artifacts=(
            Artifact(
                file=artifact.name,
                format="onnx",
                precision="fp32",
                bytes=artifact.stat().st_size,
                sha256=sha256_of(artifact),
                calibration=Calibration(slope=1.0, intercept=0.0),
                melanoma_threshold=THRESHOLD,
                ood_threshold=OOD_THRESHOLD,
                tolerance=1e-2,
            ),
        ),
        prevalence=0.1,
        operating_point=OperatingPoint(
            criterion="a test",
            dataset="a test",
            images=2,
            melanomas=1,
            sensitivity=1.0,
            specificity=1.0,
        ),
        training_data=TrainingData(
            fingerprint="0" * 64,
            sources=(DataSource(name="drawn", licence="none", url="none", images=1),),
            licence="none",
        ),
        golden=(
            Golden(
                seed=0,
                outputs={
                    name: tuple(np.ravel(values[0]).astype(float).tolist())
                    for name, values in outputs.items()
                },
            ),
        ),
    )


def make_bundle(folder: Path, **fields: object) -> Bundle:
    """Of the manifest above, but for these fields."""
    artifact = folder.parent / "model.onnx"
    artifact.write_bytes(network())
    manifest = make_manifest(artifact).model_copy(update=fields)
    return save_bundle(folder, manifest, {artifact.name: artifact})
