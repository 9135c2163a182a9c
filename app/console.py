"""What every command of the command line says alike."""

import sys
from typing import NoReturn

from rich.console import Console
from rich.table import Table

NOTICE = "Research software, not a medical device."


def show(table: Table) -> None:
    """Print a table; what a bundle, a key or a file is called may look like markup, and is none."""
    Console(markup=False, emoji=False).print(table)


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Say what is wrong, and exit."""
    print(f"mmtl: {sentence}", file=sys.stderr)
    raise SystemExit(status)
