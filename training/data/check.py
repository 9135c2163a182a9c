"""What datasets hold and what is wrong with them: counts, missing values, unreadable images."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from models.images import ImageError, decode
from training.data.layouts import Dataset, image_files, table_files
from training.data.manifest import Record, collection_of

# The label columns of a manifest, which may be empty.
LABELS = ("melanoma", "diagnosis", "age", "sex", "site", "lesion", "patient")
_COUNTED = ("diagnosis", "sex", "site")
_SIDE = 32


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one dataset.

    Attributes:
        dataset: Its name in the records.
        layout: Title of its layout.
        folder: Where it is.
        rows: Number of images that its tables name.
        pictures: How many of them have a file.
        unreadable: How many files are no image that serving could decode.
        melanomas: Rows that are melanoma.
        known: Rows with a value, by label.
        counts: Rows by value, for diagnosis, sex, site and age (in steps of 10 years).
        pairs: Pairs that it lists as duplicates.
        faults: Sentences, each with file, row and column where there are; the fatal ones first.
        fatal: How many of these must be mended before the data is used.
    """

    dataset: str
    layout: str
    folder: str
    rows: int
    pictures: int
    unreadable: int
    melanomas: int
    known: dict[str, int]
    counts: dict[str, dict[str, int]]
    pairs: int
    faults: tuple[str, ...]
    fatal: int


def check(dataset: Dataset, pixels: bool = True) -> Check:
    """Look at one dataset.

    Args:
        dataset: As it was read.
        pixels: Decode every image.
    """
    records, faults = dataset.records, dataset.faults
    damaged = find_unreadable(records) if pixels else []
    absent = [record.image for record in records if not record.path]
    if absent and (len(absent) < len(records) or dataset.place.pictures):
        some = ", ".join(absent[:3])
        faults.add(
            "missing file",
            f"{dataset.place.folder}: {len(absent):,} images have no file ({some}, ...).",
            fatal=False,
        )
    if records and all(record.melanoma is None for record in records):
        faults.add(
            "no labels",
            f"{dataset.place.folder}: nothing tells which of its images are melanoma "
            f"(read as: {dataset.layout.TITLE}).",
            fatal=False,
        )
    names = sorted({collection_of(record.dataset) for record in records})
    return Check(
        dataset=", ".join(names) or dataset.place.name,
        layout=dataset.layout.TITLE,
        folder=str(dataset.place.folder),
        rows=len(records),
        pictures=sum(bool(record.path) for record in records),
        unreadable=len(damaged),
        melanomas=sum(bool(record.melanoma) for record in records),
        known={
            label: sum(getattr(record, label) is not None for record in records) for label in LABELS
        },
        counts={
            **{name: _count([getattr(r, name) for r in records]) for name in _COUNTED},
            "age": _count([None if r.age is None else int(r.age // 10 * 10) for r in records]),
        },
        pairs=len(dataset.pairs),
        faults=(
            *sorted(damaged),
            *(fault.message for fault in sorted(faults, key=lambda fault: not fault.fatal)),
        ),
        fatal=len(damaged) + sum(fault.fatal for fault in faults),
    )


def _count(values: Sequence[object]) -> dict[str, int]:
    return dict(Counter(str(value) for value in values if value is not None).most_common())


def find_unreadable(records: Sequence[Record]) -> list[str]:
    """A sentence for every file that serving could not decode."""
    paths = [Path(record.path) for record in records if record.path]

    def look(path: Path) -> str | None:
        try:
            decode(path.read_bytes(), _SIDE, _SIDE)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}."
        except ImageError as error:
            return f"{path}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, paths), "decode", len(paths), unit="image", disable=not paths)
        return [sentence for sentence in looked if sentence]


def find_strays(path: Path, datasets: Sequence[Dataset]) -> dict[str, int]:
    """Number of image files below `path` that no dataset names, by folder."""
    if path.is_file():
        return {}
    named = {record.path for dataset in datasets for record in dataset.records}
    strays = [file for file in image_files(path.absolute()) if str(file) not in named]
    return dict(sorted(Counter(str(file.parent) for file in strays).items()))


def find_unclaimed(path: Path, datasets: Sequence[Dataset]) -> list[str]:
    """The tables below `path` that stand where no dataset is."""
    if path.is_file():
        return []
    claimed = {table for dataset in datasets for table in dataset.place.tables}
    return sorted(str(table) for table in table_files(path.absolute()) if table not in claimed)
