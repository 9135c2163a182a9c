"""A folder as `isic-cli` writes it: images beside a `metadata.csv`, with old or new columns.

Columns `melanoma` and `split`, which somebody added, are read, too.
"""

from training.data.layouts import Place, image_of
from training.data.manifest import Record
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import SEXES, SITES, SPLITS, TRUTHS, Diagnosis

TITLE = "ISIC archive (isic-cli)"
LICENCE = "CC licences, CC BY-NC among them: see the column copyright_license"
URL = "https://www.isic-archive.com"
# A kind of fault.
NOT_DERMOSCOPIC = "not dermoscopic"
# From the finest to the coarsest; `diagnosis` is the old tables' only one.
_DIAGNOSIS = ("diagnosis", "diagnosis_5", "diagnosis_4", "diagnosis_3", "diagnosis_2")
_MALIGNANCY = ("benign_malignant", "diagnosis_1")


def recognise(place: Place) -> bool:
    """By the column `isic_id`."""
    return bool(place.tables_with("isic_id"))


def read(place: Place, faults: Faults) -> list[Record]:
    """Read the tables. What is not a dermoscopic picture is left out, and counted."""
    records = []
    for table in place.tables_with("isic_id"):
        for row in read_rows(table, {"isic_id"}, faults):
            image = image_of(row, "isic_id")
            if image is None:
                continue
            kind = row.text("image_type")
            if kind is not None and kind.lower() != "dermoscopic":
                faults.add(
                    NOT_DERMOSCOPIC,
                    f"{row.where(('image_type',))}: {image} is left out ({kind}).",
                    fatal=False,
                )
                continue
            diagnosis, melanoma = _labels(row)
            told = row.choice(TRUTHS, "melanoma")
            records.append(
                Record(
                    image=image,
                    path=place.picture(image),
                    dataset=place.name,
                    lesion=row.identity("lesion_id"),
                    patient=row.identity("patient_id"),
                    melanoma=melanoma if told is None else told,
                    diagnosis=diagnosis,
                    age=row.age("age_approx", "age"),
                    sex=row.word(SEXES, "sex"),
                    site=row.word(SITES, "anatom_site_general", "anatom_site_1"),
                    split=row.choice(SPLITS, "split"),
                )
            )
    return records


def _labels(row: Row) -> tuple[Diagnosis | None, bool | None]:
    """The finest diagnosis that is understood; a benign one is not melanoma, whatever it is."""
    present = [column for column in _DIAGNOSIS if row.text(column) is not None]
    quiet = Row(row.path, row.number, row.cells, Faults())
    terms = [quiet.diagnosis(column) for column in present]
    known = [term for term in terms if term.known]
    if present and not known:
        row.diagnosis(*present)
    diagnosis = next((term.diagnosis for term in known if term.diagnosis), None)
    melanoma = next((term.melanoma for term in known if term.melanoma is not None), None)
    if melanoma is None:
        # "malignant" alone may be any cancer; "indeterminate" is neither.
        words = (row.text(*_MALIGNANCY) or "").lower()
        melanoma = False if words == "benign" else None
    return diagnosis, melanoma
