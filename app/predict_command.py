"""`mmtl predict`: the service's answers for image files, without a service."""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app import problems
from app.console import NOTICE, add_row, fail, printable, show
from app.engines import warm_up_failed
from app.main import create_app
from app.predictor import DIGITS
from app.problems import Kind, Problem
from app.schemas import Failure, ModelFacts, PredictResponse, Result, Success
from app.server import tune
from app.settings import Settings, load_settings
from app.tables import open_table
from app.telemetry import configure_logs
from app.trace import Trace
from app.uploads import Upload
from models.files import files_below
from models.images import SUFFIXES

cli = typer.Typer()
_WITHOUT_CALLERS = {
    "deadline_seconds": 86_400.0,
    "audit_log": None,
    "keys": None,
    "jwt_issuer": None,
    "jwt_audience": None,
    "jwt_jwks_url": None,
    "traces": False,
}
# No problem of the service's, which is sent no paths.
_UNREADABLE_FILE = Kind("unreadable-file", 422, "The file cannot be read")


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
    tune(settings, processes=1)
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
