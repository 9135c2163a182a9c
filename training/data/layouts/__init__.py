"""Dataset layouts as people have them on disk, one module each; a further layout is one file."""

import importlib
import os
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

from training.data.manifest import DataError, Record, isic_id
from training.data.tables import SUFFIXES, Faults, Row, read_header, read_rows

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
# How far below a given folder datasets are looked for.
_DEPTH = 4
_PAIR_COLUMNS = frozenset({"image_name_1", "image_name_2"})


@dataclass(frozen=True)
class Place:
    """A folder (or one table of it) that may hold a dataset.

    Attributes:
        folder: The folder.
        tables: Its tables, with their column names in lower case.
        name: Of the dataset, where the layout has none of its own.
    """

    folder: Path
    tables: dict[Path, frozenset[str]]
    name: str

    @classmethod
    def of(cls, path: Path) -> "Place":
        """Look at a folder, or at a table alone."""
        path = path.absolute()
        if path.is_file():
            return cls(path.parent, {path: read_header(path)}, path.stem)
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        return cls(path, {file: read_header(file) for file in files if file.is_file()}, path.name)

    def tables_with(self, *columns: str) -> list[Path]:
        """The tables that have all of these columns."""
        return [path for path, header in self.tables.items() if set(columns) <= header]

    @cached_property
    def pictures(self) -> dict[str, Path]:
        """Image files below the folder, by ISIC id or else by name without suffix."""
        found: dict[str, Path] = {}
        for path in self.files:
            found.setdefault(isic_id(path.name) or path.stem, path)
        return found

    @cached_property
    def files(self) -> list[Path]:
        """All image files below the folder, sorted."""
        return sorted(image_files(self.folder))

    def picture(self, image: str) -> str:
        """The path of an image, empty where there is none."""
        return str(self.pictures.get(image, ""))


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
    """
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    layouts = load_layouts()

    def look(folder: Path, depth: int) -> Iterator[tuple[Layout, Place]]:
        place = Place.of(folder)
        for layout in layouts:
            if layout.recognise(place):
                yield layout, place
                return
        if folder.is_dir() and depth > 0:
            for below in sorted(folder.iterdir()):
                if below.is_dir() and not below.name.startswith("."):
                    yield from look(below, depth - 1)

    yield from look(path, _DEPTH)


def read_datasets(paths: Iterable[Path]) -> list[Dataset]:
    """Every dataset at or below some paths, whatever its layout.

    Raises:
        DataError: Nothing is found at one of them, or a table cannot be read.
    """
    datasets = []
    for path in paths:
        found = list(find_places(path))
        if not found:
            raise DataError(
                f"{path} holds no dataset in a layout that is known here. Known are: "
                f"{', '.join(layout.TITLE for layout in load_layouts())}."
            )
        datasets += [read_dataset(layout, place) for layout, place in found]
    return datasets


def read_dataset(layout: Layout, place: Place) -> Dataset:
    """Read one dataset.

    Raises:
        DataError: A table cannot be read.
    """
    faults = Faults()
    records = _once(layout.read(place, faults), place, faults)
    if not records and not faults:
        raise DataError(f"{place.folder} has no rows ({layout.TITLE}).")
    pairs = [
        (first, second)
        for table in place.tables_with(*_PAIR_COLUMNS)
        for row in read_rows(table, set(_PAIR_COLUMNS), faults)
        if (first := row.required("image_name_1")) and (second := row.required("image_name_2"))
    ]
    return Dataset(layout, place, records, faults, pairs)


def gather(datasets: Iterable[Dataset]) -> tuple[list[Record], list[tuple[str, str]]]:
    """All records and listed pairs of some datasets.

    Raises:
        DataError: One has a fault that must be mended first.
    """
    records, pairs = [], []
    for dataset in datasets:
        dataset.faults.raise_fatal()
        records += dataset.records
        pairs += dataset.pairs
    return records, pairs


def _once(records: list[Record], place: Place, faults: Faults) -> list[Record]:
    """Each image once: equal rows are one, rows that disagree are a fault."""
    kept: dict[str, Record] = {}
    for record in records:
        before = kept.setdefault(record.image, record)
        if before is not record:
            same = before == record
            faults.add(
                "repeated row",
                f"{place.folder}: the image {record.image} stands in two rows"
                + (", which agree." if same else ", which disagree."),
                fatal=not same,
            )
    return list(kept.values())


def image_of(row: Row, *columns: str) -> str | None:
    """The image that a row is of, in canonical spelling."""
    value = row.required(*columns)
    return None if value is None else isic_id(value) or Path(value).stem


def image_files(folder: Path) -> Iterator[Path]:
    """Image files below a folder, hidden ones aside."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(parent, name)
