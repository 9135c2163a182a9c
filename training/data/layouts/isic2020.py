"""ISIC 2020 (SIIM-ISIC): official tables (v2 has lesion ids), or Kaggle's; images of any size."""

from training.data.layouts import Place, image_of, merge
from training.data.manifest import Record
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import SEXES, SITES, TRUTHS

TITLE = "ISIC 2020"
LICENCE = "CC BY-NC 4.0"
URL = "https://doi.org/10.34970/2020-ds01"
_IMAGE = ("image_name", "image")
_PATIENT = ("patient_id", "patient")
_SITE = ("anatom_site_general_challenge", "anatom_site_general")
# Columns that make it a plain table, which reads them.
_OF_OTHERS = {"melanoma", "label", "class", "dx", "lesion", "split", "dataset"}


def recognise(place: Place) -> bool:
    """By the columns that its test tables have, too, and none of others' labels."""
    return any(_is_table(header) for header in place.tables.values())


def read(place: Place, faults: Faults) -> list[Record]:
    """Read all of its tables; what one says of an image and another does not is joined.

    The test table has no diagnosis.
    """
    records: dict[str, Record] = {}
    for table, header in place.tables.items():
        if not _is_table(header):
            continue
        for row in read_rows(table, {"sex", "age_approx"}, faults):
            image = image_of(row, *_IMAGE)
            if image is None:
                continue
            record = _record(row, image, place)
            records[image], differing = merge(records.get(image, record), record)
            if differing:
                faults.add(
                    "repeated row",
                    f"{row.where(_IMAGE)}: {image} stands in two rows, which disagree "
                    f"({', '.join(differing)}).",
                )
    return list(records.values())


def _is_table(header: frozenset[str]) -> bool:
    told_otherwise = "benign_malignant" in header and "target" not in header
    return (
        not {"isic_id", *_OF_OTHERS} & header
        and not told_otherwise
        and {"sex", "age_approx"} <= header
        and all(any(name in header for name in names) for names in (_IMAGE, _PATIENT, _SITE))
    )


def _record(row: Row, image: str, place: Place) -> Record:
    term = row.diagnosis("diagnosis")
    melanoma = row.choice(TRUTHS, "target")
    return Record(
        image=image,
        path=place.picture(image),
        dataset=TITLE,
        lesion=row.identity("lesion_id"),
        patient=row.identity(*_PATIENT),
        melanoma=term.melanoma if melanoma is None else melanoma,
        diagnosis=term.diagnosis,
        age=row.age("age_approx"),
        sex=row.word(SEXES, "sex"),
        site=row.word(SITES, *_SITE),
    )
