"""Dataset layouts as people have them on disk, one module each; a further layout is one file."""

import importlib
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Protocol, cast

from models import images
from models.files import files_below, is_hidden
from training.data.manifest import DataError, Record, isic_id
from training.data.tables import SUFFIXES, Faults, Row, read_header, read_rows
from training.data.vocabulary import Diagnosis, Split

# How far below a given folder datasets are looked for.
_DEPTH = 4
PAIR_COLUMNS = ("image_name_1", "image_name_2")
_HELD_OUT = re.compile(r"is(?:ic|bi)[-_ ]?20\d\d.*[-_ ](validation|test)(?![a-z])")
_NOT_PICTURES = ("_segmentation", "_superpixels")


@dataclass(frozen=True)
class Place:
    """A folder (or one table of it) that may hold a dataset.

    Attributes:
        folder: The folder.
        tables: Its tables, with their column names in lower case.
        name: Of the dataset, where the layout has none of its own.
        alone: Whether it is one table, named by the user.
    """

    folder: Path
    tables: dict[Path, frozenset[str]]
    name: str
    alone: bool = False

    @classmethod
    def of(cls, path: Path) -> "Place":
        """Look at a folder, or at a table alone.

        Raises:
            OSError: It cannot be read.
        """
        path = path.absolute()
        if path.is_file():
            return cls(path.parent, {path: read_header(path)}, path.stem, alone=True)
        files = sorted(file for file in path.iterdir() if _may_be_table(file))
        return cls(path, {file: read_header(file) for file in files}, path.name)

    @property
    def whole(self) -> Path:
        """Its path, whatever links lead there; a table's without the suffix."""
        path = next(iter(self.tables)).with_suffix("") if self.alone else self.folder
        return path.resolve()

    def tables_with(self, *columns: str) -> list[Path]:
        """The tables that have all of these columns."""
        return [path for path, header in self.tables.items() if set(columns) <= header]

    @cached_property
    def pictures(self) -> dict[str, list[Path]]:
        """Image files below the folder, by ISIC id or else by name without suffix."""
        found: dict[str, list[Path]] = {}
        # A file that is named by its id alone comes before `_downsampled` and other copies.
        for path in sorted(self.files, key=lambda path: (len(path.stem), path)):
            if not path.stem.lower().endswith(_NOT_PICTURES):
                found.setdefault(isic_id(path.name) or path.stem, []).append(path)
        return found

    @cached_property
    def files(self) -> list[Path]:
        """All image files below the folder, sorted.

        Raises:
            OSError: A folder cannot be read.
        """
        return sorted(image_files(self.folder))

    def picture(self, image: str) -> str:
        """The path of an image, empty where there is none."""
        return str(self.pictures.get(image, [""])[0])


class Layout(Protocol):
    """What a module of this package has."""

    __name__: str
    TITLE: str
    """What a person calls the dataset."""
    LICENCE: str
    URL: str

    def recognise(self, place: Place) -> bool:
        """Whether the place holds this layout."""
        ...

    def read(self, place: Place, faults: Faults) -> list[Record]:
        """Its records; what is wrong in a cell is noted, and the cell is left empty.

        Raises:
            DataError: A table cannot be read at all.
        """
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that was found and read.

    Attributes:
        layout: Its layout.
        place: Where.
        records: Its images.
        faults: What is wrong with it.
        pairs: Image ids that it lists as duplicates of each other.
    """

    layout: Layout
    place: Place
    records: list[Record]
    faults: Faults
    pairs: list[tuple[str, str]]


def load_layouts() -> list[Layout]:
    """Every layout, those that could be mistaken for another one after it (`plain` is last)."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    modules.sort(key=lambda module: getattr(module, "ORDER", 0))
    return [cast(Layout, module) for module in modules]


def find_places(path: Path) -> Iterator[tuple[Layout, Place]]:
    """Every dataset at or below `path`, none of them inside another one.

    Raises:
        DataError: `path` does not exist.
        OSError: A folder or a table cannot be read: without it there would be less to train on.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    layouts = load_layouts()
    seen: set[Path] = set()

    def look(folder: Path, depth: int) -> Iterator[tuple[Layout, Place]]:
        if folder.resolve() in seen:
            return  # a link back
        seen.add(folder.resolve())
        place = Place.of(folder)
        for layout in layouts:
            if layout.recognise(place):
                yield layout, place
                return
        if folder.is_dir() and depth > 0:
            for below in sorted(folder.iterdir()):
                if below.is_dir() and not is_hidden(below.name):
                    yield from look(below, depth - 1)

    yield from look(path, _DEPTH)


def read_datasets(paths: Iterable[Path]) -> list[Dataset]:
    """Every dataset at or below some paths, whatever its layout.

    Raises:
        DataError: Nothing is found at one of them, or a table cannot be read.
    """
    (datasets,) = read_sides(paths)
    return datasets


def read_sides(*sides: Iterable[Path]) -> list[list[Dataset]]:
    """Likewise, of several sides that are compared: what is on two of them is read for each.

    Raises:
        DataError: Likewise.
    """
    found: list[dict[tuple[Path, ...], tuple[Layout, Place]]] = []
    for paths in sides:
        found.append({})
        for path in paths:
            for layout, place in _places_at(path):  # once, where it is below two of the paths
                what = (place.folder.resolve(), *(table.resolve() for table in place.tables))
                found[-1].setdefault(what, (layout, place))
    names = _names(place for side in found for _, place in side.values())
    return [
        [
            read_dataset(layout, replace(place, name=names[place.whole]))
            for layout, place in side.values()
        ]
        for side in found
    ]


def _places_at(path: Path) -> list[tuple[Layout, Place]]:
    found = list(find_places(path))
    if not found:
        why = "" if path.is_dir() or read_header(path) else " It is empty, or no CSV in UTF-8."
        raise DataError(
            f"{path} holds no dataset in a layout that is known here.{why} Known are: "
            f"{', '.join(layout.TITLE for layout in load_layouts())}."
        )
    return found


def _names(places: Iterable[Place]) -> dict[Path, str]:
    """What datasets are called: by as much of their paths as tells them from each other."""
    wholes = {place.whole: place.name for place in places}
    names = {}
    for whole, name in wholes.items():
        others = [other for other, same in wholes.items() if same == name and other != whole]
        parts = 1
        while any(other.parts[-parts:] == whole.parts[-parts:] for other in others):
            parts += 1
        names[whole] = "/".join(whole.parts[-parts:]) if parts > 1 else name
    return names


def read_dataset(layout: Layout, place: Place) -> Dataset:
    """Read one dataset.

    Raises:
        DataError: A table cannot be read.
    """
    faults = Faults()
    records = _once(layout.read(place, faults), place, faults)
    pairs = [
        (first, second)
        for table in place.tables_with(*PAIR_COLUMNS)
        for row in read_rows(table, set(PAIR_COLUMNS), faults)
        if (first := image_of(row, PAIR_COLUMNS[0])) and (second := image_of(row, PAIR_COLUMNS[1]))
    ]
    if not records and not pairs and not faults:
        named = ", ".join(map(str, place.tables)) or place.folder
        raise DataError(f"{named}: there are no rows ({layout.TITLE}).")
    for table in place.tables.keys() - faults.tables:
        faults.add(
            "unread table",
            f"{table} is not read: it is not a CSV file in UTF-8, lacks a column that "
            f"{layout.TITLE} has, or is one more of its tables.",
            fatal=False,
        )
    for record in records:
        if record.diagnosis and record.melanoma not in (None, record.diagnosis is Diagnosis.MEL):
            faults.add(
                "labels disagree",
                f"{place.folder}: {record.image} has the diagnosis {record.diagnosis}, and "
                f"melanoma is said to be {record.melanoma}, which is kept.",
                fatal=False,
            )
    return Dataset(layout, place, records, faults, pairs)


def gather(datasets: Iterable[Dataset]) -> tuple[list[Record], list[tuple[str, str]]]:
    """All records and listed pairs of some datasets.

    Raises:
        DataError: One has a fault that must be mended first, or two have an image in common that
            they call by one name.
    """
    records: list[Record] = []
    pairs: list[tuple[str, str]] = []
    where: dict[tuple[str, str], Place] = {}
    for dataset in datasets:
        dataset.faults.raise_fatal()
        for record in dataset.records:
            other = where.setdefault((record.dataset, record.image), dataset.place)
            if other is not dataset.place:
                raise DataError(
                    f"{record.image} of {record.dataset} is in {other.whole} and in "
                    f"{dataset.place.whole}. Name one of the two alone, or move one elsewhere."
                )
        records += dataset.records
        pairs += dataset.pairs
    return records, pairs


def _once(records: list[Record], place: Place, faults: Faults) -> list[Record]:
    """Each image of a dataset once: rows that complete each other are one; others are a fault."""
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.dataset, record.image)
        before = kept.get(key)
        if before is None:
            kept[key] = record
            continue
        kept[key], differing = merge(before, record)
        if differing or before == record:
            faults.add(
                "repeated row",
                f"{place.folder}: the image {record.image} stands in two rows, which "
                + (f"disagree ({', '.join(differing)})." if differing else "agree."),
                fatal=bool(differing),
            )
    return list(kept.values())


def challenge_split(table: Path) -> Split | None:
    """What a table of an ISIC challenge holds out, by its name: its images are not to train on.

    `ISIC_2019_Test_GroundTruth.csv` and the like; None of a training table, or of any other.
    """
    found = _HELD_OUT.match(table.stem.lower())
    return Split(found[1]) if found else None


def image_of(row: Row, *columns: str) -> str | None:
    """The image that a row is of, in canonical spelling."""
    value = row.required(*columns)
    return None if value is None else name_of(value)


def name_of(cell: str) -> str:
    """An image's name in a cell that may hold a path: its ISIC id, or its name without suffix."""
    name = PureWindowsPath(cell).name
    return isic_id(name) or without_suffix(name)


def without_suffix(name: str) -> str:
    """A name, or a path, without the suffix of an image file where it has one."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in images.SUFFIXES else name


def merge(record: Record, other: Record) -> tuple[Record, list[str]]:
    """The record with its gaps filled from the other, and the fields in which they disagree."""
    gaps: dict[str, object] = {}
    differing = []
    for field in fields(Record):
        ours, theirs = getattr(record, field.name), getattr(other, field.name)
        if ours in (None, "") and theirs not in (None, ""):
            gaps[field.name] = theirs
        elif theirs not in (None, "") and ours != theirs:
            differing.append(field.name)
    return (replace(record, **gaps) if gaps else record), differing  # type: ignore[arg-type]  # fields by name: types are theirs


def _may_be_table(file: Path) -> bool:
    # Harvard's Dataverse gives HAM10000's table without a suffix.
    named = file.suffix.lower() in SUFFIXES or file.name == "HAM10000_metadata"
    return named and file.is_file()


def image_files(folder: Path) -> Iterator[Path]:
    """Image files below a folder, hidden ones aside.

    Raises:
        OSError: A folder cannot be read.
    """
    return files_below(folder, images.SUFFIXES, _refuse)


def table_files(folder: Path) -> Iterator[Path]:
    """Tables below a folder, hidden ones aside.

    Raises:
        OSError: A folder cannot be read.
    """
    return files_below(folder, SUFFIXES, _refuse)


def _refuse(error: OSError) -> None:
    raise error
