"""Answers as a CSV table, a row an image: as `mmtl-train evaluate --predictions` reads them."""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.schemas import Age, Category, Result, Success
from models.files import write_atomically


@contextmanager
def open_table(
    path: Path, folder: Path | None = None
) -> Iterator[Callable[[Sequence[Path], Sequence[Result]], None]]:
    """Give what adds images' rows; the table is at `path` when the block succeeds.

    Images that could not be used have none. Names that are no UTF-8 stay as they are.

    Args:
        path: Of the table.
        folder: That the images are named relative to; None where they are called as they are.
    """
    with (
        write_atomically(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer: csv.DictWriter[str] | None = None

        def add(images: Sequence[Path], results: Sequence[Result]) -> None:
            nonlocal writer
            for image, result in zip(images, results, strict=True):
                if not isinstance(result, Success):
                    continue
                row = _row(result, os.path.relpath(image, folder) if folder else str(image))
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)

        yield add


def _row(result: Success, name: str) -> dict[str, object]:
    prediction = result.prediction
    row: dict[str, object] = {
        "image": name,
        "melanoma_probability": prediction.melanoma.probability,
        "melanoma_decision": prediction.melanoma.decision,
    }
    for task, answer in prediction:
        if isinstance(answer, Age | Category):
            row |= {f"{task}:{label}": share for label, share in answer.probabilities.items()}
    return row | {
        "age_years": prediction.age.years,
        "ood_score": result.quality.ood_score,
        "warnings": " ".join(result.quality.warnings),
        "sha256": result.image.sha256,
    }
