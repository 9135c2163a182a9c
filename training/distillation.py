"""What teachers, bundles fitted before, say of a run's images: what a student learns from them.

Hinton, Vinyals & Dean 2015 (arXiv:1503.02531): the probabilities that an ensemble gives the other
classes teach more than the label alone. Each teacher sees an image in its four mirrorings.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.bundle import Bundle, load_bundle, melanoma_probability
from models.files import write_atomically
from models.recalibration import LOGIT
from training.data.cache import Pixels
from training.data.manifest import DataError, Record
from training.data.vocabulary import Sex, Site
from training.run import Run
from training.runners import onnx_runner
from training.tasks import DIAGNOSES

BATCH_SIZE = 64
# What a bundle answers in a run's own classes; its age bins are coarser than the age grid.
TAUGHT = {"diagnosis": DIAGNOSES, "site": tuple(Site), "sex": tuple(Sex)}
_MIRRORINGS = ((), (1,), (2,), (1, 2))
# No further from each other are what a head says that was taught nothing (`leave_out`).
_SAYS_NOTHING = 1e-4


def open_teachers(folders: Sequence[str], size: int) -> list[Bundle]:
    """The bundles to learn from.

    Args:
        folders: Of the bundles.
        size: Of the run's images, in pixels.

    Raises:
        models.bundle.BundleError: A folder holds no whole bundle.
        DataError: A teacher's input or labels are not the run's.
    """
    teachers = [load_bundle(Path(folder)) for folder in folders]
    for folder, teacher in zip(folders, teachers, strict=True):
        expected = teacher.manifest.input
        if (expected.height, expected.width) != (size, size):
            raise DataError(
                f"teachers: {folder} looks at {expected.width} x {expected.height} pixels; "
                f"the run's images have {size} x {size}."
            )
        for name, labels in TAUGHT.items():
            task = teacher.manifest.task(name)
            if task is None:
                raise DataError(f"teachers: {folder} has no head for {name}: take one that has.")
            if list(task.labels) != [str(label) for label in labels]:
                raise DataError(
                    f"teachers: {folder} has other labels for {name} than "
                    f"{', '.join(map(str, labels))}: take one that has these."
                )
    return teachers


def soft_targets(
    run: Run,
    teachers: Sequence[Bundle],
    records: Sequence[Record],
    pixels: Pixels,
    positions: Sequence[int],
) -> dict[str, Tensor]:
    """The teachers' mean probabilities by task, float32 [N, classes]; zero where not asked.

    A teacher that was taught nothing of a task, and finds all its classes equally probable of every
    image, is not listened to about that; a task of which none knows more is left out. Each
    teacher's answers are kept in the run's folder: they take minutes.

    Args:
        run: Where.
        teachers: At least one.
        records: Of the run, N.
        pixels: Of the same.
        positions: Of the images to be learned from.
    """
    asked = _shown(pixels, positions)
    sums: dict[str, Tensor] = {}
    heard: Counter[str] = Counter()
    for teacher in teachers:
        file = run.teachers / f"{asked[:16]}-{name_of(teacher)[:16]}.npz"
        said = _read(file)
        if said is None:
            file.parent.mkdir(exist_ok=True)
            said = _ask(teacher, pixels, positions)
            with write_atomically(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **said)  # type: ignore[arg-type]  # numpy's stub has no **arrays
        for task, probabilities in said.items():
            if np.ptp(probabilities, axis=1).max(initial=0.0) < _SAYS_NOTHING:
                continue
            if task not in sums:
                sums[task] = torch.zeros(len(records), probabilities.shape[1])
            sums[task][list(positions)] += torch.from_numpy(probabilities)
            heard[task] += 1
    return {task: answers / heard[task] for task, answers in sums.items()}


def name_of(teacher: Bundle) -> str:
    """SHA-256 of what its answers hang on: the artifact that is asked, and its calibration."""
    artifact = teacher.artifact("onnx", "fp32")
    scaling = artifact.calibration
    told = f"{artifact.sha256} {scaling.slope} {scaling.intercept}"
    return hashlib.sha256(told.encode()).hexdigest()


def _shown(pixels: Pixels, positions: Sequence[int]) -> str:
    """SHA-256 of the pictures that are asked about, in order."""
    digest = hashlib.sha256()
    for position in positions:
        digest.update(pixels[position])
    return digest.hexdigest()


def _read(file: Path) -> dict[str, NDArray[np.float32]] | None:
    """What a teacher said before; None where it was not asked, or the file is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream) as saved:
            return {task: saved[task] for task in saved.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error):
        return None


def _ask(
    teacher: Bundle, pixels: Pixels, positions: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    """Its probabilities by task, [len(positions), classes]."""
    artifact = teacher.artifact("onnx", "fp32")
    run = onnx_runner(teacher.path(artifact))
    parts: dict[str, list[NDArray[np.float32]]] = {}
    bar = tqdm(total=len(positions), desc=f"ask {teacher.manifest.version}", unit="image")
    for start in range(0, len(positions), BATCH_SIZE):
        batch = np.stack([pixels[i] for i in positions[start : start + BATCH_SIZE]])
        seen = [run(np.ascontiguousarray(np.flip(batch, axes))) for axes in _MIRRORINGS]
        logit = np.mean([out[LOGIT].reshape(-1) for out in seen], axis=0)
        melanoma = melanoma_probability(logit, artifact.calibration)
        parts.setdefault("melanoma", []).append(np.stack([1 - melanoma, melanoma], axis=1))
        for task in TAUGHT:
            parts.setdefault(task, []).append(np.mean([out[task] for out in seen], axis=0))
        bar.update(len(batch))
    bar.close()
    return {task: np.concatenate(values).astype(np.float32) for task, values in parts.items()}
