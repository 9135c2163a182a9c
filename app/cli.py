"""The command line: `mmtl serve`, and what other modules add to it."""

import io
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from socket import socket
from typing import Annotated

import structlog
import typer

from app import bench_command, bundle_commands, key_commands, predict_command, reference_commands
from app.access import Exposed, check_exposure
from app.audit import AuditError
from app.console import NOTICE, fail
from app.engines import EngineError
from app.keys import KeysError
from app.load import LoadError
from app.main import API_VERSION, create_app
from app.problems import Problem
from app.processes import (
    LISTENS,
    WARM,
    Place,
    PortTaken,
    be_watched,
    check_address,
    supervise,
)
from app.server import Server, allow_files, keep_no_core, tune
from app.settings import PREFIX, SettingsError, load_settings
from app.siblings import Siblings
from app.spans import SpansError
from app.telemetry import configure_logs
from models.bundle import BundleError
from models.calibration import CalibrationError

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
    LoadError,
)

log = structlog.get_logger()
cli = typer.Typer(no_args_is_help=True, add_completion=False)
cli.add_typer(bench_command.cli)
cli.add_typer(predict_command.cli)
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
    tune(settings, processes=1)
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


def _serve_beside(place: Place) -> None:
    """One of several processes."""
    be_watched(place)
    with _in_a_sentence():
        whole = load_settings()
        settings = whole.share()
        tempfile.tempdir = str(place.folder)  # which is removed, however this process ends
        tune(settings, whole.processes)
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
