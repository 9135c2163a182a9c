"""What every command of the command line says alike."""

import os
import sys
from typing import NoReturn

from rich.console import Console
from rich.table import Table

NOTICE = "Research software, not a medical device."


# Columns where it is no terminal that is written to, whose lines are searched.
_WIDE = 200


def add_row(table: Table, *cells: str) -> None:
    """Add a row; what a stranger calls a file moves nothing on the terminal."""
    table.add_row(*(printable(cell) for cell in cells))


def show(table: Table) -> None:
    """Print a table; what a bundle, a key or a file is called may look like markup, and is none."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
    Console(markup=False, emoji=False, width=width).print(table)


def printable(text: str) -> str:
    """The text with its control characters written out, as Python would."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Say what is wrong, and exit."""
    print(f"mmtl: {printable(sentence)}", file=sys.stderr)
    raise SystemExit(status)
