"""The command line: serve, bench, predict, bundles, settings, the OpenAPI description."""

import asyncio
import json
import logging
import os
import re
import sys
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app import load
from app.batcher import Batcher
from app.engines import EngineError, load_engine
from app.main import build_api, create_app
from app.memory import keep_freed_memory
from app.problems import Problem
from app.schemas import Failure, PredictResponse, Success
from app.settings import PREFIX, Settings, SettingsError, load_settings
from app.telemetry import configure_logs
from app.trace import Trace
from app.uploads import Upload
from models.bundle import BundleError, load_bundle
from models.calibration import CalibrationError
from models.recalibration import (
    change_prevalence,
    differences,
    read_outcomes,
    recalibrate,
    save_recalibrated,
)

NOTICE = "Research software, not a medical device."
_EXPECTED = (BundleError, CalibrationError, EngineError, SettingsError, Problem, load.LoadError)

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=f"Serve M-MTL. {NOTICE}")
bundle_cli = typer.Typer(no_args_is_help=True, help="Look at bundles, and recalibrate them.")
cli.add_typer(bundle_cli, name="bundle")


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 2."""
    try:
        cli()
    except _EXPECTED as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror}.")


def fail(sentence: str) -> NoReturn:
    """Say what is wrong, and exit with status 2."""
    print(f"mmtl: {sentence}", file=sys.stderr)
    raise SystemExit(2)


@cli.command()
def serve(
    check: Annotated[
        bool, typer.Option("--check", help="Validate settings and bundle, and exit.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="`auto`, `cpu` or `cuda:0`; before MMTL_DEVICE.")
    ] = None,
) -> None:
    """Serve the bundle. Everything is set by MMTL_* variables: see docs/settings.md."""
    if device is not None:
        os.environ[f"{PREFIX}DEVICE"] = device
    settings = load_settings()
    configure_logs("WARNING" if check else settings.log_level)
    keep_freed_memory()
    app = create_app(settings)
    if check:
        facts = app.state.predictor.model
        print(f"ok: {facts.name} {facts.version} on {settings.host}:{settings.port}")
        return
    # Uvicorn's own lines of every request would repeat ours.
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # What was admitted has its deadline; a caller who never ends an upload has this.
        timeout_graceful_shutdown=ceil(settings.deadline_seconds) + 5,
    )
    server = Server(config, app.state.predictor.batcher)
    server.run()
    if not server.started:
        raise SystemExit(1)  # uvicorn has logged why: a port in use, most often


class Server(uvicorn.Server):
    """Uvicorn, which tells the batcher of a stop before it waits for open requests."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher):
        super().__init__(config)
        self._batcher = batcher

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT and SIGTERM."""
        self._batcher.drain()
        super().handle_exit(sig, frame)


@cli.command()
def bench(
    url: Annotated[str, typer.Argument(help="Of a running service: http://127.0.0.1:8000.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="JPEG files, sent in turn; without any, some are drawn."),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Each sends when it has an answer (1, 8 and 32 by default)."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Instead: images a second, arriving by chance."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each load.")] = 10.0,
    header: Annotated[
        list[str] | None, typer.Option(help="Further ones: `Authorization: Bearer …`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how much a running service answers, and how fast, to size a host."""
    pairs = [entry.partition(":") for entry in header or []]
    target = load.Target(
        url,
        [read(path).data for path in images or []] or load.draw_images(),
        [(name.strip(), value.strip()) for name, _, value in pairs],
    )
    measured = {
        count: load.run(target, count, seconds, rate).summary()
        for count in clients or ([load.OPEN_CLIENTS] if rate else [1, 8, 32])
    }
    if as_json:
        print(json.dumps(measured, indent=2))
        return
    title = f"{url}, {f'{rate:g} images/s arriving' if rate else 'closed loop'}"
    table = Table(title=title, caption="times in milliseconds")
    for column in ("clients", "images/s", "p50", "p95", "p99", "refused (503)", "failed"):
        table.add_column(column, justify="right")
    for count, found in measured.items():
        percentiles = [found[f"p{percent}_ms"] for percent in (50, 95, 99)]
        table.add_row(
            str(count),
            f"{found['images_per_second']:.1f}",
            *("" if value is None else f"{value:.1f}" for value in percentiles),
            str(found["refused"]),
            str(found["failed"]),
        )
    Console().print(table)


@cli.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    explain: Annotated[bool, typer.Option("--explain", help="With heat maps (JSON).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The service's answer.")] = False,
) -> None:
    """Answer for image files, as the service would; exits with 1 if one could not be used."""
    settings = load_settings()
    configure_logs("ERROR")
    answer = asyncio.run(_predict(settings, images, explain))
    if as_json:
        print(answer.model_dump_json(exclude_unset=True, indent=2))
    else:
        _print_table(answer)
    if any(isinstance(result, Failure) for result in answer.results):
        raise SystemExit(1)


async def _predict(settings: Settings, images: list[Path], explain: bool) -> PredictResponse:
    app = create_app(settings)
    predictor = app.state.predictor
    trace = Trace("command-line")
    results = []
    async with app.router.lifespan_context(app):
        while not predictor.batcher.ready:
            if not predictor.batcher.alive:
                raise EngineError("The network failed while it was warmed up.")
            await asyncio.sleep(0.005)
        for start in range(0, len(images), settings.max_files):
            part = [read(path) for path in images[start : start + settings.max_files]]
            results += await predictor.predict(part, explain, trace)
    return PredictResponse(request_id=trace.request_id, model=predictor.model, results=results)


def read(path: Path) -> Upload:
    """A file as if it had been posted; one that cannot be read ends the program."""
    try:
        return Upload(path.name, path.read_bytes())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}.")


def _print_table(answer: PredictResponse) -> None:
    table = Table(title=f"{answer.model.name} {answer.model.version}", caption=NOTICE)
    for column in ("image", "melanoma", "decision", "age", "site", "warnings"):
        table.add_column(column)
    for result in answer.results:
        if isinstance(result, Success):
            found = result.prediction
            table.add_row(
                result.filename,
                f"{found.melanoma.probability:.3f}",
                f"{found.melanoma.decision} ({found.melanoma.threshold:.3f})".replace("_", " "),
                f"{found.age.label} ({found.age.years:.0f} years)",
                found.site.label,
                ", ".join(result.quality.warnings),
            )
        else:
            table.add_row(result.filename, "", "error", "", "", result.error.detail)
    Console().print(table)


@bundle_cli.command()
def verify(folder: Annotated[Path, typer.Argument(help="A bundle.")]) -> None:
    """Check hashes, shapes and golden predictions of the artifacts that are there."""
    bundle = load_bundle(folder)
    settings = load_settings()
    for artifact in bundle.manifest.artifacts:
        if not bundle.path(artifact).is_file():
            print(f"absent   {artifact.file}")
        elif artifact.format != "onnx" and not settings.trust_torch:
            print(f"hash ok  {artifact.file} (not run: MMTL_TRUST_TORCH is not set)")
        else:
            load_engine(bundle, artifact, settings)
            print(f"ok       {artifact.file}")


@bundle_cli.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole manifest.")] = False,
) -> None:
    """Show what a bundle is."""
    manifest = load_bundle(folder).manifest
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return
    table = Table(title=f"{manifest.name} {manifest.version}", caption=NOTICE, show_header=False)
    table.add_row("description", manifest.description)
    table.add_row("input", f"{manifest.input.height} x {manifest.input.width} pixels, RGB")
    for task in manifest.tasks:
        table.add_row(task.name, f"{task.kind}: {', '.join(task.labels)}")
    point = manifest.operating_point
    table.add_row(
        "threshold from",
        f"{point.criterion} on {point.dataset} ({point.images} images, {point.melanomas} "
        f"melanomas): sensitivity {point.sensitivity:.3f}, specificity {point.specificity:.3f}",
    )
    table.add_row("prevalence", f"{manifest.prevalence:.3f}")
    for artifact in manifest.artifacts:
        table.add_row(
            artifact.file,
            f"{artifact.format} {artifact.precision}, {artifact.bytes / 1e6:.1f} MB, "
            f"melanoma threshold {artifact.melanoma_threshold:.3f}",
        )
    for metric in manifest.metrics:
        table.add_row(
            f"{metric.name}, {metric.dataset}",
            f"{metric.value:.3f} (95 % interval {metric.low:.3f} to {metric.high:.3f}, "
            f"{metric.images} images)",
        )
    table.add_row("licence of the weights", manifest.training_data.licence)
    Console().print(table)


@bundle_cli.command("recalibrate")
def recalibrate_bundle(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new bundle's folder.")],
    outcomes: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns melanoma_logit and melanoma (1 or 0)."),
    ] = None,
    prevalence: Annotated[
        float | None, typer.Option(help="Share of melanoma among the images to come.")
    ] = None,
    sensitivity: Annotated[
        float, typer.Option(min=0.5, max=1, help="Of the new threshold, with --outcomes.")
    ] = 0.9,
    version: Annotated[
        str | None, typer.Option(help="Of the new bundle; by default the next patch version.")
    ] = None,
) -> None:
    """Fit a bundle to a clinic: to its own outcomes, or just to its share of melanoma."""
    bundle = load_bundle(folder)
    if (outcomes is None) == (prevalence is None):
        fail("Give either --outcomes or --prevalence.")
    if out.resolve() == folder.resolve():
        fail("--out is the bundle itself: a clinic may want the one before back.")
    if outcomes is not None:
        logits, melanoma = read_outcomes(outcomes)
        manifest = recalibrate(
            bundle.manifest, logits, melanoma, f"{outcomes.name} (recalibration)", sensitivity
        )
        how = f"fitted to {len(melanoma):,} outcomes, {int(melanoma.sum()):,} of them melanoma"
    else:
        if prevalence is None or not 0 < prevalence < 1:
            fail("--prevalence is a share between 0 and 1, such as 0.02.")
        manifest = change_prevalence(bundle.manifest, prevalence)
        how = f"to a prevalence of {prevalence:.2%}, from {bundle.manifest.prevalence:.2%}"
    if version is None:
        major, minor, patch = manifest.version.split(".")
        version = f"{major}.{minor}.{int(patch) + 1}"
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        fail("--version is of the form 1.2.3.")
    manifest = manifest.model_copy(update={"version": version})
    save_recalibrated(bundle, out, manifest, how)
    before, after = bundle.manifest.artifacts[0], manifest.artifacts[0]
    print(f"{out}: {manifest.name} {manifest.version}, {how}.")
    print(f"threshold {before.melanoma_threshold:.4f} -> {after.melanoma_threshold:.4f}")
    print(f"slope     {before.calibration.slope:.4f} -> {after.calibration.slope:.4f}")
    print(f"intercept {before.calibration.intercept:.4f} -> {after.calibration.intercept:.4f}")


@bundle_cli.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A bundle.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another one.", metavar="B")],
) -> None:
    """Show in what two bundles differ; exits with 1 if they do."""
    table = Table(title=f"A = {first}, B = {second}")
    for column in ("field", "A", "B"):
        table.add_column(column, overflow="fold")
    for row in differences(load_bundle(first).manifest, load_bundle(second).manifest):
        table.add_row(*map(escape, row))
    if not table.row_count:
        print("The bundles are the same.")
        return
    Console().print(table)
    raise SystemExit(1)


@cli.command()
def settings() -> None:
    """Print every setting, its default and its meaning, as a Markdown table."""
    print("# Settings\n\n<!-- Generated by `make docs`; do not edit. -->\n")
    print("| variable | default | meaning |\n|---|---|---|")
    for name, field in Settings.model_fields.items():
        default = "the shipped bundle" if name == "bundle" else json.dumps(field.default)
        print(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")


@cli.command()
def openapi() -> None:
    """Print the OpenAPI description."""
    print(json.dumps(build_api().openapi(), indent=2, sort_keys=True))
