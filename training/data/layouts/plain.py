"""A plain CSV: a column that names the image, and columns with any of the labels."""

from pathlib import Path

from training.data.layouts import Place, image_of
from training.data.manifest import Record, isic_id
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import SEXES, SITES, TRUTHS

TITLE = "plain CSV"
LICENCE = "that of its owner"
URL = ""
ORDER = 1
_PATH = ("path", "file", "filename", "file_name", "image_path")
_IMAGE = ("image", "image_id", "image_name", "id", *_PATH)
_MELANOMA = ("melanoma", "target", "label", "class", "benign_malignant")
_AGE = ("age", "age_approx")
_SITE = ("site", "anatom_site_general_challenge", "anatom_site_general", "localization")
_LABELS = (*_MELANOMA, "diagnosis", "dx", *_AGE, "sex", *_SITE)


def recognise(place: Place) -> bool:
    """By an image column and a label column, of any of the usual names."""
    return any(_is_table(header) for header in place.tables.values())


def read(place: Place, faults: Faults) -> list[Record]:
    """Read every such table; paths are relative to it."""
    records = []
    for table, header in place.tables.items():
        if _is_table(header):
            for row in read_rows(table, set(), faults):
                image = image_of(row, *_IMAGE)
                if image is not None:
                    records.append(_record(row, image, place))
    return records


def _is_table(header: frozenset[str]) -> bool:
    return any(name in header for name in _IMAGE) and any(name in header for name in _LABELS)


def _record(row: Row, image: str, place: Place) -> Record:
    term = row.diagnosis("diagnosis", "dx")
    melanoma = row.choice(TRUTHS, *_MELANOMA)
    named = row.text(*_PATH)
    path = place.folder / named if named else None
    return Record(
        image=image if isic_id(image) else (named or image),
        path=str(path) if path and path.is_file() else place.picture(Path(image).stem),
        dataset=row.text("dataset") or place.name,
        lesion=row.text("lesion", "lesion_id"),
        patient=row.text("patient", "patient_id"),
        melanoma=term.melanoma if melanoma is None else melanoma,
        diagnosis=term.diagnosis,
        age=row.age(*_AGE),
        sex=row.choice(SEXES, "sex"),
        site=row.choice(SITES, *_SITE),
    )
