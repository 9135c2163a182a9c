"""`mmtl-train data check | annotate | audit | split`."""

import json
import sys
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from training.data.layouts import Dataset, gather, read_datasets, read_sides
from training.data.manifest import DataError, Record, save_manifest
from training.data.vocabulary import Split

cli = typer.Typer(no_args_is_help=True, help="Find, check, label, audit and split data.")
_SHOWN = 20

Paths = Annotated[list[Path], typer.Argument(help="Folders or tables.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]
Pixels = Annotated[bool, typer.Option("--pixels/--no-pixels", help="Look at the images, too.")]
SameIds = Annotated[
    bool, typer.Option("--same-ids", help="Bare lesion and patient ids mean the same everywhere.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The manifest to write.")]


@cli.command()
def check(paths: Paths, as_json: AsJson = False, pixels: Pixels = True) -> None:
    """What is there, missing and wrong; exits with 1 if something must be mended."""
    from training.data.check import LABELS, check, find_strays, find_unclaimed

    datasets = read_datasets(paths)
    checks = [check(dataset, pixels) for dataset in datasets]
    strays = {
        folder: count for path in paths for folder, count in find_strays(path, datasets).items()
    }
    unclaimed = [table for path in paths for table in find_unclaimed(path, datasets)]
    if as_json:
        found = {
            "datasets": [asdict(item) for item in checks],
            "images_of_no_dataset": strays,
            "tables_of_no_dataset": unclaimed,
        }
        print(json.dumps(found, indent=2))
    else:
        table = Table(title="datasets", show_lines=True)
        for column in ("dataset", "layout", "images", "with pixels", "melanoma", "known", "faults"):
            # A number that is cut off would be another one; words take the room that is left.
            number = column in ("images", "with pixels", "melanoma")
            table.add_column(
                column,
                justify="right" if number else "left",
                no_wrap=number and column != "melanoma",
                overflow="fold",
            )
        for item in checks:
            rows = max(item.rows, 1)
            table.add_row(
                item.dataset,
                item.layout,
                f"{item.rows:,}",
                f"{item.pictures:,}",
                f"{item.melanomas:,} of {item.known['melanoma']:,}",
                "\n".join(f"{label} {item.known[label] / rows:.0%}" for label in LABELS[1:]),
                f"{len(item.faults):,} ({item.fatal:,} to mend)" if item.faults else "",
            )
        _show(table, "Percentages: of rows, those with a value.")
        for item in checks:
            told = [f"{item.dataset}: {fault}" for fault in item.faults]
            for line in told[: item.fatal]:
                print(f"To mend: {line}")
            _print_some(told[item.fatal :])
        _print_some(
            [f"{folder}: {count:,} images of no dataset." for folder, count in strays.items()]
        )
        _print_some([f"{table}: a table that no layout claims." for table in unclaimed])
    if any(item.fatal for item in checks):
        raise SystemExit(1)


@cli.command()
def annotate(
    folder: Annotated[Path, typer.Argument(help="A folder of images.")],
    metadata: Annotated[
        list[Path], typer.Option("--with", help="Metadata, the most trusted first.")
    ],
    out: Out = Path("manifest.csv"),
) -> None:
    """Join a bare image folder to metadata by ISIC id, into a manifest."""
    from training.data.annotate import annotate
    from training.data.layouts import find_places

    own = read_datasets([folder]) if any(find_places(folder)) else []
    sources = read_datasets(metadata)
    for dataset in (*own, *sources):
        dataset.faults.raise_fatal()
    if any(record.path for dataset in own for record in dataset.records):
        _print_strays([folder], own)  # else all are taken
    found = annotate(folder, own, sources)
    save_manifest(out, found.records)
    print(f"{found.matched:,} of {len(found.records):,} images found in the metadata; wrote {out}.")
    _print_some([f"not found: {name}" for name in found.unmatched])
    _print_some(found.disagreements)


@cli.command()
def audit(
    first: Annotated[Path, typer.Argument(help="What is learned from.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="What is tested on.", metavar="B")],
    knowing: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Tables that know more of the same images."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every leaking row of B here.")] = None,
    split_a: Annotated[Split | None, typer.Option(help="Only rows of A of this split.")] = None,
    split_b: Annotated[Split | None, typer.Option(help="Only rows of B of this split.")] = None,
    same_ids: SameIds = False,
    as_json: AsJson = False,
    pixels: Pixels = True,
) -> None:
    """What A gives away of B, by image, lesion, patient and picture."""
    from training.data.audit import audit, save_leaks
    from training.data.duplicates import pair_up

    sides = read_sides([first], [second], knowing or [])
    for dataset in chain(*sides):
        dataset.faults.raise_fatal()
    a, b, others = _only(sides[0], split_a), _only(sides[1], split_b), sides[2]
    found = audit(a, b, others, pair_up if pixels else None, same_ids)
    if csv is not None:
        save_leaks(csv, found.leaks)
    if as_json:
        print(json.dumps(found.figures(), indent=2))
        return
    table = Table(title=f"A = {first} ({found.rows_a:,} rows), B = {second} ({found.rows_b:,})")
    for column in ("joined by", "shared", "rows of B", "of B", "rows of A"):
        table.add_column(column, justify="left" if column == "joined by" else "right")
    near = found.near_duplicate_pairs
    pairs = f"{found.listed_pairs:,} listed pairs, "
    pairs += "pictures not compared" if near is None else f"{near:,} more by picture"
    for name, shared, rows_b, rows_a in (
        ("image", f"{found.shared_images:,}", found.rows_by_image, found.rows_a_by_image),
        ("lesion", f"{found.shared_lesions:,}", found.rows_by_lesion, found.rows_a_by_lesion),
        ("patient", f"{found.shared_patients:,}", found.rows_by_patient, found.rows_a_by_patient),
        (
            "lesion or patient",
            "",
            found.rows_by_lesion_or_patient,
            found.rows_a_by_lesion_or_patient,
        ),
        ("duplicate", pairs, found.rows_by_duplicate, found.rows_a_by_duplicate),
        ("any, in a chain too", "", found.rows_by_any, found.rows_a_by_any),
    ):
        share = f"{rows_b / max(found.rows_b, 1):.1%}"
        table.add_row(name, shared, f"{rows_b:,}", share, f"{rows_a:,}")
    _show(table)
    if found.pictures_compared is not None:
        print(f"{found.pictures_compared:,} pictures were compared; rows without one were not.")
    if found.bare_ids_in_both:
        print(
            f"{found.bare_ids_in_both:,} lesion or patient ids are equal on both sides and were "
            "not joined, since ids like 17 are each dataset's own. If these are not: --same-ids."
        )


@cli.command()
def split(
    paths: Paths,
    out: Out = Path("manifest.csv"),
    folds: Annotated[int, typer.Option(min=0, help="Write k manifests, OUT-1 to OUT-k.")] = 0,
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share.")] = 0.15,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share.")] = 0.15,
    paper: Annotated[
        bool, typer.Option("--paper", help="Test on the balanced set's val, leaks and all.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Likewise, without what shares a component with it.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="The splits that rows have, without what would leak between them."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    same_ids: SameIds = False,
    pixels: Pixels = True,
) -> None:
    """Split over components: no image, lesion, patient or (with --pixels) copy on two sides.

    --folds has no test part, and --paper, --clean and --keep have their own.
    """
    from training.data import splits
    from training.data.components import bare_ids, components, linked
    from training.data.duplicates import pair_up
    from training.data.layouts.isic_cli import NOT_DERMOSCOPIC

    if sum((paper, clean, keep, bool(folds))) > 1:
        raise DataError("Choose one of --paper, --clean, --keep and --folds.")
    datasets = read_datasets(paths)
    records, listed = gather(datasets)
    _print_strays(paths, datasets)
    for dataset in datasets:
        if others := sum(fault.kind == NOT_DERMOSCOPIC for fault in dataset.faults):
            print(
                f"Left out: {others:,} images of {dataset.place.name} that its table calls not "
                "dermoscopic (image_type).",
                file=sys.stderr,
            )
        several = sum(len(names) > 1 for names in bare_ids(dataset.records).values())
        if several and not same_ids:
            print(
                f"Caution: {several:,} ids of patients or lesions stand under several names of the "
                f"column dataset in {dataset.place.name}, and are taken for one of each. Where "
                "they are the same, give --same-ids.",
                file=sys.stderr,
            )
    own = sum(record.split is not None for record in records)
    if own and not (paper or clean or keep):
        print(f"{own:,} rows had splits of their own, which --keep keeps.", file=sys.stderr)
    pairs = pair_up(records) if pixels else []
    pairs += linked((tuple(d.place.tables), d.records) for d in datasets)
    labels = components(records, pairs, listed, same_ids=same_ids)
    if folds:
        manifests = splits.fold(records, labels, folds, seed)
        for number, manifest in enumerate(manifests, start=1):
            save_manifest(out.with_stem(f"{out.stem}-{number}"), manifest)
            _print_split(manifest, out.with_stem(f"{out.stem}-{number}"))
        return
    if paper or clean:
        done = splits.assign_published(records, labels, clean, validation, seed)
    elif keep:
        done = splits.keep(records, labels, validation, seed)
    else:
        done = splits.divide(records, labels, validation, test, seed)
    save_manifest(out, done)
    _print_split(done, out)


def _only(datasets: list[Dataset], part: Split | None) -> list[Dataset]:
    """The rows of one split."""
    if part is None:
        return datasets
    chosen = [replace(d, records=[r for r in d.records if r.split is part]) for d in datasets]
    if not any(dataset.records for dataset in chosen):
        raise DataError(f"{datasets[0].place.folder} has no rows of the split {part}.")
    return chosen


def _print_split(records: list[Record], path: Path) -> None:
    table = Table(title=str(path))
    for column in ("split", "images", "components", "melanoma", "of known"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for part in Split:
        members = [record for record in records if record.split is part]
        known = [record.melanoma for record in members if record.melanoma is not None]
        if members:
            table.add_row(
                part,
                f"{len(members):,}",
                f"{len({record.component for record in members}):,}",
                f"{sum(known):,}",
                f"{sum(known) / len(known):.1%}" if known else "",
            )
    _show(table)


def _print_strays(paths: list[Path], datasets: list[Dataset]) -> None:
    from training.data.check import find_strays

    for path in paths:
        for folder, count in find_strays(path, datasets).items():
            print(f"Left out: {count:,} images in {folder}, of no dataset.", file=sys.stderr)


def _print_some(lines: list[str]) -> None:
    for line in lines[:_SHOWN]:
        print(line)
    if len(lines) > _SHOWN:
        print(f"... and {len(lines) - _SHOWN:,} more.")


def _show(*what: Table | str) -> None:
    """Print to the terminal; to what is none, in lines that are not broken."""
    Console(markup=False, width=None if sys.stdout.isatty() else 160).print(*what)
