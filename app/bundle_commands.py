"""`mmtl bundle verify | sign | inspect | recalibrate | diff`."""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from app.console import NOTICE, add_row, fail, printable, show
from app.engines import load_engine
from app.settings import load_settings
from app.telemetry import configure_logs
from models.bundle import (
    MANIFEST,
    VERSION,
    Artifact,
    Bundle,
    OperatingPoint,
    check_replaceable,
    load_bundle,
)
from models.calibration import SENSITIVITY
from models.recalibration import (
    OUTCOMES,
    change_prevalence,
    differences,
    read_outcomes,
    recalibrate,
    save_recalibrated,
)
from models.signatures import SIGNATURE, SignatureError
from models.signatures import sign as write_signature

cli = typer.Typer(no_args_is_help=True, help="Look at bundles, and recalibrate them.")


@cli.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    signed_by: Annotated[
        Path | None, typer.Option(help="Public key (PEM) that it must be signed with.")
    ] = None,
) -> None:
    """Check hashes, shapes and golden predictions of the artifacts that are there."""
    settings = load_settings()
    configure_logs("WARNING")
    bundle = load_bundle(folder, signed_by or settings.bundle_signed_by)
    for artifact in bundle.manifest.artifacts:
        if not bundle.path(artifact).is_file():
            print(f"absent   {artifact.file}")
        elif artifact.format != "onnx" and not settings.trust_torch:
            print(f"hash ok  {artifact.file} (not run: MMTL_TRUST_TORCH is not set)")
        else:
            load_engine(bundle, artifact, settings)
            print(f"ok       {artifact.file}")


@cli.command()
def sign(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    key: Annotated[Path, typer.Option(help="Private key: openssl genpkey -algorithm ed25519.")],
) -> None:
    """Sign a bundle; a service with MMTL_BUNDLE_SIGNED_BY takes no other."""
    bundle = load_bundle(folder)  # nothing is signed that does not hold together
    content = (folder / MANIFEST).read_bytes()
    if hashlib.sha256(content).hexdigest() != bundle.manifest_sha256:
        fail(f"{folder} has changed while it was verified: it is not signed.")
    try:
        write_signature(content, key, folder / SIGNATURE)
    except SignatureError as error:
        fail(f"{error}.")
    print(f"signed   {folder / SIGNATURE}")


@cli.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole manifest.")] = False,
) -> None:
    """Show what a bundle is."""
    manifest = _load(folder).manifest
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return
    table = Table(
        title=printable(f"{manifest.name} {manifest.version}"), caption=NOTICE, show_header=False
    )
    add_row(table, "description", manifest.description)
    add_row(table, "input", f"{manifest.input.height} x {manifest.input.width} pixels, RGB")
    for task in manifest.tasks:
        add_row(table, task.name, f"{task.kind}: {', '.join(task.labels)}")
    add_row(table, "threshold from", _words(manifest.operating_point))
    add_row(table, "prevalence", f"{manifest.prevalence:.3f}")
    for artifact in manifest.artifacts:
        add_row(
            table,
            artifact.file,
            f"{artifact.format} {artifact.precision}, {artifact.bytes / 1e6:.1f} MB, "
            f"melanoma threshold {artifact.melanoma_threshold:.4f}",
        )
        if artifact.operating_point:
            add_row(table, "its threshold from", _words(artifact.operating_point))
    for metric in manifest.metrics:
        add_row(
            table,
            f"{metric.name}, {metric.dataset}",
            f"{metric.value:.3f} (95 % interval {metric.low:.3f} to {metric.high:.3f}, "
            f"{metric.images} images)",
        )
    add_row(table, "licence of the weights", manifest.training_data.licence)
    show(table)


def _words(point: OperatingPoint) -> str:
    return (
        f"{point.criterion} on {point.dataset} ({point.images} images, {point.melanomas} "
        f"melanomas): sensitivity {point.sensitivity:.3f}, specificity {point.specificity:.3f}"
    )


@cli.command("recalibrate")
def recalibrate_bundle(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new bundle's folder.")],
    outcomes: Annotated[
        Path | None,
        typer.Option(
            help="CSV: melanoma_probability, as the service answered, or melanoma_logit; and "
            "melanoma (1 or 0)."
        ),
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(help="File whose probabilities they are; by default what a CPU serves."),
    ] = None,
    prevalence: Annotated[
        float | None, typer.Option(help="Share of melanoma among the images to come.")
    ] = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(
            help="That the new threshold must reach, with --outcomes: 0.5 to 1 (0.9 by default)."
        ),
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Of the new bundle; by default the next patch version.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of a bundle that is in --out.")
    ] = False,
) -> None:
    """Fit a bundle to a clinic: to its own outcomes, or just to its share of melanoma."""
    bundle = _load(folder)
    if (outcomes is None) == (prevalence is None):
        fail("Give either --outcomes or --prevalence.")
    if folder.resolve().is_relative_to(out.resolve()):
        fail("--out is the bundle itself, or holds it: a clinic may want the one before back.")
    check_replaceable(out)
    if out.exists() and not replace:
        fail(f"{out} holds a bundle already: choose another folder, or say --replace.")
    replaced = [load_bundle(out).manifest.version] if out.exists() else []
    if sensitivity is not None and outcomes is None:
        fail("--sensitivity takes --outcomes: a new prevalence moves nobody over the threshold.")
    sensitivity = SENSITIVITY if sensitivity is None else sensitivity
    if not 0.5 <= sensitivity <= 1:
        fail("--sensitivity is a share from 0.5 to 1, such as 0.9.")
    before = _artifact(bundle, artifact)
    if outcomes is not None:
        logits, melanoma = read_outcomes(outcomes, before)
        name = os.fsencode(outcomes.name).decode(errors="replace")  # it may be no UTF-8
        manifest = recalibrate(bundle.manifest, logits, melanoma, f"{name} {OUTCOMES}", sensitivity)
        how = f"fitted to {len(melanoma):,} outcomes, {int(melanoma.sum()):,} of them melanoma"
    else:
        if prevalence is None or not 0 < prevalence < 1:
            fail("--prevalence is a share between 0 and 1, such as 0.02.")
        manifest = change_prevalence(bundle.manifest, prevalence)
        how = f"to a prevalence of {prevalence:.2%}, from {bundle.manifest.prevalence:.2%}"
    if version is None:
        major, minor, patch = max(map(_numbers, (manifest.version, *replaced)))
        version = f"{major}.{minor}.{patch + 1}"
    if not re.fullmatch(VERSION, version, re.ASCII):
        fail("--version is of the form 1.2.3.")
    manifest = manifest.model_copy(update={"version": version})
    signed = (out / SIGNATURE).exists()
    save_recalibrated(bundle, out, manifest, how)
    if signed:
        print(f"It is not signed, as the one before was: mmtl bundle sign {out}")
    after = manifest.artifacts[bundle.manifest.artifacts.index(before)]
    print(f"{out}: {manifest.name} {manifest.version}, {how}. Of {before.file}:")
    print(f"threshold {before.melanoma_threshold:.4f} -> {after.melanoma_threshold:.4f}")
    print(f"slope     {before.calibration.slope:.4f} -> {after.calibration.slope:.4f}")
    print(f"intercept {before.calibration.intercept:.4f} -> {after.calibration.intercept:.4f}")


def _load(folder: Path) -> Bundle:
    """A bundle; where the service takes none that is not signed, neither do the commands."""
    return load_bundle(folder, load_settings().bundle_signed_by)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _artifact(bundle: Bundle, file: str | None) -> Artifact:
    """The artifact of a file name; without one, what a CPU serves."""
    if file is None:
        return bundle.artifact_for_cpu()
    for artifact in bundle.manifest.artifacts:
        if artifact.file == file:
            return artifact
    files = ", ".join(artifact.file for artifact in bundle.manifest.artifacts)
    fail(f"--artifact {file} is none of {files}.")


@cli.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A bundle.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another one.", metavar="B")],
) -> None:
    """Show in what two bundles differ; exits with 1 if they do."""
    table = Table(title=printable(f"A = {first}, B = {second}"))
    for column in ("field", "A", "B"):
        table.add_column(column, overflow="fold")
    for row in differences(_load(first).manifest, _load(second).manifest):
        add_row(table, *row)
    if not table.row_count:
        print("The bundles are the same.")
        return
    show(table)
    raise SystemExit(1)
