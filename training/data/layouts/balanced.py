"""Bill's balanced set, the paper's benchmark and test set: `{train,val}/{mel,oth}` and metadata."""

import re
from pathlib import Path

from training.data.layouts import Place, ham10000, isic2019, isic2020, isic_cli, plain
from training.data.manifest import DataError, Record, collection_of, isic_id
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import ONE_ZERO, SEXES, SITES, Split

TITLE = "balanced"
LICENCE = "CC BY-NC"
URL = "https://doi.org/10.1145/3694860.3694871"
ORDER = -1
PARTS = {"train": Split.TRAIN, "val": Split.TEST}
_COLUMNS = ("image", "isic_id", "class")
_NAMES = {
    frozenset({"train", "training"}): Split.TRAIN,
    frozenset({"val", "valid", "validation", "test"}): Split.TEST,
}
_CLASSES = {"mel": True, "oth": False}
# Whose tables say more than folders do.
_OF_TABLES = (ham10000, isic2019, isic2020, isic_cli, plain)


def recognise(place: Place) -> bool:
    """By its table's columns, or by folders `mel` and `oth` beside no table of another layout."""
    if place.tables_with(*_COLUMNS):
        return True
    if place.alone or any(layout.recognise(place) for layout in _OF_TABLES):
        return False
    return any(
        (folder / "mel").is_dir() and (folder / "oth").is_dir()
        for folder in (place.folder, place.folder / "train", place.folder / "val")
    )


def read(place: Place, faults: Faults) -> list[Record]:
    """Read the tables, or without them the file names, which hold ISIC id, year and class.

    The paper tests on `val`: that is TEST here, and `train` is TRAIN.
    """
    tables = place.tables_with(*_COLUMNS)
    if not tables:
        return [record for path in place.files if (record := _from_name(path, faults))]
    names = {path.stem.lower(): path for path in place.files}
    records = []
    for table in tables:
        part = _part(table)
        for row in read_rows(table, {*_COLUMNS, "age_approx", "sex"}, faults):
            record = _from_row(row, part, names)
            if record is not None:
                records.append(record)
    return records


def is_part(record: Record) -> bool:
    """Whether a record is of this dataset, whatever year its image is from."""
    return collection_of(record.dataset) == TITLE


def _part(table: Path) -> Split:
    """Which part a table is of, by its name.

    Raises:
        DataError: The name tells neither.
    """
    words = set(re.split(r"[^a-z]+", table.stem.lower()))
    found = {split for names, split in _NAMES.items() if words & names}
    if len(found) != 1:
        raise DataError(f"{table}: its name must say train or val, so that no test row is learned.")
    return found.pop()


def _from_row(row: Row, part: Split, names: dict[str, Path]) -> Record | None:
    file = row.required("image") or ""
    cell = row.required("isic_id")
    image = cell and isic_id(cell)
    if cell and not image:
        row.faults.add("bad value", f"{row.where(('isic_id',))}: {cell!r} is not an ISIC image id.")
    if not image or not file:
        return None
    term = row.diagnosis("diagnosis")
    return Record(
        image=image,
        path=str(names.get(Path(file).stem.lower(), "")),
        dataset=_dataset(file),
        lesion=row.identity("lesion_id"),
        patient=row.identity("patient_id"),
        melanoma=row.choice(ONE_ZERO, "class"),
        diagnosis=term.diagnosis,
        age=row.age("age_approx"),
        sex=row.word(SEXES, "sex"),
        site=row.word(SITES, "anatom_site_general"),
        split=part,
    )


def _from_name(path: Path, faults: Faults) -> Record | None:
    image, melanoma = isic_id(path.name), _CLASSES.get(path.parent.name)
    said = _CLASSES.get(path.stem.rsplit("_", 1)[-1], melanoma)
    if image is None or melanoma is None or said is not melanoma:
        faults.add("stray file", f"{path} is not named as this layout's images are.", fatal=False)
        return None
    part = PARTS.get(path.parent.parent.name)
    return Record(image, str(path), _dataset(path.name), melanoma=melanoma, split=part)


def _dataset(file: str) -> str:
    """`balanced (ISIC2019)`: its images come from several years, and are reported by year."""
    return f"{TITLE} ({file[:8]})"
