"""The canonical manifest: one row an image, one vocabulary, whatever the dataset."""

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path

from models.files import write_atomically


class DataError(Exception):
    """Data that cannot be used; the message names the file (and row) and says what to do."""


class Site(StrEnum):
    """Anatomical site, in the vocabulary of ISIC 2020 (`anatom_site_general_challenge`)."""

    HEAD_NECK = "head/neck"
    UPPER_EXTREMITY = "upper extremity"
    LOWER_EXTREMITY = "lower extremity"
    TORSO = "torso"
    PALMS_SOLES = "palms/soles"
    ORAL_GENITAL = "oral/genital"


class Sex(StrEnum):
    """Sex as recorded."""

    FEMALE = "female"
    MALE = "male"


class Diagnosis(StrEnum):
    """The seven classes of HAM10000 (Tschandl et al. 2018)."""

    AKIEC = "actinic keratosis"
    BCC = "basal cell carcinoma"
    BKL = "benign keratosis"
    DF = "dermatofibroma"
    MEL = "melanoma"
    NV = "nevus"
    VASC = "vascular lesion"


class Split(StrEnum):
    """What an image may be used for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what is known of it; None where it is not known.

    Attributes:
        image: ISIC image id.
        path: Of the image file.
        dataset: Name of the dataset that it was found in.
        lesion: Lesion id, in the dataset's own namespace.
        melanoma: Whether the diagnosis is melanoma.
        diagnosis: One of seven.
        age: `age_approx`, in years, in steps of 5.
        sex: As recorded.
        site: Anatomical site.
        split: What the image may be used for.
        component: Images of one component (same lesion) are one cluster in splits and intervals.
    """

    image: str
    path: str
    dataset: str
    lesion: str | None = None
    melanoma: bool | None = None
    diagnosis: Diagnosis | None = None
    age: float | None = None
    sex: Sex | None = None
    site: Site | None = None
    split: Split | None = None
    component: str = ""


_COLUMNS = [field.name for field in fields(Record)]


def save_manifest(path: Path, records: Sequence[Record]) -> None:
    """Write the manifest as CSV, whole or not at all."""
    with write_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for record in records:
            row = asdict(record)
            if record.melanoma is not None:
                row["melanoma"] = int(record.melanoma)
            writer.writerow(row)


def load_manifest(path: Path) -> list[Record]:
    """Read a manifest that `save_manifest` wrote.

    Raises:
        DataError: The file is missing or a row does not fit the vocabulary.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. Run `mmtl-train prepare` first.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise DataError(f"{path}: expected the columns {', '.join(_COLUMNS)}.")
        return [_parse(path, number, row) for number, row in enumerate(reader, start=2)]


def _parse(path: Path, number: int, row: dict[str, str]) -> Record:
    try:
        return Record(
            image=row["image"],
            path=row["path"],
            dataset=row["dataset"],
            lesion=row["lesion"] or None,
            melanoma=bool(int(row["melanoma"])) if row["melanoma"] else None,
            diagnosis=Diagnosis(row["diagnosis"]) if row["diagnosis"] else None,
            age=float(row["age"]) if row["age"] else None,
            sex=Sex(row["sex"]) if row["sex"] else None,
            site=Site(row["site"]) if row["site"] else None,
            split=Split(row["split"]) if row["split"] else None,
            component=row["component"],
        )
    except ValueError as error:
        raise DataError(f"{path}, row {number}: {error}.") from None


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over what the network could learn from: ids, labels and splits, not paths."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: (record.dataset, record.image)):
        row = asdict(replace(record, path=""))
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()
