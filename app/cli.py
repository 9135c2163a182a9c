"""The command line: `mmtl serve | bench | predict`, and what other modules add to it."""

import asyncio
import gc
import io
import json
import logging
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from math import isfinite
from pathlib import Path
from socket import socket
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app import bundle_commands, key_commands, load, problems, reference_commands
from app.access import Exposed, check_exposure
from app.audit import AuditError
from app.console import NOTICE, add_row, fail, printable, show
from app.engines import EngineError, warm_up_failed
from app.keys import KeysError
from app.main import API_VERSION, create_app
from app.predictor import DIGITS
from app.problems import Kind, Problem
from app.processes import (
    LISTENS,
    WARM,
    Place,
    PortTaken,
    be_watched,
    check_address,
    supervise,
)
from app.schemas import Failure, ModelFacts, PredictResponse, Result, Success
from app.server import Server, allow_files, keep_no_core
from app.settings import PREFIX, Settings, SettingsError, load_settings
from app.siblings import Siblings
from app.spans import SpansError
from app.tables import open_table
from app.telemetry import configure_logs
from app.trace import Trace
from app.uploads import Upload
from models.bundle import BundleError
from models.calibration import CalibrationError
from models.files import files_below
from models.images import SUFFIXES
from models.turns import allow_at_once, most_at_once

_WITHOUT_CALLERS = {
    "deadline_seconds": 86_400.0,
    "audit_log": None,
    "keys": None,
    "jwt_issuer": None,
    "jwt_audience": None,
    "jwt_jwks_url": None,
    "traces": False,
}
_OBJECTS_PER_COLLECTION = 20_000
_MANY_CORES = 8
# Beyond the deadline of what was accepted: for uploads that never end, and for closing.
_PATIENCE_SECONDS = 15.0
_EXPECTED = (
    AuditError,
    BundleError,
    CalibrationError,
    EngineError,
    Exposed,
    KeysError,
    PortTaken,
    SettingsError,
    SpansError,
    Problem,
    load.LoadError,
)

# No problem of the service's, which is sent no paths.
_UNREADABLE_FILE = Kind("unreadable-file", 422, "The file cannot be read")

log = structlog.get_logger()
cli = typer.Typer(no_args_is_help=True, add_completion=False)
cli.add_typer(key_commands.cli, name="keys")
cli.add_typer(bundle_commands.cli, name="bundle")
cli.add_typer(reference_commands.cli)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"mmtl {metadata.version('mmtl')}, API {API_VERSION}")
        raise typer.Exit


@cli.callback(help=f"Serve M-MTL. {NOTICE}")
def root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """What comes before a command."""


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be more than a terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    with _in_a_sentence():
        cli()


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    try:
        yield
    except _EXPECTED as error:
        fail(str(error))
    except OSError as error:
        where = error.filename2 or error.filename
        fail(f"{f'{where}: ' if where else ''}{error.strerror or error}.")


@cli.command()
def serve(
    check: Annotated[
        bool, typer.Option("--check", help="Validate settings and bundle, and exit.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="`auto`, `cpu` or `cuda:0`; before MMTL_DEVICE.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without API keys.")
    ] = False,
) -> None:
    """Serve the bundle. Everything is set by MMTL_* variables: see docs/settings.md."""
    if device is not None:
        os.environ[f"{PREFIX}DEVICE"] = device
    settings = load_settings()
    check_exposure(settings, insecure)
    configure_logs("WARNING" if check else settings.log_level)
    if settings.processes > 1 and not check:
        raise SystemExit(
            supervise(
                _serve_beside,
                settings.processes,
                settings.host,
                settings.port,
                settings.deadline_seconds + _PATIENCE_SECONDS,
            )
        )
    cores = settings.cores
    if cores >= _MANY_CORES and not check:
        log.info("several processes may answer more", cores=cores, setting=f"{PREFIX}PROCESSES")
    _tune(settings, processes=1)
    if check:
        audit_log = settings.audit_log and settings.audit_log.resolve()  # a link stays
        made = audit_log is not None and not audit_log.exists()
        try:
            app = create_app(settings.share())
        finally:
            if made and audit_log is not None:  # the service's user may be another one
                with suppress(OSError):
                    audit_log.unlink()
        facts = app.state.networks.current.facts
        print(f"ok: {facts.name} {facts.version} on {settings.host}:{settings.port}")
        return
    check_address(settings.host, settings.port)
    allow_files(settings.max_connections)
    keep_no_core()
    # Until it takes signals itself: what it loads just now may be the old bundle.
    asked: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: asked.append(number))
    app = create_app(settings)

    def reload_if_asked() -> None:
        if asked:
            app.state.networks.hang_up()

    server = Server(app, settings)
    server.on_start = reload_if_asked
    _serve(server)


def _serve(server: Server, listener: socket | None = None) -> None:
    # Uvicorn's own lines of every request would repeat ours.
    logging.getLogger("uvicorn.access").disabled = True
    server.run(None if listener is None else [listener])
    if not server.started or server.failed:
        raise SystemExit(1)  # the log says why


def _tune(settings: Settings, processes: int) -> None:
    """What is of the whole process, one of so many (benchmarks/serving/steps.py)."""
    allow_at_once(most_at_once(settings.max_pixels_in_full, processes))
    # An answer makes hundreds of objects, none of them in cycles; all threads wait for each
    # collection.
    gc.set_threshold(_OBJECTS_PER_COLLECTION)


def _serve_beside(place: Place) -> None:
    """One of several processes."""
    be_watched(place)
    with _in_a_sentence():
        whole = load_settings()
        settings = whole.share()
        tempfile.tempdir = str(place.folder)  # which is removed, however this process ends
        _tune(settings, whole.processes)
        configure_logs(settings.log_level, place.number)
        allow_files(settings.max_connections)
        keep_no_core()
        said = False

        def may_listen() -> bool:
            nonlocal said
            try:
                if not said:
                    place.link.send(WARM)
                    said = True
                return place.link.poll() and place.link.recv() is None
            except (EOFError, OSError):  # the one that watches is gone: so will this be
                return False

        def say_that_it_listens() -> None:
            with suppress(OSError):
                place.link.send(LISTENS)

        siblings = Siblings(place.folder, place.number, whole.processes)
        server = Server(create_app(settings, siblings, may_listen), settings)
        # A stop that reaches all processes reaches this one once, by the one that watches.
        server.stops_on = {signal.SIGINT}
        server.on_start = say_that_it_listens
        _serve(server, place.listener())


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


@cli.command()
def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)
    ],
    explain: Annotated[
        bool, typer.Option("--explain", help="With heat maps; takes --json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The service's answer.")] = False,
    table: Annotated[
        Path | None,
        typer.Option("--csv", help="Write a table, for spreadsheets and `mmtl-train evaluate`."),
    ] = None,
) -> None:
    """Answer for image files, as the service would; exits with 1 if one could not be used."""
    if explain and not as_json:
        fail("--explain gives heat maps, which a table does not show: add --json.")
    if table is not None and as_json:
        fail("Choose one of --json and --csv.")
    unread: list[Failure] = []
    files = [file for path in images for file in _files_of(path, unread)]
    settings = load_settings().share()  # fewer threads may have another engine
    configure_logs("ERROR")
    _tune(settings, processes=1)
    # Nobody waits at the other end of a connection, nor has to be let in.
    settings = settings.model_copy(update=_WITHOUT_CALLERS)
    if table is not None:
        (folder,) = images if len(images) == 1 and images[0].is_dir() else (None,)
        _write_table(settings, files, folder, table, unread)
        return
    results: list[Result] = []
    trace = Trace("command-line")
    model = asyncio.run(
        _predict(settings, files, explain, trace, lambda _, found: results.extend(found))
    )
    results += unread
    answer = PredictResponse(request_id=trace.request_id, model=model, results=results)
    if as_json:
        print(answer.model_dump_json(exclude_unset=True, indent=2))
    else:
        _print_table(answer)
    if any(isinstance(result, Failure) for result in results):
        raise SystemExit(1)


def _files_of(path: Path, unread: list[Failure]) -> list[Path]:
    """The image files of a folder, whose folders that cannot be read are noted; else the file."""
    if not path.is_dir():
        return [path]
    errors: list[OSError] = []
    found = sorted(files_below(path, SUFFIXES, errors.append))
    unread += [_unreadable(Path(os.fsdecode(error.filename)), "folder", error) for error in errors]
    if not found and errors:
        raise errors[0]
    if not found:
        fail(f"{path} holds no image files ({', '.join(sorted(SUFFIXES))}).")
    return found


def _write_table(
    settings: Settings,
    images: list[Path],
    folder: Path | None,
    path: Path,
    unread: list[Failure],
) -> None:
    failures: list[Failure] = []
    with open_table(path, folder) as add:

        def take(paths: list[Path], results: list[Result]) -> None:
            add(paths, results)
            failures.extend(result for result in results if isinstance(result, Failure))

        asyncio.run(_predict(settings, images, False, Trace("command-line"), take))
        for failure in (*failures, *unread):
            print(printable(f"{failure.filename}: {failure.error.detail}"), file=sys.stderr)
        if len(failures) == len(images):
            fail("None of the images could be used: no table is written.", status=1)
    used = len(images) - len(failures)
    print(f"Wrote {path}: {used:,} of {len(images):,} images. {NOTICE}")
    if failures or unread:
        raise SystemExit(1)


async def _predict(
    settings: Settings,
    images: list[Path],
    explain: bool,
    trace: Trace,
    take: Callable[[list[Path], list[Result]], None],
) -> ModelFacts:
    """Give images and their results, some at a time; by which network they are."""
    app = create_app(settings)
    predictor = app.state.predictor
    model: ModelFacts = app.state.networks.current.facts
    async with app.router.lifespan_context(app):
        if not await asyncio.to_thread(app.state.networks.current.batcher.wait_ready):
            raise warm_up_failed()
        # To a terminal alone, and gone when it is done.
        shown = Console(stderr=True)
        few = len(images) <= settings.max_files
        with Progress(console=shown, transient=True, disable=few) as progress:
            bar = progress.add_task("images", total=len(images))
            for paths, part in _parts(images, settings):
                whole = [one for one in part if isinstance(one, Upload)]
                found: Iterator[Result] = iter(())
                if whole:
                    model, answered = await predictor.predict(whole, explain, trace)
                    found = iter(answered)
                take(paths, [next(found) if isinstance(one, Upload) else one for one in part])
                progress.advance(bar, len(paths))
                del part, whole  # before others are read
    return model


def _parts(
    images: list[Path], settings: Settings
) -> Iterator[tuple[list[Path], list[Upload | Failure]]]:
    """Files as if they had been posted, no more at a time than a request may have, nor bytes."""
    paths: list[Path] = []
    part: list[Upload | Failure] = []
    size = 0
    for path in images:
        one = _read(path, settings.max_bytes)
        further = len(one.data) if isinstance(one, Upload) else 0
        if part and (len(part) == settings.max_files or size + further > settings.max_bytes):
            yield paths, part
            paths, part, size = [], [], 0
        paths.append(path)
        part.append(one)
        size += further
    if part:
        yield paths, part


def _read(path: Path, most: int) -> Upload | Failure:
    """A file as if it had been posted; of one that is too large no more is read."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        return _unreadable(path, "file", error)
    if len(data) > most:
        detail = f"The file has more than {most:,} bytes, the most that is accepted."
        problem = Problem(problems.IMAGE_TOO_LARGE, detail)
        return Failure(filename=_in_text(path), status="error", error=problem.body())
    return Upload(_in_text(path), data)


def _unreadable(path: Path, what: str, error: OSError) -> Failure:
    problem = Problem(_UNREADABLE_FILE, f"The {what} cannot be read: {error.strerror}.")
    return Failure(filename=_in_text(path), status="error", error=problem.body())


def _in_text(path: Path) -> str:
    """A name, which may be other bytes than UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _told_apart(*numbers: float) -> list[str]:
    """In three digits, or as many more of what an answer has as tell them apart."""
    for digits in range(3, DIGITS + 1):
        found = [f"{number:.{digits}f}" for number in numbers]
        if len(set(found)) == len(found):
            break
    return found


def _print_table(answer: PredictResponse) -> None:
    table = Table(title=printable(f"{answer.model.name} {answer.model.version}"), caption=NOTICE)
    for column in ("image", "melanoma", "decision", "age", "site", "warnings"):
        table.add_column(column, overflow="fold")  # a warning that is cut off is none
    for result in answer.results:
        if isinstance(result, Success):
            found = result.prediction
            probability, threshold = _told_apart(
                found.melanoma.probability, found.melanoma.threshold
            )
            add_row(
                table,
                result.filename or "",
                probability,
                f"{found.melanoma.decision} ({threshold})".replace("_", " "),
                f"{found.age.label} ({found.age.years:.0f} years)",
                found.site.label,
                ", ".join(result.quality.warnings).replace("_", " "),
            )
        else:
            detail = result.error.detail
            add_row(table, result.filename or "", "", "error", "", "", detail)
    show(table)
