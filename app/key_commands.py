"""`mmtl keys create | list | revoke`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from app.console import add_row, fail, printable, show
from app.keys import SCOPES, create_key, read_keys, revoke_key
from app.settings import load_settings

cli = typer.Typer(no_args_is_help=True, help="Make and revoke API keys.")
KeyFileOption = Annotated[
    Path | None, typer.Option("--file", help="The key file; MMTL_KEYS by default.")
]


@cli.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="predict (by default), metrics or admin; repeatable.")
    ] = None,
    per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests to /predict a minute; none is no limit.")
    ] = None,
    file: KeyFileOption = None,
) -> None:
    """Make a key, and print it: it cannot be read again."""
    scopes = tuple(each for each in SCOPES if each in (scope or ["predict"]))
    if unknown := set(scope or []) - set(SCOPES):
        fail(f"--scope {min(unknown)} is none of {', '.join(SCOPES)}.")
    path = _key_file(file)
    if sys.stdout is None:
        fail("Standard output is closed: nobody would see the key.")
    key = create_key(path, name, scopes, per_minute)
    try:
        print(key, flush=True)
    except OSError as error:  # a full disk, or nobody who reads
        revoke_key(path, key.split("_")[1])
        fail(f"The key could not be printed ({error.strerror}), and so was revoked: make another.")


@cli.command("list")
def list_keys(file: KeyFileOption = None) -> None:
    """Show the keys, without their secrets."""
    path = _key_file(file)
    table = Table(title=printable(str(path)))
    for column in ("id", "name", "scopes", "requests a minute", "created", "revoked"):
        table.add_column(column)
    for key in read_keys(path):
        limit = "" if key.per_minute is None else str(key.per_minute)
        revoked = f"{key.revoked:%Y-%m-%d %H:%M}" if key.revoked else ""
        scopes = ", ".join(key.scopes)
        row = (key.id, key.name, scopes, limit, f"{key.created:%Y-%m-%d %H:%M}", revoked)
        add_row(table, *row)
    show(table)


@cli.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The key's name or id.")], file: KeyFileOption = None
) -> None:
    """Revoke a key; a running service notices within a second."""
    key = revoke_key(_key_file(file), name)
    print(f"revoked {key.id} ({key.name})")


def _key_file(given: Path | None) -> Path:
    path = given or load_settings().keys
    if path is None:
        fail("Say which file: --file keys.json, or MMTL_KEYS.")
    return path
