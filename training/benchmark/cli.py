"""`mmtl-train benchmark` and `mmtl-train zoo`."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from training.data.manifest import DataError, Record
from training.data.vocabulary import Split
from training.zoo import choose, load_zoo, shard

zoo_cli = typer.Typer(no_args_is_help=True, help="The pretrained backbones.")


class Weights(StrEnum):
    """What the backbones start from."""

    PRETRAINED = "pretrained"
    RANDOM = "random"


@zoo_cli.callback()
def zoo() -> None:
    """The pretrained backbones."""


@zoo_cli.command("list")
def list_zoo(
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Every backbone that `benchmark` knows: the paper's 86, and some light ones beside them."""
    if as_json:
        print(json.dumps([backbone.as_json() for backbone in load_zoo()], indent=2))
        return
    table = Table(title="86 backbones of the paper's families, and extras")
    right = ("input", "parameters", "multiply-adds", "top-1")
    for column in ("name", "family", "library", "weights", *right, ""):
        table.add_column(column, justify="right" if column in right else "left")
    for b in load_zoo():
        numbers = (f"{b.input_size}", f"{b.parameters:,}", f"{b.multiply_adds / 1e9:.2f} G")
        extra = "extra" if b.extra else ""
        top = f"{b.imagenet_top1:.1f}"
        table.add_row(b.name, b.family, b.library, b.weights, *numbers, top, extra)
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(table)


def benchmark(
    manifest: Annotated[
        Path, typer.Argument(help="A manifest, as `mmtl-train data split` writes.")
    ],
    split: Annotated[
        Split | None, typer.Option(help="What of it is used; everything without this.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Only datasets whose name begins so.", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="These backbones, by name (default: all).")
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="Random ones are for trying the tool, and marked everywhere.")
    ] = Weights.PRETRAINED,
    weights_dir: Annotated[
        Path | None,
        typer.Option(
            help="Files NAME.pth, taken before any download.", exists=True, file_okay=False
        ),
    ] = None,
    weights_notes: Annotated[
        Path | None,
        typer.Option(
            help="TOML with mean, std and note by NAME (default: DIR/weights.toml).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Download nothing; what is not here is left out.")
    ] = False,
    shard_text: Annotated[
        str | None,
        typer.Option("--shard", help="i/n: only the features of this part, and no report."),
    ] = None,
    finetune: Annotated[
        int, typer.Option(min=0, help="How many of the best are fine-tuned, too.")
    ] = 0,
    finetune_epochs: Annotated[int, typer.Option(min=1)] = 4,
    budget: Annotated[
        float | None,
        typer.Option(min=0.001, help="Milliseconds an image, for the recommendation."),
    ] = None,
    costs: Annotated[bool, typer.Option(help="Measure throughput and memory.")] = True,
    run: Annotated[Path, typer.Option("--run", help="Folder of the cached features.")] = Path(
        "runs/benchmark"
    ),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The report's folder.", show_default="RUN/report"),
    ] = None,
) -> None:
    """Rank pretrained backbones on labelled images, without training any (but see --finetune)."""
    from training.data.manifest import load_manifest

    out = out or run / "report"
    chosen = choose(only)
    if shard_text is not None:
        if finetune or budget is not None:
            raise DataError(
                "--finetune and --budget are of the report, which --shard does not write: give "
                "them in the last run, without --shard."
            )
        chosen = shard(chosen, shard_text)
    records = _used(load_manifest(manifest), manifest, split, dataset)

    from training.benchmark.compare import compare, extract, tune_best
    from training.benchmark.report import save_report

    random = weights is Weights.RANDOM
    done = extract(
        chosen,
        records,
        run,
        weights_dir=weights_dir,
        weights_notes=weights_notes,
        offline=offline,
        random=random,
        measure_costs=costs,
    )
    _say_what_is_missing(done.missing)
    if shard_text is not None:
        if chosen and not done.ready:
            raise DataError("No backbone of this part has features, for the reasons above.")
        print(f"Features of {len(done.ready)} backbones are in {run}. Without --shard: report.")
        return
    command = shlex.join(["mmtl-train", *sys.argv[1:]])
    report = compare(done, command, budget)
    save_report(out, report)
    if finetune:
        report = tune_best(report, done, finetune, finetune_epochs)
        save_report(out, report)
        _say_what_is_missing(
            {name: why for name, why in report["missing"].items() if name not in done.missing}
        )
    table = Table(title="random weights" if random else "AUROC of the logistic probe")
    columns = ("", "backbone", "AUROC (95 %)", "images/s at batch 1", "")
    for column in (*columns, "fine-tuned (95 %)") if finetune else columns:
        table.add_column(column)
    for b in report["backbones"][:10]:
        speed = f"{b['costs'][0]['images per second']:.1f}" if b["costs"] else ""
        row = [str(b["rank"]), b["name"], _told(b["logistic"]), speed]
        row.append("tied" if b["tied for first"] else "")
        if finetune:
            row.append(_told(b["fine-tuned"]) if b["fine-tuned"] else "")
        table.add_row(*row)
    Console(markup=False, width=None if sys.stdout.isatty() else 100).print(table)
    print(f"Wrote {out}/report.html, report.json and backbones.csv.")


def _say_what_is_missing(missing: Mapping[str, str]) -> None:
    if missing:
        print(f"Left out ({len(missing)}):", file=sys.stderr)
    for name, reason in missing.items():
        print(f"  {name}: {reason}", file=sys.stderr)


def _told(figures: Mapping[str, Any]) -> str:
    found = figures["AUROC"]
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _used(
    records: Sequence[Record], path: Path, split: Split | None, dataset: str | None
) -> list[Record]:
    used = [
        record
        for record in records
        if record.path
        and record.melanoma is not None
        and (split is None or record.split is split)
        and (dataset is None or record.dataset.startswith(dataset))
    ]
    if not used:
        there = sorted(
            {
                f"{record.dataset} ({record.split or 'no split'})"
                for record in records
                if record.path and record.melanoma is not None
            }
        )
        if not there:
            raise DataError(f"No row of {path} has both an image file and a label of melanoma.")
        raise DataError(
            f"{path} has no labelled images of what was asked for; it has {', '.join(there)}."
        )
    return used
