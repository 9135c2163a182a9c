"""An int8 artifact: a bundle's ONNX network with its backbone in integers, the rest in floats.

Weights are rounded per channel, to seven bits, and activations per tensor (static QDQ, ranges from
training images). What rounding the weights shifts on average is taken back in the biases (Nagel et
al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.2), and
as many of the first convolutions stay in floats as it takes for validation to notice next to
nothing.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import extract_model
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from sklearn.metrics import roc_auc_score

from models.bundle import (
    Artifact,
    Bundle,
    Calibration,
    Golden,
    golden_batch,
    load_bundle,
    melanoma_probability,
    save_bundle,
    sha256_of,
)
from models.calibration import (
    CalibrationError,
    choose_threshold,
    fit_calibration,
    operating_point,
)
from models.recalibration import CARD, METRICS
from training.data.cache import Pixels
from training.data.manifest import DataError
from training.data.vocabulary import Split
from training.export import golden_outputs
from training.half import store_in_half, widen
from training.ood import choose_ood_threshold
from training.run import Run, rows, to_calibrate_on
from training.runners import Runner, onnx_runner, run_batches

FILE = "model.int8.onnx"
CALIBRATION_IMAGES = 256
# On validation, where the float part is chosen; half of what is allowed on the test split.
MOST_FLIPS = 0.005
MOST_AUROC_LOST = 0.003
# Integers round alike on every processor; one that overflowed would be off by far more.
GOLDEN_TOLERANCE = 0.1
# Where a mobile network's blocks end: between them its maps are widest, and dear to round.
_FLOAT_CONVOLUTIONS = (0, 3, 6, 9, 12, 18, 24)
# As export names it: the first weight behind the backbone.
TRUNK_WEIGHT = "network.trunk.0.weight"
_OPERATORS = ("Conv", "Clip", "Relu", "Add")
# Weights of seven bits: a processor without VNNI adds two products in 16 bits, where two of eight
# bits overflow.
_WEIGHT_LEVELS = 64
_BATCH = 16
# Of a probability: what batches of another size change in floats.
_SAME_THRESHOLD = 1e-4

Images = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Cost:
    """What the integers cost on validation, calibration and thresholds fitted anew.

    Attributes:
        float_convolutions: The first so many are left in floats.
        auroc_lost: For melanoma.
        decisions: Share of the images whose decision is another.
        strangeness: Share of the images whose out-of-distribution flag is another.
    """

    float_convolutions: int
    auroc_lost: float
    decisions: float
    strangeness: float

    @property
    def small(self) -> bool:
        """Whether it may be paid."""
        return (
            self.auroc_lost < MOST_AUROC_LOST
            and self.decisions <= MOST_FLIPS
            and self.strangeness <= MOST_FLIPS
        )


def quantize(run: Run, folder: Path) -> tuple[Bundle, list[Cost]]:
    """Add an int8 artifact to a bundle, or replace the one it has; its figures are of another now.

    Args:
        run: Prepared; its training images give the ranges, its validation images the thresholds.
        folder: Of the bundle, whose fp32 ONNX artifact is taken.

    Returns:
        The new bundle, and what was tried; the last is what was taken.

    Raises:
        DataError: No choice of the float part keeps validation as it was, the network is not one of
            convolutions or an ensemble, or the bundle was calibrated on other images.
        models.bundle.BundleError: There is no such bundle.
    """
    bundle = load_bundle(folder)
    precise = bundle.artifact("onnx", "fp32")
    point = bundle.manifest.point(precise)
    if run.load_config().folds > 1:
        raise DataError(
            f"{run.folder} is an ensemble, which is not put in integers: fit one network that has "
            "its bundle as a teacher, and quantize that."
        )
    records, pixels = run.load_data()
    height, width = pixels.shape[1:3]
    if (bundle.manifest.input.height, bundle.manifest.input.width) != (height, width):
        raise DataError(
            f"{folder} looks at {bundle.manifest.input.width} x {bundle.manifest.input.height} "
            f"pixels; the images of {run.folder} have {width} x {height}."
        )
    validation = to_calibrate_on(records, run.load_config())
    melanoma = np.array([bool(records[row].melanoma) for row in validation])
    if len(set(melanoma.tolist())) < 2:
        raise DataError(
            f"{run.manifest} must have validation images with and without melanoma; it has "
            f"{len(validation)} in all."
        )
    train = rows(records, Split.TRAIN)
    chosen = np.random.default_rng(0).choice(train, min(CALIBRATION_IMAGES, len(train)), False)
    examples = np.stack([pixels[row] for row in sorted(chosen.tolist())])
    try:
        before = _judge(onnx_runner(bundle.path(precise)), pixels, validation, melanoma)
    except CalibrationError as error:
        raise DataError(f"{run.folder}, validation split: {error}") from None
    if abs(before.threshold - precise.melanoma_threshold) > _SAME_THRESHOLD:
        raise DataError(
            f"{folder} was calibrated on other images than the validation split of {run.folder}. "
            "Quantize a bundle as it was exported from this run, then recalibrate it."
        )
    tried: list[Cost] = []
    with TemporaryDirectory() as temporary:
        backbone = Backbone(bundle.path(precise), Path(temporary), examples)
        path = Path(temporary) / FILE
        for count in _FLOAT_CONVOLUTIONS:
            backbone.write(path, count)
            try:
                after = _judge(onnx_runner(path), pixels, validation, melanoma, before.above)
            except CalibrationError:  # too far off for any: more has to stay in floats
                continue
            tried.append(
                Cost(
                    count,
                    float(before.auroc - after.auroc),
                    float((before.above != after.above).mean()),
                    float((before.strange != after.strange).mean()),
                )
            )
            if tried[-1].small:
                break
        else:
            raise DataError(
                f"{folder}: in integers this network answers too differently on validation, "
                "however many of its first convolutions stay in floats. Nothing written."
            )
        outputs = onnx_runner(path)(golden_batch(bundle.manifest))
        artifact = Artifact(
            file=FILE,
            format="onnx",
            precision="int8",
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            calibration=after.calibration,
            melanoma_threshold=after.threshold,
            ood_threshold=after.ood_threshold,
            tolerance=GOLDEN_TOLERANCE,
            golden=tuple(
                Golden(seed=golden.seed, outputs=golden_outputs(outputs, row))
                for row, golden in enumerate(bundle.manifest.golden)
            ),
            operating_point=operating_point(
                f"fewest decisions other than {precise.file}'s ({point.criterion})",
                point.dataset,
                melanoma,
                after.above,
            ),
        )
        kept = [a for a in bundle.manifest.artifacts if a.file != FILE]
        # Figures and card are of what a CPU answered with so far.
        files = bundle.files(FILE, METRICS, CARD)
        manifest = bundle.manifest.model_copy(
            update={"artifacts": (*kept, artifact), "metrics": ()}
        )
        return save_bundle(folder, manifest, {**files, FILE: path}), tried


@dataclass(frozen=True)
class _Judged:
    """What an artifact says of the validation images, calibrated and cut on them."""

    auroc: float
    calibration: Calibration
    threshold: float
    ood_threshold: float
    above: NDArray[np.bool_]
    strange: NDArray[np.bool_]


def _judge(
    runner: Runner,
    pixels: Pixels,
    validation: list[int],
    melanoma: NDArray[np.bool_],
    decided: NDArray[np.bool_] | None = None,
) -> _Judged:
    """Calibrate an artifact; its threshold is to decide as another one `decided`, if there is."""
    outputs = run_batches(runner, pixels, validation, _BATCH)
    logits, scores = outputs["melanoma_logit"], outputs["ood_score"]
    calibration = fit_calibration(logits, melanoma)
    probability = melanoma_probability(logits, calibration)
    threshold = (
        choose_threshold(probability, melanoma)
        if decided is None
        else _agreeing_threshold(probability, decided)
    )
    ood_threshold = choose_ood_threshold(scores)
    return _Judged(
        float(roc_auc_score(melanoma, logits)),
        calibration,
        threshold,
        ood_threshold,
        probability >= threshold,
        scores > ood_threshold,
    )


def _agreeing_threshold(probability: NDArray[np.float64], decided: NDArray[np.bool_]) -> float:
    """The threshold at which the fewest images are decided otherwise.

    One chosen anew, at a share of the melanomas, would jump from one of them to the next, and flip
    more decisions than the integers do.
    """
    order = np.argsort(probability)
    values, above = probability[order], decided[order]
    # At or above value i: wrong are those above it that were not, and those below that were.
    wrong = np.cumsum(~above[::-1])[::-1] + np.concatenate([[0], np.cumsum(above)[:-1]])
    starts = np.flatnonzero(np.diff(values, prepend=-1.0))  # nothing parts those that are alike
    best = starts[wrong[starts] == wrong[starts].min()]
    middle = int(best[len(best) // 2])
    below = values[middle - 1] if middle else 0.0
    return float((values[middle] + below) / 2)


class Backbone:
    """The part of an ONNX network before its trunk, and how it is written in integers.

    Args:
        path: Of the network.
        folder: For what is written on the way.
        examples: Training images, uint8 [N, H, W, 3].

    Raises:
        DataError: The network has no trunk, or no convolution before it.
    """

    def __init__(self, path: Path, folder: Path, examples: Images):
        self._whole = onnx.load(path)
        widen(self._whole)
        self._folder = folder
        self._examples = examples
        onnx.save(self._whole, folder / "whole.onnx")
        nodes = self._whole.graph.node
        trunk = next((node for node in nodes if TRUNK_WEIGHT in node.input), None)
        if trunk is None:
            raise DataError(f"{path} is not a network of `mmtl-train export`: it has no trunk.")
        logging.getLogger("root").setLevel(logging.ERROR)  # what it says is not for a user
        self._part = self._extract([trunk.input[0]])
        # What else is read of it: a map on the way is what tells strange images.
        own = {node.name for node in self._part.graph.node}
        read = {name for node in nodes if node.name not in own for name in node.input}
        given = [name for node in self._part.graph.node for name in node.output if name in read]
        self._part = self._extract(given)
        self._convolutions = [n for n in self._part.graph.node if n.op_type == "Conv"]
        if len(self._convolutions) < 2:
            raise DataError(f"{path}: its backbone has no convolutions to put in integers.")
        self._correct_biases(self._input_means())

    def _extract(self, outputs: list[str]) -> onnx.ModelProto:
        """The part of the network that gives these tensors."""
        whole, part = self._folder / "whole.onnx", self._folder / "backbone.onnx"
        extract_model(whole, part, ["images"], outputs, check_model=False)
        return onnx.load(part)

    def write(self, path: Path, float_convolutions: int) -> None:
        """Write the network with all but the first convolutions in integers."""
        corrected, quantized = self._folder / "corrected.onnx", self._folder / "quantized.onnx"
        start = self._convolutions[min(float_convolutions, len(self._convolutions) - 1)].name
        names = [node.name for node in self._part.graph.node]
        chosen = set(names[names.index(start) :])
        model = onnx.ModelProto()
        model.CopyFrom(self._part)
        for initializer in model.graph.initializer:
            for node in self._convolutions:
                if node.name in chosen and initializer.name in self._biases.get(node.name, {}):
                    initializer.CopyFrom(self._biases[node.name][initializer.name])
        onnx.save(model, corrected)
        quantize_static(
            corrected,
            quantized,
            _Reader(self._examples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_quantize=sorted(chosen),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True, "CalibMovingAverageConstant": 0.05},
        )
        joined = self._joined(onnx.load(quantized))
        store_in_half(joined)
        onnx.save(joined, path)

    def _joined(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The backbone in integers and what follows it, as it was."""
        graph, whole = model.graph, self._whole.graph
        own = {node.name for node in self._part.graph.node}
        graph.node.extend(node for node in whole.node if node.name not in own)
        known = {i.name for i in graph.initializer} | {o for n in graph.node for o in n.output}
        needed = {name for node in graph.node for name in node.input} - known
        graph.initializer.extend(i for i in whole.initializer if i.name in needed)
        del graph.output[:]
        graph.output.extend(whole.output)
        return model

    def _input_means(self) -> dict[str, NDArray[np.float64]]:
        """The mean of every channel that a convolution reads, over the examples."""
        model = onnx.ModelProto()
        model.CopyFrom(self._part)
        names = list(dict.fromkeys(node.input[0] for node in self._convolutions))
        del model.graph.output[:]
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
        )
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        sums: list[NDArray[np.float64]] = [np.zeros(())] * len(names)
        batches = np.array_split(self._examples, len(self._examples) // _BATCH or 1)
        for batch in batches:
            values = session.run(names, {"images": batch})
            sums = [s + v.mean((0, 2, 3), np.float64) for s, v in zip(sums, values, strict=True)]
        return {name: s / len(batches) for name, s in zip(names, sums, strict=True)}

    def _correct_biases(self, means: dict[str, NDArray[np.float64]]) -> None:
        """By node: its bias, less what rounding its weights adds on average."""
        tensors = {i.name: i for i in self._part.graph.initializer}
        self._biases: dict[str, dict[str, TensorProto]] = {}
        for node in self._convolutions:
            if len(node.input) < 3:
                continue
            weight = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
            scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / _WEIGHT_LEVELS
            scale[scale == 0] = 1  # of a dead channel
            added = (np.round(weight / scale) * scale - weight).sum(axis=(2, 3))
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            # Of each group the rows that it writes, times the channels that it reads.
            read = means[node.input[0]].reshape(groups, 1, -1)
            shift = (added.reshape(groups, -1, added.shape[1]) * read).sum(axis=2).ravel()
            bias = numpy_helper.to_array(tensors[node.input[2]])
            corrected = (bias - shift).astype(np.float32)
            self._biases[node.name] = {
                node.input[2]: numpy_helper.from_array(corrected, node.input[2])
            }


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Images in batches, as ONNX Runtime asks for them."""

    def __init__(self, images: Images):
        self._batches: Iterator[Images] = iter(np.array_split(images, len(images) // _BATCH or 1))

    def get_next(self) -> dict[str, Images] | None:
        """The next feed."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}
