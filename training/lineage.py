"""What a network has learned from, the run that it goes on from and its teachers included."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from models.bundle import DataSource, TrainingData, load_bundle
from models.files import write_atomically
from training.config import Config
from training.data.components import BONDS, key_of
from training.data.manifest import (
    DataError,
    Record,
    fingerprint,
    first_line,
    isic_id,
    load_manifest,
    save_manifest,
)
from training.data.origins import origin_of
from training.data.vocabulary import Split
from training.run import Run, rows
from training.state import belongs, identity_of, load_tensors

_SOURCES = TypeAdapter(list[DataSource])
_NONCOMMERCIAL = (
    "The weights were learned from images under CC BY-NC: non-commercial use only. "
    "The code is Apache-2.0."
)
_OF_THEIR_OWNERS = (
    "The weights may be used as the owners of the images say; see the sources. The code is "
    "Apache-2.0."
)


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What the run which another goes on from has learned from.

    Attributes:
        records: The images.
        sources: What its teachers had learned from.
    """

    records: list[Record]
    sources: list[DataSource]


def inheritance(config: Config, records: Sequence[Record]) -> Inheritance:
    """What the run which another goes on from has learned from.

    Args:
        config: Of the run that goes on.
        records: Of its manifest.

    Raises:
        DataError: The run before has no fitted network, or it has learned from, or was chosen by,
            images that this one is to be tested on; or it has learned from those that are to stop
            and calibrate this one.
        models.bundle.BundleError: A teacher of the run before is no longer there.
    """
    if not config.start_from:
        return Inheritance([], [])
    before = Run(Path(config.start_from))
    check_fitted(before)
    known = learned(before)
    for split, told in (
        (Split.TEST, known),
        (Split.VALIDATION, [record for record in known if record.split is Split.TRAIN]),
    ):
        seen = {key for record in told for key in _keys(record)}
        own = [record for record in records if record.split is split]
        leaked = [record.image for record in own if seen.intersection(_keys(record))]
        if leaked:
            raise DataError(
                f"start_from: {before.folder} has learned from {len(leaked):,} of the "
                f"{len(own):,} images of the split {split} ({min(leaked)}, for one), or from "
                "others of the same lesions or patients: what is measured on them would mean "
                "nothing. Go on from a run with the same splits."
            )
    return Inheritance(known, _taught(before))


def check_fitted(run: Run) -> None:
    """Whether another run can go on from this one.

    Raises:
        DataError: It has no fitted network, or one of other data than its manifest has.
    """
    if not run.best.is_file() and (one := run.folder / "fold-1").is_dir():
        raise DataError(f"start_from: {run.folder} is an ensemble. Name a network of it: {one}.")
    if not run.best.is_file():
        raise DataError(
            f"start_from: {run.folder} has no fitted network: `mmtl-train fit --run {run.folder}`."
        )
    if not run.checkpoint.is_file() or not belongs(
        load_tensors(run.checkpoint),
        identity_of(run.load_config(), load_manifest(run.manifest)),
    ):
        raise DataError(
            f"start_from: what the network of {run.folder} has learned from is not known: its "
            "manifest.csv is not of its checkpoint.pt, or that is gone. Prepare and fit it again."
        )


def keep_inheritance(run: Run, known: Inheritance) -> None:
    """Note in a run's folder what `inheritance` found."""
    run.inherited.unlink(missing_ok=True)
    run.inherited_sources.unlink(missing_ok=True)
    if known.records:
        save_manifest(run.inherited, known.records)
    if known.sources:
        with write_atomically(run.inherited_sources) as temporary:
            temporary.write_bytes(_SOURCES.dump_json(known.sources, indent=2))


def check_inherited(run: Run, before: Run) -> None:
    """Whether the run that another goes on from has still learned from what `prepare` noted.

    Args:
        run: That goes on.
        before: The other one.

    Raises:
        DataError: It has not, or has no fitted network.
    """
    check_fitted(before)
    noted = load_manifest(run.inherited) if run.inherited.is_file() else []
    if fingerprint(learned(before)) != fingerprint(noted):
        raise DataError(
            f"start_from: {before.folder} has learned from other images than {run.folder} was "
            "prepared for. Run `mmtl-train prepare` again."
        )


def _taught(run: Run) -> list[DataSource]:
    """What a run's teachers had learned from, and those of the run that it went on from."""
    teachers = [load_bundle(Path(folder)).manifest for folder in run.load_config().teachers]
    sources = [source for teacher in teachers for source in teacher.training_data.sources]
    if run.inherited_sources.is_file():
        try:
            sources += _SOURCES.validate_json(run.inherited_sources.read_bytes())
        except ValueError as error:
            raise DataError(
                f"{run.inherited_sources} is damaged ({first_line(error)}). Run `mmtl-train "
                "prepare` again."
            ) from None
    return sources


def _keys(record: Record) -> Iterator[tuple[str, ...]]:
    """What tells that two manifests mean the same picture, lesion or patient."""
    for bond in BONDS:
        if (key := key_of(record, bond)) is not None:
            yield key
    if (name := isic_id(record.component)) is not None:  # other names are of one manifest alone
        yield ("component", name)


def learned(run: Run) -> list[Record]:
    """The images that a run's network has seen the labels of, each once, and those inherited.

    Validation images of another dataset than `validate_on` neither stop nor calibrate it.

    Raises:
        DataError: What it inherits is not known.
    """
    config = run.load_config()
    own = load_manifest(run.manifest)
    used = [
        own[row] for row in rows(own, Split.TRAIN) + rows(own, Split.VALIDATION, config.validate_on)
    ]
    if config.start_from:
        if not run.inherited.is_file():
            raise DataError(
                f"{run.folder} was prepared by an earlier version, which did not note what the run "
                "that it goes on from has learned from. Run `mmtl-train prepare` again."
            )
        used += load_manifest(run.inherited)
    return list({(record.dataset, record.image): record for record in reversed(used)}.values())


def training_data(run: Run) -> TrainingData:
    """What a run's weights were learned from, the sources of its teachers included.

    Raises:
        DataError: What it inherits is not known.
        models.bundle.BundleError: A teacher is no longer there.
    """
    records = learned(run)
    used = Counter(record.dataset for record in records)
    of_archive = Counter(record.dataset for record in records if isic_id(record.image))
    sources = {
        name: DataSource(
            name=name, images=images, **asdict(origin_of(name, of_archive[name] / images))
        )
        for name, images in used.items()
    }
    for source in _taught(run):
        sources.setdefault(source.name, source)
    return TrainingData(
        fingerprint=fingerprint(load_manifest(run.manifest)),
        sources=tuple(sources[name] for name in sorted(sources)),
        licence=(
            _NONCOMMERCIAL
            if any("NC" in source.licence for source in sources.values())
            else _OF_THEIR_OWNERS
        ),
    )
