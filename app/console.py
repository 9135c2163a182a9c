"""What every command of the command line says alike."""

import sys
from typing import NoReturn

NOTICE = "Research software, not a medical device."


def fail(sentence: str) -> NoReturn:
    """Say what is wrong, and exit with status 2."""
    print(f"mmtl: {sentence}", file=sys.stderr)
    raise SystemExit(2)
