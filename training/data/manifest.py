"""The canonical manifest: one row an image, one vocabulary, whatever the dataset."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TextIO, TypeVar

from models.files import write_atomically
from training.data.text import delimiter_of, encoding_of
from training.data.vocabulary import Diagnosis, Sex, Site, Split

OLDEST = 120
_Word = TypeVar("_Word", bound=StrEnum)
_TRUTHS = {"1": True, "0": False}
_ISIC_ID = re.compile(r"ISIC(?:20\d\d)?_(\d{7})(?!\d)", re.IGNORECASE)


class DataError(Exception):
    """Data that cannot be used; the message names the file (and row) and says what to do."""


def first_line(error: Exception) -> str:
    """What a library's error says, without its further lines of advice."""
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what is known of it; None where it is not known.

    Attributes:
        image: ISIC image id, or a name of its own within the dataset.
        path: Of the image file; empty where only the metadata is at hand.
        dataset: Name of the dataset that it was found in.
        lesion: Lesion id, as the dataset has it.
        patient: Patient id, as the dataset has it.
        melanoma: Whether the diagnosis is melanoma.
        diagnosis: One of eight.
        age: `age_approx`, in years, in steps of 5.
        sex: As recorded.
        site: Anatomical site.
        split: What the image may be used for.
        component: Images of one component (same lesion, patient or picture) are one cluster in
            splits and intervals; the smallest image id of them.
    """

    image: str
    path: str
    dataset: str
    lesion: str | None = None
    patient: str | None = None
    melanoma: bool | None = None
    diagnosis: Diagnosis | None = None
    age: float | None = None
    sex: Sex | None = None
    site: Site | None = None
    split: Split | None = None
    component: str = ""


COLUMNS = tuple(field.name for field in fields(Record))


def isic_id(name: str) -> str | None:
    """The ISIC image id in a file name or cell, in its canonical spelling; None if there is none.

    `ISIC_0000001_downsampled.jpg` and `ISIC2019_0000001_mel.jpg` are both of ISIC_0000001.
    """
    found = _ISIC_ID.match(name.strip())
    return f"ISIC_{found[1]}" if found else None


def collection_of(dataset: str) -> str:
    """The collection that a dataset is a part of: `balanced` of `balanced (ISIC2019)`."""
    return dataset.partition(" (")[0]


def save_manifest(path: Path, records: Sequence[Record]) -> None:
    """Write the manifest as CSV, whole or not at all."""
    with write_atomically(path) as temporary, open_table(temporary) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for record in records:
            row = asdict(record)
            if record.melanoma is not None:
                row["melanoma"] = int(record.melanoma)
            writer.writerow(row)


def load_manifest(path: Path) -> list[Record]:
    """Read a manifest that `save_manifest` wrote, and a spreadsheet may have saved again.

    Raises:
        DataError: The file is missing or a row does not fit the vocabulary.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a manifest, a CSV file, in its place.")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Write it with `mmtl-train prepare` or `mmtl-train data split`."
        )
    try:
        with path.open(newline="", encoding=encoding_of(path), errors="surrogateescape") as file:
            delimiter = delimiter_of(file.readline())
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise DataError(
                    f"{path}: expected the columns {', '.join(COLUMNS)}. Write it anew with "
                    "`mmtl-train prepare`, or `mmtl-train data split` (with --keep, its own splits "
                    "stay)."
                )
            records = [_parse(path, number, row) for number, row in enumerate(reader, start=2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}.") from None
    twice = Counter((record.dataset, record.image) for record in records)
    if (most := max(twice, key=twice.__getitem__, default=None)) and twice[most] > 1:
        raise DataError(f"{path}: the image {most[1]} of {most[0]} stands in {twice[most]} rows.")
    return records


def _parse(path: Path, number: int, row: dict[str, str]) -> Record:
    if None in row.values() or None in row:
        raise DataError(f"{path}, row {number}: it has more or fewer cells than the header.")
    for name in ("image", "dataset"):
        if not row[name]:
            raise DataError(f"{path}, row {number}: it names no {name}.")
    try:
        # File names may be any bytes (and are read as such); what else there is goes into reports.
        "".join(cell for name, cell in row.items() if name not in ("image", "path")).encode()
        return Record(
            image=row["image"],
            path=row["path"],
            dataset=row["dataset"],
            lesion=row["lesion"] or None,
            patient=row["patient"] or None,
            melanoma=_TRUTHS[row["melanoma"]] if row["melanoma"] else None,
            diagnosis=_one_of(Diagnosis, row["diagnosis"]),
            age=_age(row["age"]) if row["age"] else None,
            sex=_one_of(Sex, row["sex"]),
            site=_one_of(Site, row["site"]),
            split=_one_of(Split, row["split"]),
            component=row["component"],
        )
    except KeyError as error:
        raise DataError(f"{path}, row {number}: melanoma is 1, 0 or empty, not {error}.") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}, row {number}: it is not in UTF-8.") from None
    except ValueError as error:
        raise DataError(f"{path}, row {number}: {error}.") from None


def _one_of(words: type[_Word], cell: str) -> _Word | None:
    if cell and cell not in set(words):
        raise ValueError(f"{cell!r} is none of {', '.join(words)}")
    return words(cell) if cell else None


def _age(cell: str) -> float:
    try:
        age = float(cell)
    except ValueError:
        age = -1.0
    if not 0 <= age <= OLDEST:
        raise ValueError(f"{cell!r} is not an age in years")
    return age


def open_table(path: Path) -> TextIO:
    """Open a table to be written; file names in it that are not UTF-8 stay as they are."""
    return path.open("w", newline="", encoding="utf-8", errors="surrogateescape")


def usable(records: Iterable[Record]) -> list[Record]:
    """Those of a manifest that a run keeps: with an image file, and in a split."""
    return [record for record in records if record.path and record.split is not None]


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over what the network could learn from: ids, labels and splits, not paths."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: (record.dataset, record.image)):
        row = asdict(replace(record, path=""))
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()
