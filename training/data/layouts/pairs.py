"""A table of duplicate pairs alone, such as `ISIC_2020_Training_Duplicates.csv`."""

from training.data.layouts import PAIR_COLUMNS, Place
from training.data.manifest import Record
from training.data.tables import Faults

TITLE = "duplicate pairs"
LICENCE = "that of its images"
URL = ""
ORDER = 2


def recognise(place: Place) -> bool:
    """By the columns `image_name_1` and `image_name_2`."""
    return bool(place.tables_with(*PAIR_COLUMNS))


def read(place: Place, faults: Faults) -> list[Record]:
    """No images: the pairs themselves are read for every layout."""
    return []
