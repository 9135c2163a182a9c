"""`mmtl-train data | prepare | fit | export | evaluate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from models.bundle import BundleError, load_bundle
from training.data.cli import cli as data_cli
from training.data.manifest import DataError
from training.run import Config, Run

DEFAULT_RUN = Path("runs/default")
DEFAULTS = Config()
Folder = Annotated[Path, typer.Option("--run", help="The run's folder.")]
Data = Annotated[Path, typer.Argument(help="A folder with HAM10000 and whatever else is there.")]

cli = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Train, evaluate and export M-MTL."
)
cli.add_typer(data_cli, name="data")


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 2."""
    try:
        cli()
    except (DataError, BundleError) as error:
        print(f"mmtl-train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"mmtl-train: {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
        raise SystemExit(2) from None


@cli.command()
def prepare(
    data: Data,
    run: Folder = DEFAULT_RUN,
    epochs: Annotated[int, typer.Option(min=1)] = DEFAULTS.epochs,
    size: Annotated[int, typer.Option(min=64, max=512)] = DEFAULTS.size,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = DEFAULTS.seed,
    learning_rate: Annotated[float, typer.Option(min=1e-7)] = DEFAULTS.learning_rate,
) -> None:
    """Read the data, split it, cache its pixels and freeze the run's configuration."""
    from training.prepare import prepare

    config = Config(epochs=epochs, size=size, seed=seed, learning_rate=learning_rate)
    for (dataset, split), images in sorted(prepare(data, Run(run), config).items()):
        print(f"{dataset:24} {split:12} {images:7,}")


@cli.command()
def fit(
    run: Folder = DEFAULT_RUN,
    workers: Annotated[int, typer.Option(min=0, help="Processes that augment images.")] = 2,
) -> None:
    """Fit the network; an interrupted run goes on after its last whole epoch."""
    from training.fit import fit

    print(f"best validation AUROC {fit(Run(run), workers):.4f}")


@cli.command()
def export(
    run: Folder = DEFAULT_RUN,
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("runs/bundle"),
) -> None:
    """Calibrate the best network and write it as ONNX, torch.export and TorchScript."""
    from training.export import export

    _, differences = export(Run(run), bundle)
    for name, difference in differences.items():
        print(f"{name:24} differs from eager torch by at most {difference:.1e}")


@cli.command()
def evaluate(
    data: Data,
    run: Folder = DEFAULT_RUN,
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("runs/bundle"),
) -> None:
    """Measure a bundle on held-out images; write its metrics.json and model card."""
    from training.card import save_figures
    from training.evaluate import evaluate

    loaded = load_bundle(bundle)
    saved = save_figures(loaded, evaluate(loaded, Run(run), data))
    for metric in saved.manifest.metrics:
        print(
            f"{metric.name:22} {metric.value:.3f} "
            f"({metric.low:.3f} to {metric.high:.3f}), {metric.images:,} images"
        )
