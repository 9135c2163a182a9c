"""CSV tables as people have them, read with faults that name the file, the row and the column."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from training.data.manifest import OLDEST, DataError
from training.data.text import delimiter_of, encoding_of
from training.data.vocabulary import Term, diagnosis_of

Value = TypeVar("Value")
SUFFIXES = frozenset({".csv", ".tsv", ".tab"})
MISSING = frozenset({"", "unknown", "na", "n/a", "#n/a", "nan", "none", "null", "unk", "-"})
# Of ids: Kaggle's copies of ISIC 2019 name a patient -1 where they know none.
_NOBODY = frozenset({"-1", "-1.0"})


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in the data that is not as it should be.

    Attributes:
        kind: For counting: "bad value", "unknown value", "repeated row", ...
        message: A sentence that names the file, and the row and column where there are.
        fatal: Whether the data must not be used before it is mended.
    """

    kind: str
    message: str
    fatal: bool = True


class Faults(list[Fault]):
    """What was found wrong while reading, and which tables were read.

    Attributes:
        tables: The tables.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: set[Path] = set()

    def add(self, kind: str, message: str, fatal: bool = True) -> None:
        """Note a fault."""
        self.append(Fault(kind, message, fatal))

    def raise_fatal(self) -> None:
        """Refuse data with fatal faults.

        Raises:
            DataError: There is one; the first is told.
        """
        fatal = [fault for fault in self if fault.fatal]
        if fatal:
            more = f" ({len(fatal) - 1:,} more)" if len(fatal) > 1 else ""
            raise DataError(f"{fatal[0].message}{more} `mmtl-train data check` shows every fault.")


# Of a decimal, as half of Europe has it: no more than two places follow it.
_COMMA = re.compile(r"^(\d+),(\d{1,2})$")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table, and where it stands. A column may be given under several names."""

    path: Path
    number: int
    cells: Mapping[str, str | None]
    faults: Faults

    def text(self, *columns: str) -> str | None:
        """The first of these cells that holds something; None where all say "unknown"."""
        for column in columns:
            value = (self.cells.get(column) or "").strip()
            if value.lower() not in MISSING:
                return value
        return None

    def identity(self, *columns: str) -> str | None:
        """Likewise, of a lesion or a patient."""
        value = self.text(*columns)
        return None if value in _NOBODY else value

    def age(self, *columns: str) -> float | None:
        """The cell as an age in years, 0 to 120."""
        value = self.text(*columns)
        try:
            age = None if value is None else float(_COMMA.sub(r"\1.\2", value))
        except ValueError:
            age = -1.0
        if age is not None and not 0 <= age <= OLDEST:
            self._bad(columns, value, "an age in years")
            return None
        return age

    def choice(self, choices: Mapping[str, Value], *columns: str) -> Value | None:
        """The cell, translated by `choices` (keys in lower case). Another value is a fault."""
        value = self.text(*columns)
        if value is not None and value.lower() not in choices:
            self._bad(columns, value, f"one of {', '.join(choices)}")
        return None if value is None else choices.get(value.lower())

    def word(self, choices: Mapping[str, Value], *columns: str) -> Value | None:
        """Likewise, for vocabularies that grow: another value is noted, and means nothing."""
        value = self.text(*columns)
        if value is not None and value.lower() not in choices:
            self._unknown(columns, value, f"one of {', '.join(choices)}")
        return None if value is None else choices.get(value.lower())

    def diagnosis(self, *columns: str) -> Term:
        """The cell as a diagnosis in words. An unheard-of one is noted, and means nothing."""
        value = self.text(*columns)
        if value is None:
            return Term(None, None)
        term = diagnosis_of(value)
        if not term.known:
            self._unknown(columns, value, "a diagnosis that is known here")
        return term

    def required(self, *columns: str) -> str | None:
        """The cell, which must not be empty."""
        value = self.text(*columns)
        if value is None:
            self.faults.add("bad value", f"{self.where(columns)} is empty.")
        return value

    def where(self, columns: tuple[str, ...], value: str | None = None) -> str:
        """File, row and column, for a message."""
        held = [c for c in columns if (self.cells.get(c) or "").strip() == (value or "")]
        present = [c for c in columns if c in self.cells]
        return f"{self.path}, row {self.number}, column {(held or present or list(columns))[0]}"

    def _unknown(self, columns: tuple[str, ...], value: str, expected: str) -> None:
        self.faults.add(
            "unknown value",
            f"{self.where(columns, value)}: {value!r} is not {expected}; the image keeps its other "
            "labels.",
            fatal=False,
        )

    def _bad(self, columns: tuple[str, ...], value: str | None, expected: str) -> None:
        self.faults.add("bad value", f"{self.where(columns, value)}: {value!r} is not {expected}.")


def read_header(path: Path) -> frozenset[str]:
    """The column names of a table, in lower case; none where it is no table.

    Raises:
        OSError: It cannot be read.
    """
    try:
        # What follows the header may be in another encoding, which is for `read_rows` to say.
        with path.open(newline="", encoding=encoding_of(path), errors="replace") as file:
            line = file.readline()
        names = _names(next(csv.reader([line], delimiter=delimiter_of(line)), []))
    except (UnicodeError, csv.Error):
        return frozenset()
    text = not any("\ufffd" in name or "\0" in name for name in names)
    return frozenset(names if text else ())


def read_rows(path: Path, columns: set[str], faults: Faults) -> Iterator[Row]:
    """The rows of a CSV file that has at least these columns (in lower case).

    Commas, semicolons and tabs separate; UTF-8 and, with its mark, UTF-16 are read.

    Raises:
        DataError: The file is missing, is not such text, or lacks a column.
    """
    number = 1
    faults.tables.add(path)
    try:
        with path.open(newline="", encoding=encoding_of(path)) as file:
            line = file.readline()
            delimiter = delimiter_of(line)
            names = _names(next(csv.reader([line], delimiter=delimiter), []))
            if missing := columns - set(names):
                raise DataError(f"{path}: the column {sorted(missing)[0]} is missing.")
            if repeated := {name for name in names if name and names.count(name) > 1}:
                raise DataError(f"{path}: the column {min(repeated)} stands twice.")
            for number, cells in enumerate(csv.reader(file, delimiter=delimiter), start=2):
                if any(cell.strip() for cell in cells):
                    if len(cells) != len(names):
                        faults.add(
                            "bad row",
                            f"{path}, row {number}: {len(cells)} cells, where the header has "
                            f"{len(names)} columns.",
                        )
                        continue
                    yield Row(path, number, dict(zip(names, cells, strict=True)), faults)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeError, csv.Error) as error:
        raise DataError(
            f"{path}, after row {number}: it is not a CSV file in UTF-8: {error}."
        ) from None


def _names(cells: list[str]) -> list[str]:
    """Of columns: `Patient ID` is `patient_id`, and `age:0-29` what it is."""
    names = [cell.strip().lower() for cell in cells]
    return [name if ":" in name else re.sub(r"[\s-]+", "_", name) for name in names]
