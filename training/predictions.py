"""What a model says of a manifest's images: from a bundle, or from a table of anybody's."""

import csv
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from models.bundle import Bundle, Precision, melanoma_probability
from models.files import write_atomically
from models.images import ImageError, decode
from models.recalibration import LOGIT, PROBABILITY, fitted_to_outcomes
from training.data.layouts import name_of, without_suffix
from training.data.manifest import DataError, Record, isic_id, open_table
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import Diagnosis, Sex, Site
from training.runners import Runner, onnx_runner

BATCH_SIZE = 32

_AGES = re.compile(r"(\d+)(?:-(\d+)|\+)")

Floats = NDArray[np.floating]
_WORDS: dict[str, type[Site] | type[Sex] | type[Diagnosis]] = {
    "site": Site,
    "sex": Sex,
    "diagnosis": Diagnosis,
}


@dataclass(frozen=True)
class Predictions:
    """A model's answers, row for row with the records.

    Attributes:
        model: What a person calls the model.
        records: The images.
        probability: Calibrated probability of melanoma, float [N].
        threshold: At or above which an image is called melanoma.
        outputs: Probabilities of other tasks' labels, float [N, K], by task.
        labels: Their labels, in order, by task.
        age_edges: The first age, in years, of every age bin but the first.
        logit: Uncalibrated, float [N], where it is known.
        age_years: Expected age, float [N], where it is predicted.
        ood_score: Float [N], where it is predicted.
        sha256: Of the artifact.
        trained_on: Names of the datasets that the model was learned from, where they are known.
        data_fingerprint: Of the manifest that it was fitted with, where that is known.
        fitted_to_outcomes: Whether its bundle was recalibrated on outcomes, as far as is known.
    """

    model: str
    records: Sequence[Record]
    probability: Floats
    threshold: float
    outputs: dict[str, Floats] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    age_edges: tuple[float, ...] = ()
    logit: Floats | None = None
    age_years: Floats | None = None
    ood_score: Floats | None = None
    sha256: str | None = None
    trained_on: tuple[str, ...] = ()
    data_fingerprint: str | None = None
    fitted_to_outcomes: bool = False


def predict(
    bundle: Bundle,
    records: Sequence[Record],
    precision: Precision | None = None,
    run: Runner | None = None,
) -> Predictions:
    """Run a bundle's ONNX artifact on image files, decoded as the service decodes them.

    Args:
        bundle: Whose artifact.
        records: The images.
        precision: Of the artifact; None for the one that a CPU serves.
        run: That runs it; None for ONNX Runtime.

    Raises:
        BundleError: The bundle has no such artifact.
        DataError: An image cannot be read.
    """
    manifest = bundle.manifest
    artifact = bundle.artifact("onnx", precision) if precision else bundle.artifact_for_cpu()
    run = run or onnx_runner(bundle.path(artifact))
    size = manifest.input.height, manifest.input.width

    def read(record: Record) -> NDArray[np.uint8]:
        try:
            return decode(Path(record.path).read_bytes(), *size).pixels
        except (OSError, ImageError) as error:
            raise DataError(f"{record.path or record.image}: {error}") from None

    parts = []
    bar = tqdm(total=len(records), desc="predict", unit="image")
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(records), BATCH_SIZE):
            batch = list(pool.map(read, records[start : start + BATCH_SIZE]))
            parts.append(run(np.stack(batch)))
            bar.update(len(batch))
    bar.close()
    if not parts:
        raise DataError("There is no image to predict.")
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    tasks = [task for task in manifest.tasks if task.kind != "binary"]
    age = manifest.task("age")
    return Predictions(
        model=f"{manifest.name} {manifest.version}",
        records=records,
        probability=melanoma_probability(found[LOGIT], artifact.calibration),
        threshold=artifact.melanoma_threshold,
        outputs={task.name: found[task.name] for task in tasks},
        labels={task.name: task.labels for task in tasks},
        age_edges=(age.bin_edges or ()) if age else (),
        logit=found[LOGIT],
        age_years=found["age_years"],
        ood_score=found["ood_score"],
        sha256=artifact.sha256,
        trained_on=tuple(source.name for source in manifest.training_data.sources),
        data_fingerprint=manifest.training_data.fingerprint,
        fitted_to_outcomes=fitted_to_outcomes(manifest),
    )


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write one row an image: ids, truth, and everything that was predicted."""
    columns: dict[str, Sequence[object]] = {
        name: [getattr(record, name) for record in predictions.records]
        for name in ("image", "dataset", "split", "component")
    }
    columns["melanoma"] = [
        "" if record.melanoma is None else int(record.melanoma) for record in predictions.records
    ]
    if predictions.logit is not None:
        columns[LOGIT] = _written(predictions.logit)
    columns[PROBABILITY] = _written(predictions.probability)
    for task, values in predictions.outputs.items():
        for number, label in enumerate(predictions.labels[task]):
            columns[f"{task}:{label}"] = _written(values[:, number])
    for name in ("age_years", "ood_score"):
        if (values := getattr(predictions, name)) is not None:
            columns[name] = _written(values)
    with write_atomically(path) as temporary, open_table(temporary) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def load_predictions(path: Path, records: Sequence[Record], threshold: float) -> Predictions:
    """Read a table of predictions: `image`, `melanoma_probability` and, optionally, more.

    Further columns are as `save_predictions` writes them: `age:0-29`, `site:torso`, ...

    Args:
        path: A CSV file.
        records: The images that are asked about; those without a row are left out.
        threshold: That was frozen for this model.

    Raises:
        DataError: The table does not fit, or has a row for none of the images.
    """
    faults = Faults()
    rows: dict[tuple[str | None, str], Row] = {}
    # Datasets whose pictures have a suffix may name them without.
    bare: dict[tuple[str | None, str], list[Row]] = {}
    for line in read_rows(path, {"image", PROBABILITY}, faults):
        image = line.required("image") or ""
        dataset, key = line.text("dataset"), _key(image)
        if rows.setdefault((dataset, key), line) is not line:
            faults.add("repeated row", f"{line.where(('image',))}: {image} stands in two rows.")
        bare.setdefault((dataset, without_suffix(key)), []).append(line)
    if faults:
        raise DataError(faults[0].message)

    def row_of(record: Record) -> Row | None:
        image = _key(record.image)
        for key in ((record.dataset, image), (None, image)):
            if key in rows:
                return rows[key]
            if len(called_so := bare.get(key, [])) == 1:
                return called_so[0]
        return None

    found = [(record, row) for record in records if (row := row_of(record))]
    if not found:
        raise DataError(f"{path} has a row for none of the {len(records):,} images asked about.")
    answered: dict[int, Record] = {}
    for record, row in found:
        other = answered.setdefault(row.number, record)
        if other.dataset != record.dataset and not isic_id(record.image):
            raise DataError(
                f"{row.where(('image',))}: {other.dataset} and {record.dataset} both have an image "
                f"{row.text('image')}. Say which is meant in a column `dataset`."
            )
    columns = list(found[0][1].cells)

    def numbers(column: str, most: float | None = None) -> Floats:
        values = np.empty(len(found))
        for position, (_, row) in enumerate(found):
            try:
                values[position] = float(row.cells[column] or "")
            except ValueError:
                values[position] = np.nan
            value = values[position]
            if not np.isfinite(value) or (most == 1 and not 0 <= value <= 1):
                raise DataError(
                    f"{row.where((column,))}: {row.cells[column]!r} is not "
                    + ("a probability." if most == 1 else "a number.")
                )
        return values

    labels: dict[str, tuple[str, ...]] = {}
    for column in columns:
        task, mark, label = column.partition(":")
        if mark:
            # Another word for what the truth calls so would leave those images out, unsaid.
            if task in _WORDS and label not in (words := [str(word) for word in _WORDS[task]]):
                raise DataError(
                    f"{path}: the column {column} is none of {task}: {', '.join(words)}."
                )
            labels[task] = (*labels.get(task, ()), label)
    return Predictions(
        model=path.stem,
        records=[record for record, _ in found],
        probability=numbers(PROBABILITY, 1),
        threshold=threshold,
        outputs={
            task: np.stack([numbers(f"{task}:{label}", 1) for label in names], axis=1)
            for task, names in labels.items()
        },
        labels=labels,
        age_edges=_edges(labels.get("age", ())),
        logit=numbers(LOGIT) if LOGIT in columns else None,
        age_years=numbers("age_years") if "age_years" in columns else None,
    )


def _edges(labels: Sequence[str]) -> tuple[float, ...]:
    """`30-44` and `75+` begin at 30 and 75; every age is in one bin, in order."""
    if not labels:
        return ()
    bins = [found for label in labels if (found := _AGES.fullmatch(label))]
    starts = [int(each[1]) for each in bins]
    due = [0, *(int(each[2]) + 1 for each in bins if each[2])]
    if len(bins) < len(labels) or starts != due or starts != sorted(set(starts)):
        raise DataError(
            f"The age columns {', '.join(labels)} are not of the form 0-29, 30-44, 45+, in order, "
            "with every age in one of them."
        )
    return tuple(float(start) for start in starts[1:])


def _written(values: Floats) -> list[str]:
    return [f"{value:.6f}" for value in values.tolist()]


def _key(image: str) -> str:
    """What an image is called with or without its suffix; a path without ISIC id is as it is."""
    name = name_of(image)
    return image if ("/" in image or "\\" in image) and not isic_id(name) else name
