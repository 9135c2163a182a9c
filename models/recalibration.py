"""What a clinic changes of a bundle: calibration, prevalence and threshold; the network stays."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import (
    Artifact,
    Bundle,
    Calibration,
    Manifest,
    save_bundle,
)
from models.calibration import (
    SENSITIVITY,
    CalibrationError,
    calibrate,
    log_odds,
    shift_prevalence,
)

LOGIT = "melanoma_logit"
PROBABILITY = "melanoma_probability"
OUTCOME = "melanoma"
CARD = "MODEL_CARD.md"
# How the name of a clinic's own images ends.
OUTCOMES = "(recalibration)"
# Measured before: it would not hold of the new bundle.
METRICS = "metrics.json"
# With fewer of either, a slope means nothing.
LEAST_OUTCOMES = 10
# Answers have six digits.
_LEAST_PROBABILITY = 5e-7
_TRUTHS = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
    **dict.fromkeys(("0", "0.0", "false", "no"), False),
}


def read_outcomes(
    path: Path, answered_by: Artifact
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A table of answers and outcomes.

    Its columns are `melanoma` (1 or 0), and `melanoma_probability`, as the service answers, or
    `melanoma_logit`, as `mmtl-train evaluate` writes. Rows without an outcome are left out.

    Args:
        path: A CSV file.
        answered_by: Whose probabilities they are; its calibration turns them back into logits.

    Returns:
        Logits, float [N], and outcomes, bool [N].

    Raises:
        CalibrationError: The table does not fit; the message names line and column.
    """
    values, outcomes = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            there = reader.fieldnames or ()
            column = LOGIT if LOGIT in there else PROBABILITY
            for needed in (column, OUTCOME):
                if needed not in there:
                    raise CalibrationError(
                        f"{path}: the column {needed} is missing. Separated by commas, it has "
                        f"{', '.join(there) or 'none'}."
                    )
            for row in reader:
                number = reader.line_num
                said = (row[OUTCOME] or "").strip().lower()
                if not said:
                    continue
                if said not in _TRUTHS:
                    raise CalibrationError(
                        f"{path}, line {number}, column {OUTCOME}: {said!r} is not 1 or 0."
                    )
                outcomes.append(_TRUTHS[said])
                values.append(_number(row[column], path, number, column))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path} is not a CSV file in UTF-8: {error}.") from None
    found = np.array(values)
    if column == PROBABILITY:
        calibration = answered_by.calibration
        bounded = np.clip(found, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
        found = (np.log(bounded / (1 - bounded)) - calibration.intercept) / calibration.slope
    elif len(found) and found.min() >= 0 and found.max() <= 1:
        raise CalibrationError(
            f"{path}: the column {LOGIT} holds probabilities; call it {PROBABILITY}."
        )
    return found, np.array(outcomes, bool)


def recalibrate(
    manifest: Manifest,
    logits: NDArray[np.float64],
    melanoma: NDArray[np.bool_],
    dataset: str,
    sensitivity: float = SENSITIVITY,
) -> Manifest:
    """Fit calibration and threshold to a clinic's own images.

    Every artifact gets them: all are the same network, but for what rounding costs (docs/int8.md).

    Args:
        manifest: Of the bundle that gave the logits.
        logits: float [N].
        melanoma: bool [N], the outcomes.
        dataset: What the clinic calls these images.
        sensitivity: That the threshold must reach on them.

    Raises:
        CalibrationError: There are too few outcomes, or the logits do not fit them.
    """
    for kind, count in (("with", melanoma.sum()), ("without", (~melanoma).sum())):
        if count < LEAST_OUTCOMES:
            raise CalibrationError(
                f"{count} images {kind} melanoma are too few to calibrate on; at least "
                f"{LEAST_OUTCOMES} are needed."
            )
    calibration, threshold, point = calibrate(logits, melanoma, dataset, sensitivity)
    changed = _changed(manifest, lambda _: (calibration, threshold), float(melanoma.mean()))
    artifacts = [each.model_copy(update={"operating_point": None}) for each in changed.artifacts]
    return changed.model_copy(
        update={
            "artifacts": tuple(artifacts),
            "operating_point": point,
            "metrics": tuple(m for m in manifest.metrics if not _depends_on_threshold(m.name)),
        }
    )


def fitted_to_outcomes(manifest: Manifest) -> bool:
    """Whether its calibration and threshold are of a clinic's own images (`recalibrate`)."""
    return manifest.operating_point.dataset.endswith(OUTCOMES)


def change_prevalence(manifest: Manifest, prevalence: float) -> Manifest:
    """Move probabilities to another share of melanoma. The threshold moves along.

    Which images are called melanoma stays the same, and with it sensitivity and specificity.

    Args:
        manifest: Of a bundle.
        prevalence: The clinic's, in (0, 1).
    """
    old = manifest.prevalence
    shift = log_odds(prevalence) - log_odds(old)

    def moved(artifact: Artifact) -> tuple[Calibration, float]:
        slope, intercept = artifact.calibration.slope, artifact.calibration.intercept
        threshold = shift_prevalence(artifact.melanoma_threshold, old, prevalence)
        return Calibration(slope=slope, intercept=intercept + shift), threshold

    return _changed(manifest, moved, prevalence)


def save_recalibrated(bundle: Bundle, folder: Path, manifest: Manifest, how: str) -> Bundle:
    """Write the bundle with another manifest, its card saying so on top.

    Raises:
        models.bundle.BundleError: `folder` is something else than a bundle.
    """
    files: dict[str, bytes | Path] = {**bundle.files(CARD, METRICS)}
    card = bundle.folder / CARD
    note = (
        f"> Recalibrated: {how}. Probabilities, the threshold and what follows from them "
        "differ from what is said below, which is of the bundle before.\n\n"
    )
    told = card.is_file() and not card.is_symlink()  # which may lead to what its author cannot read
    files[CARD] = note.encode() + (card.read_bytes() if told else b"")
    return save_bundle(folder, manifest, files)


def differences(first: Manifest, second: Manifest) -> Iterator[tuple[str, str, str]]:
    """Every field in which two manifests differ: its name, and both values."""
    ours, theirs = (dict(_flat(json.loads(m.model_dump_json()))) for m in (first, second))
    for name in {**ours, **theirs}:
        one, other = ours.get(name, "absent"), theirs.get(name, "absent")
        if one != other:
            yield name, one, other


def _changed(
    manifest: Manifest,
    change: Callable[[Artifact], tuple[Calibration, float]],
    prevalence: float,
) -> Manifest:
    artifacts = []
    for artifact in manifest.artifacts:
        calibration, threshold = change(artifact)
        artifacts.append(
            artifact.model_copy(
                update={"calibration": calibration, "melanoma_threshold": threshold}
            )
        )
    changed = manifest.model_copy(update={"artifacts": tuple(artifacts), "prevalence": prevalence})
    return Manifest.model_validate(changed.model_dump())


def _depends_on_threshold(metric: str) -> bool:
    return any(word in metric for word in ("sensitivity", "specificity"))


def _number(cell: str | None, path: Path, line: int, column: str) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise CalibrationError(f"{path}, line {line}, column {column}: {cell!r} is not a number.")
    if column == PROBABILITY and not 0 <= value <= 1:
        raise CalibrationError(f"{path}, line {line}, column {column}: {cell!r} is not in 0 to 1.")
    return value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves by dotted name; list items by their own name where they have one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        keys: list[str] = []
        for number, item in enumerate(value):
            key = item.get("file") or item.get("name") or item.get("seed", number)
            key = f"{key}, {item['dataset']}" if "dataset" in item else str(key)
            keys.append(f"{key} ({number})" if key in keys else key)
            yield from _flat(item, f"{name}[{keys[-1]}]")
        yield name, json.dumps(keys)  # their order counts, too
    else:
        yield name, json.dumps(value)
