"""CSV tables read with errors that name the file, the row and the column."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from training.data.manifest import DataError

Vocabulary = TypeVar("Vocabulary", bound=StrEnum)
MISSING = frozenset({"", "unknown", "na", "nan", "none"})


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table, and where it stands."""

    path: Path
    number: int
    cells: dict[str, str]

    def text(self, column: str) -> str | None:
        """The cell, stripped; None where it is empty or says that the value is unknown."""
        value = (self.cells.get(column) or "").strip()
        return None if value.lower() in MISSING else value

    def age(self, column: str) -> float | None:
        """The cell as an age in years.

        Raises:
            DataError: It is not a number from 0 to 120.
        """
        value = self.text(column)
        try:
            age = None if value is None else float(value)
        except ValueError:
            age = -1.0
        if age is not None and not 0 <= age <= 120:
            raise self.error(column, "an age in years")
        return age

    def choice(self, column: str, choices: dict[str, Vocabulary | None]) -> Vocabulary | None:
        """The cell, translated by `choices` (keys in lower case).

        Raises:
            DataError: It is not one of them.
        """
        value = self.text(column)
        if value is None:
            return None
        if value.lower() not in choices:
            raise self.error(column, f"one of {', '.join(choices)}")
        return choices[value.lower()]

    def error(self, column: str, expected: str) -> DataError:
        """An error that names this cell."""
        return DataError(
            f"{self.path}, row {self.number}, column {column}: "
            f"{self.cells.get(column)!r} is not {expected}."
        )


def read_rows(path: Path, columns: set[str]) -> Iterator[Row]:
    """The rows of a CSV file that has at least these columns.

    Raises:
        DataError: The file is missing, is not text in UTF-8, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := columns - set(reader.fieldnames or ()):
                raise DataError(f"{path}: the column {sorted(missing)[0]} is missing.")
            for number, cells in enumerate(reader, start=2):
                yield Row(path, number, cells)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}.") from None
