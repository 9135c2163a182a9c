"""`mmtl bench`: how much a running service answers, and how fast."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from app import load
from app.console import add_row, fail, printable, show

cli = typer.Typer()


@cli.command()
def bench(
    url: Annotated[str, typer.Argument(help="Of a running service: http://127.0.0.1:8000.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="JPEG files, sent in turn; without any, some are drawn."),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="How many; each sends when it has an answer (1, 8 and 32 by default).",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Instead: images a second, arriving by chance."),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Of each load, after a second of warm-up: a closed loop's lasts until all "
            "clients had an answer.",
        ),
    ] = 10.0,
    reconnect_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Answers, after which a client opens another connection: several processes on "
            "one port share them better then.",
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="Further headers: `Name: value`, or `@FILE` of a file with such lines, which no "
            "list of processes shows."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="With --rate: another one, other times of arrival.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how much a running service answers, and how fast, to size a host.

    An arriving image (--rate) waits for one of 128 connections. Exits with 1 if some requests
    failed, with 2 if none was answered; 503, which a full service answers, is no failure.
    """
    if not isfinite(seconds) or not isfinite(rate or 0.0):
        fail("--seconds and --rate are finite numbers.")
    pairs = [entry.partition(":") for given in header or [] for entry in _header_lines(given)]
    if any(not (name.strip() and colon) for name, colon, _ in pairs):
        fail("A --header is `Name: value`.")
    target = load.Target(
        url,
        [path.read_bytes() for path in images or []] or load.draw_images(),
        [(name.strip(), value.strip()) for name, _, value in pairs],
    )
    counts = clients or ([load.OPEN_CLIENTS] if rate else [1, 8, 32])
    if as_json and len(set(counts)) < len(counts):
        fail("--json has one load for each number of clients: name each once.")
    measured: list[tuple[int, dict[str, Any]]] = []
    broke_off = ""
    for count in counts:
        try:
            found = load.run(
                target, count, seconds, rate=rate, reconnect_every=reconnect_every, seed=seed
            ).summary()
            measured.append((count, found))
        except load.LoadError as error:
            if not measured:
                raise
            broke_off = f"With {count} clients: {error}"
            break
        if found["statuses"] and "200" not in found["statuses"]:
            break  # nor would it answer more clients
    if as_json:
        print(json.dumps(dict(measured), indent=2))
    else:
        _print_loads(f"{url}, {f'{rate:g} images/s arriving' if rate else 'closed loop'}", measured)
    if broke_off:
        fail(broke_off)
    statuses = sum((Counter(found["statuses"]) for _, found in measured), Counter[str]())
    if not statuses:
        fail(
            "No request was sent in the measured time: all clients waited for earlier answers. "
            "Give more --seconds."
        )
    quota = (
        " 429 is the key's quota, and no limit of the host: give a key without one."
        if "429" in statuses
        else ""
    )
    if "200" not in statuses:
        fail(f"No request was answered with 200: {_in_words(statuses)}.{quota}")
    if not any(found["images_per_second"] for _, found in measured):
        fail("No answer came in the measured time: give more --seconds.")
    if failed := {status: n for status, n in statuses.items() if status not in ("200", "503")}:
        fail(f"Some requests failed: {_in_words(failed)}.{quota}", status=1)


def _header_lines(given: str) -> list[str]:
    if not given.startswith("@"):
        return [given]
    try:
        lines = Path(given[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        fail(f"--header {given}: the file cannot be read: {getattr(error, 'strerror', error)}.")
    return [line for line in lines if line.strip()]


def _in_words(statuses: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count:,} x {'no answer, the connection ended' if status == 'broken' else status}"
        for status, count in sorted(statuses.items())
    )


def _print_loads(title: str, measured: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    table = Table(title=printable(title), caption="times in milliseconds")
    for column in ("clients", "images/s", "p50", "p95", "p99", "refused (503)", "failed", "unsent"):
        table.add_column(column, justify="right")
    for count, found in measured:
        percentiles = [found[f"p{percent}_ms"] for percent in (50, 95, 99)]
        add_row(
            table,
            str(count),
            f"{found['images_per_second']:.1f}",
            *("" if value is None else f"{value:.1f}" for value in percentiles),
            str(found["refused"]),
            str(found["failed"]),
            str(found["unsent"]),
        )
    show(table)
