"""HAM10000 (Tschandl et al. 2018): `HAM10000_metadata` and one or two folders of images.

The test set of ISIC 2018 lies beside it at Harvard's, with the same columns: a dataset of its own.
"""

from collections.abc import Collection
from pathlib import Path

from training.data.layouts import Place, challenge_split, image_of
from training.data.manifest import Record
from training.data.tables import Faults, read_rows
from training.data.vocabulary import SEXES, SITES, SPLITS

TITLE = "HAM10000"
ISIC_2018 = "ISIC 2018"
LICENCE = "CC BY-NC 4.0"
URL = "https://doi.org/10.7910/DVN/DBW86T"
_COLUMNS = {"lesion_id", "image_id", "dx", "age", "sex", "localization"}
# Columns that make it a plain table, which reads them; but for where an image was made (Harvard's
# copy has it, Kaggle's has not), which stands beside how its diagnosis was found.
_OF_OTHERS = {"melanoma", "split", "dataset"}
_MADE_AT, _FOUND_BY = "dataset", "dx_type"


def recognise(place: Place) -> bool:
    """By its columns, and none of others'."""
    return bool(_tables(place))


def read(place: Place, faults: Faults) -> list[Record]:
    """Read the tables."""
    return [record for table in _tables(place) for record in _of_table(table, place, faults)]


def _of_table(table: Path, place: Place, faults: Faults) -> list[Record]:
    name = table.stem.lower()
    # HAM10000 is what the challenge of 2018 trained on.
    of_2018 = name.startswith("isic2018") and challenge_split(table) is not None
    split = challenge_split(table) or SPLITS.get(name)
    records = []
    for row in read_rows(table, _COLUMNS, faults):
        image = image_of(row, "image_id")
        if image is None:
            continue
        term = row.diagnosis("dx")
        records.append(
            Record(
                image=image,
                path=place.picture(image),
                dataset=ISIC_2018 if of_2018 else TITLE,
                lesion=row.identity("lesion_id"),
                patient=row.identity("patient_id", "patient"),  # its own table has none
                melanoma=term.melanoma,
                diagnosis=term.diagnosis,
                age=row.age("age"),
                sex=row.word(SEXES, "sex"),
                site=row.word(SITES, "localization"),
                split=split,
            )
        )
    return records


def _tables(place: Place) -> list[Path]:
    def is_own(columns: Collection[str]) -> bool:
        others = _OF_OTHERS - {_MADE_AT} if _FOUND_BY in columns else _OF_OTHERS
        return others.isdisjoint(columns)

    return [path for path in place.tables_with(*_COLUMNS) if is_own(place.tables[path])]
