"""Text files as people have them: how they are encoded, and what separates their cells."""

from pathlib import Path


def encoding_of(path: Path) -> str:
    """UTF-8, with or without its mark, or UTF-16 with its mark."""
    with path.open("rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def delimiter_of(header: str) -> str:
    """A comma, a semicolon or a tab, whichever the header has most of."""
    return max(",;\t", key=header.count)
