"""`mmtl-train data | zoo | benchmark | prepare | fit | sweep | export | quantize | evaluate`."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from models.bundle import BundleError, load_bundle
from training.benchmark.cli import benchmark, zoo_cli
from training.config import Config, configure
from training.data.cli import cli as data_cli
from training.data.manifest import DataError, first_line
from training.data.vocabulary import LEARNED, Split
from training.run import Run

DEFAULT_RUN = Path("runs/default")
Folder = Annotated[Path, typer.Option("--run", help="The run's folder.")]
BundleFolder = Annotated[
    Path | None, typer.Option(help="The bundle's folder.", show_default="RUN/bundle")
]

# As torch says it, of a GPU's and of the machine's.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)

cli = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Train, evaluate and export M-MTL."
)
cli.add_typer(data_cli, name="data")
cli.add_typer(zoo_cli, name="zoo")
cli.command()(benchmark)


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text in any encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli()
    except (DataError, BundleError) as error:
        print(f"mmtl-train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        print(
            "mmtl-train: There is not enough memory: end other programs, or choose smaller images, "
            "fewer workers or a smaller batch_size, and run it again.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except OSError as error:
        # Of a copy, the second is where it was to go.
        where = error.filename2 or error.filename or "a file"
        what = error.strerror or first_line(error)
        if isinstance(error, NotADirectoryError | FileExistsError):  # as mkdir has it
            what = "it is, or stands in, a file where a folder is asked for"
        elif isinstance(error, IsADirectoryError):
            what = "it is a folder, and a file is asked for"
        print(f"mmtl-train: {where}: {what}.", file=sys.stderr)
        raise SystemExit(2) from None


@cli.command()
def prepare(
    data: Annotated[
        Path | None, typer.Argument(help="A folder with HAM10000 and whatever else is there.")
    ] = None,
    run: Folder = DEFAULT_RUN,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Instead: a manifest with its own splits.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML with any setting; flags go before it."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Of the zoo.", show_default=False)] = None,
    epochs: Annotated[int | None, typer.Option(show_default=False)] = None,
    size: Annotated[int | None, typer.Option(show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(show_default=False)] = None,
    train_on: Annotated[
        list[str] | None,
        typer.Option(help="Datasets of DATA to learn from, by name.", show_default=False),
    ] = None,
) -> None:
    """Read the data, split it, cache its pixels and freeze the run's configuration."""
    prepared = _preparation(data, manifest)
    from training.data.components import shared
    from training.data.manifest import load_manifest
    from training.distillation import TAUGHT
    from training.tasks import untaught

    flags = {"backbone": backbone, "epochs": epochs, "size": size, "seed": seed}
    frozen = configure(config, **flags, learning_rate=learning_rate, train_on=train_on)
    if manifest is not None and train_on:
        raise DataError("--train-on is for a folder: a manifest says itself what is learned from.")
    with Run(run).alone():
        counts = prepared(Run(run), frozen)
    for (dataset, split), images in sorted(counts.items()):
        print(f"{dataset:24} {split:12} {images:7,}")
    records = load_manifest(Run(run).manifest)
    tasks = set(untaught([record for record in records if record.split is Split.TRAIN]))
    tasks -= {"melanoma"} if frozen.teachers else set()
    if tasks:
        outcome = (
            f"the network keeps what {frozen.start_from} taught it of them, which grows wrong "
            "while the rest is learned (with that run's bundle as a teacher it stays true)"
            if frozen.start_from
            else "the network will find every class, or year of age, equally probable"
        )
        if tasks & set(TAUGHT) and frozen.teachers:
            outcome += ", but for the diagnosis, the site and the sex that its teachers tell apart"
        print(
            f"Caution: no training image has a label of {', '.join(sorted(tasks))}, or all have "
            f"the same one (of the diagnosis: melanoma, or another): {outcome}."
        )
    for split, others in ((Split.VALIDATION, [Split.TRAIN]), (Split.TEST, list(LEARNED))):
        if known := shared(records, split, others):
            print(
                f"Caution: {known:,} images of {split} are of a lesion, a patient or a picture of "
                f"{' or '.join(others)}: figures on them are better than on others. "
                "`mmtl-train data audit` shows them."
            )


@cli.command()
def fit(
    run: Folder = DEFAULT_RUN,
    workers: Annotated[int, typer.Option(min=0, help="Processes that augment images.")] = 2,
) -> None:
    """Fit the network; an interrupted run goes on after its last whole epoch.

    Several processes share the work: `torchrun --nproc-per-node 2 --no-python -- mmtl-train fit`.
    """
    from training.fit import fit

    best = fit(Run(run), workers)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first
        print(f"best validation AUROC {best:.4f}")


@cli.command()
def sweep(
    recipes: Annotated[Path, typer.Argument(help=r"TOML with \[all] and \[recipes.NAME].")],
    data: Annotated[
        Path | None, typer.Argument(help="A folder with HAM10000 and whatever else is there.")
    ] = None,
    run: Annotated[Path, typer.Option("--run", help="The sweep's folder.")] = Path("runs/sweep"),
    manifest: Annotated[
        Path | None,
        typer.Option(help="Instead: a manifest with its own splits.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that augment images.")] = 2,
) -> None:
    """Fit several recipes and compare them on validation; goes on where it was stopped."""
    from training.sweep import load_recipes
    from training.sweep import sweep as try_all

    tried = load_recipes(recipes)
    if manifest is not None and len({recipe.train_on for recipe in tried.values()}) > 1:
        raise DataError(
            f"{recipes}: recipes that differ in train_on are for a folder of datasets; a manifest "
            "says itself what is learned from."
        )
    try_all(tried, run, _preparation(data, manifest), workers)
    print((run / "sweep.md").read_text(encoding="utf-8"), end="")


def _preparation(
    data: Path | None, manifest: Path | None
) -> Callable[[Run, Config], Counter[tuple[str, str]]]:
    """What prepares a run of a folder of datasets, or of a manifest.

    Raises:
        DataError: Neither is given, or both.
    """
    from training.data.manifest import load_manifest
    from training.prepare import prepare, prepare_manifest

    if data is not None and manifest is None:
        return lambda run, config: prepare(data, run, config)
    if manifest is not None and data is None:
        return lambda run, config: prepare_manifest(load_manifest(manifest), run, config)
    raise DataError("Give either a folder of datasets, or --manifest.")


@cli.command()
def export(
    run: Folder = DEFAULT_RUN,
    bundle: BundleFolder = None,
    views: Annotated[
        int, typer.Option(help="Of an image, answered together: 1, 4 or 8 (dihedral).")
    ] = 1,
    name: Annotated[
        str, typer.Option(help="Of the bundle, in every answer.", show_default="the backbone's")
    ] = "",
    version: Annotated[str, typer.Option(help="The bundle's version: three numbers.")] = "0.1.0",
) -> None:
    """Calibrate the best network and write it as ONNX, torch.export and TorchScript."""
    from training.export import export

    if views not in (1, 4, 8):
        raise DataError(f"--views is 1, 4 (mirrorings) or 8 (and their transposes), not {views}.")
    bundle = bundle or Run(run).bundle
    made, differences = export(Run(run), bundle, views, name, version)
    for file, difference in differences.items():
        print(f"{file:24} differs from eager torch by at most {difference:.1e}")
    print(f"Wrote {made.manifest.name} {made.manifest.version} to {bundle}.")


@cli.command()
def quantize(
    run: Folder = DEFAULT_RUN,
    bundle: BundleFolder = None,
) -> None:
    """Add an int8 artifact to a bundle: on a CPU it is served in place of the fp32 one."""
    from training.quantize import FILE
    from training.quantize import quantize as add_int8

    made, tried = add_int8(Run(run), bundle or Run(run).bundle)
    for cost in tried:
        print(
            f"{cost.float_convolutions:2} convolutions in floats: validation AUROC "
            f"{-cost.auroc_lost:+.4f}, decisions that flip {cost.decisions:.2%}, "
            f"out-of-distribution flags {cost.strangeness:.2%}"
        )
    size = (made.folder / FILE).stat().st_size / 1e6
    print(f"Wrote {made.folder / FILE} ({size:.1f} MB).")
    print("It has no figures now: `mmtl-train evaluate --publish` measures what a CPU answers.")


@cli.command()
def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(help="A folder of datasets, for the paper's table and strange pictures."),
    ] = None,
    run: Folder = DEFAULT_RUN,
    manifest: Annotated[
        Path | None, typer.Option(help="Another manifest than the run's.", show_default=False)
    ] = None,
    split: Annotated[Split, typer.Option(help="What of it is evaluated.")] = Split.TEST,
    bundle: BundleFolder = None,
    predictions: Annotated[
        Path | None, typer.Option(help="A table of predictions, instead of a bundle.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Decision threshold that belongs to --predictions (0.5 by default)."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A bundle or a table to compare with, on the same images.")
    ] = None,
    against_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Decision threshold that belongs to a table in --against (0.5 by default).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The report's folder.", show_default="RUN/report"),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write metrics.json and model card into the bundle.")
    ] = False,
) -> None:
    """Measure a bundle or a table of predictions on held-out images; write a report."""
    from training.card import check_publishable, save_figures
    from training.data.layouts import read_datasets
    from training.data.manifest import fingerprint, load_manifest, usable
    from training.evaluate import check_size
    from training.predictions import Predictions, load_predictions, predict, save_predictions
    from training.release import evaluate_model, held_out
    from training.report import save_report

    out = out or Run(run).report
    if out.exists() and not out.is_dir():
        raise DataError(f"--out is a folder for the report; {out} is a file.")
    if predictions is not None and predictions.is_dir():
        raise DataError(f"--predictions is a table; a bundle such as {predictions} is --bundle.")
    if predictions is not None and bundle is not None:
        raise DataError(
            "Name --bundle or --predictions; to compare both, one of them as --against."
        )
    for option, value, table in (
        ("--threshold", threshold, predictions),
        ("--against-threshold", against_threshold, against),
    ):
        if value is not None and (table is None or table.is_dir()):
            raise DataError(f"{option} is of a table of predictions; a bundle has its own.")
    records = load_manifest(manifest or Run(run).manifest)
    # What was predicted elsewhere needs no files here.
    images = predictions is None or (against is not None and against.is_dir())
    tested = held_out(records, split, images)
    # Before every image is predicted:
    check_size(tested)
    if data is not None:
        read_datasets([data])
    model = predictions or bundle or Run(run).bundle
    used = load_bundle(model) if predictions is None else None
    if publish:
        if used is None:
            raise DataError("--publish writes into a bundle; a table of predictions is none.")
        check_publishable(used, str(split), fingerprint(usable(records)))

    def read(path: Path, at: float | None) -> Predictions:
        if path.is_dir():
            return predict(load_bundle(path), tested)
        return load_predictions(path, tested, 0.5 if at is None else at)

    other = read(against, against_threshold) if against else None
    found = predict(used, tested) if used is not None else read(model, threshold)
    report = evaluate_model(found, records, split, data, used, other)
    save_report(out, report)
    save_predictions(out / "predictions.csv", found)
    if publish and used is not None:
        save_figures(used, report)
    print_figures(report)
    print(f"Wrote {out}/report.html, report.json and predictions.csv.")


def print_figures(report: dict[str, Any]) -> None:
    """What a reader must know, and the figures most looked for, by set."""
    from training.report import interval

    for caution in report["cautions"]:
        print(f"Caution: {caution}")
    for name, figures in report["sets"].items():
        print(f"{name}: {figures['images']:,} images, {figures['melanomas']:,} melanomas")
        for figure in ("AUROC", "sensitivity", "specificity"):
            print(f"  melanoma {figure:14} {interval(figures['melanoma'][figure])}")
        for task, values in figures["tasks"].items():
            print(f"  {task + ' accuracy':23} {interval(values['accuracy'])}")
        for figure, value in figures.get("compared", {}).get("differences", {}).items():
            print(f"  {figure} less {figures['compared']['with']}: {interval(value)}")
    for name, found in report["not learned from"].items():
        learned = ", ".join(found["learned from"])
        print(f"AUROC on {name}, not learned from, less that on {learned}:")
        print(f"  {interval(found['AUROC difference'])}")
