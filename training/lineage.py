"""What a network has learned from, the run that it goes on from and its teachers included."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from models.bundle import DataSource, TrainingData, load_bundle
from training.config import Config
from training.data.components import key_of
from training.data.manifest import (
    DataError,
    Record,
    fingerprint,
    isic_id,
    load_manifest,
    save_manifest,
)
from training.data.origins import origin_of
from training.data.vocabulary import Split
from training.run import Run

_NONCOMMERCIAL = (
    "The weights were learned from images under CC BY-NC: non-commercial use only. "
    "The code is Apache-2.0."
)
_OF_THEIR_OWNERS = (
    "The weights may be used as the owners of the images say; see the sources. The code is "
    "Apache-2.0."
)


def inheritance(config: Config, records: Sequence[Record]) -> list[Record]:
    """The images that the run which another goes on from has learned from.

    Args:
        config: Of the run that goes on.
        records: Of its manifest.

    Raises:
        DataError: The run before has no fitted network, or it has learned from, or was chosen by,
            images that this one is to be tested on; or it has learned from those that are to stop
            and calibrate this one.
    """
    if not config.start_from:
        return []
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
                "others of the same lesions: what is measured on them would mean nothing. Go on "
                "from a run with the same splits."
            )
    return known


def check_fitted(run: Run) -> None:
    """Whether another run can go on from this one.

    Raises:
        DataError: It has no fitted network.
    """
    if not run.best.is_file():
        raise DataError(f"start_from: {run.folder} has no fitted network.")


def keep_inheritance(run: Run, known: Sequence[Record]) -> None:
    """Note in a run's folder what `inheritance` found."""
    run.inherited.unlink(missing_ok=True)
    if known:
        save_manifest(run.inherited, known)


def _keys(record: Record) -> Iterator[tuple[str, ...]]:
    """What tells that two manifests mean the same picture or lesion."""
    for bond in ("image", "lesion"):
        if (key := key_of(record, bond)) is not None:
            yield key
    if (name := isic_id(record.component)) is not None:  # other names are of one manifest alone
        yield ("component", name)


def learned(run: Run) -> list[Record]:
    """The images that a run's network has seen the labels of, each once, and those inherited.

    Raises:
        DataError: What it inherits is not known.
    """
    records = load_manifest(run.manifest)
    if run.load_config().start_from:
        if not run.inherited.is_file():
            raise DataError(
                f"{run.folder} was prepared by an earlier version, which did not note what the run "
                "that it goes on from has learned from. Run `mmtl-train prepare` again."
            )
        records += load_manifest(run.inherited)
    used = [record for record in records if record.split in (Split.TRAIN, Split.VALIDATION)]
    return list({(record.dataset, record.image): record for record in reversed(used)}.values())


def training_data(run: Run) -> TrainingData:
    """What a run's weights were learned from, a teacher's sources included.

    Raises:
        DataError: What it inherits is not known.
        models.bundle.BundleError: A teacher is no longer there.
    """
    used = Counter(record.dataset for record in learned(run))
    sources = {
        name: DataSource(name=name, images=images, **asdict(origin_of(name)))
        for name, images in used.items()
    }
    for teacher in run.load_config().teachers:
        for source in load_bundle(Path(teacher)).manifest.training_data.sources:
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
