"""From a data folder, or a manifest, to a run folder: records, pixels, components and splits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from training.backbones import source_of
from training.config import Config
from training.data.cache import Pixels, build_cache, files_key
from training.data.components import components, with_components
from training.data.duplicates import find_duplicates, thumbnails
from training.data.layouts import balanced, gather, ham10000, read_datasets
from training.data.manifest import (
    DataError,
    Record,
    fingerprint,
    load_manifest,
    save_manifest,
    usable,
)
from training.data.splits import assign_fixed, hold_out, is_published_test
from training.data.vocabulary import LEARNED, Split
from training.distillation import open_teachers
from training.feature_maps import build_feature_map
from training.folds import check_unfitted, fitted, fitted_to_other_data
from training.lineage import Inheritance, check_fitted, inheritance, keep_inheritance
from training.run import Run, rows, to_learn_from


def prepare(data: Path, run: Run, config: Config) -> Counter[tuple[str, str]]:
    """Find every dataset below a folder, split what is to be used, and cache its pixels.

    Datasets that are not trained on still say which images belong together.

    Args:
        data: The folder that holds HAM10000 and, where they are there, other datasets.
        run: Where the manifest and the cache go.
        config: Frozen into the run; it says what is learned from, and what is tested on beside
            the fixed test split and the balanced set's `val`.

    Returns:
        Number of images by (dataset, split).

    Raises:
        DataError: The data does not fit, or the run folder holds another configuration.
    """
    if ham10000.TITLE not in config.train_on:
        raise DataError(
            "train_on must name HAM10000, a part of which a folder's networks are validated and "
            "tested on. For other data, `mmtl-train data split` and `prepare --manifest`."
        )
    records, listed = gather(read_datasets([data]))
    if any(balanced.is_part(r) for r in records) and not any(map(is_published_test, records)):
        raise DataError(f"{data} holds the balanced set without its val, which must be left out.")
    used = [
        position
        for position, record in enumerate(records)
        if record.path
        and (record.dataset in {*config.train_on, *config.test_on} or is_published_test(record))
    ]
    if absent := {*config.train_on, *config.test_on} - {records[i].dataset for i in used}:
        raise DataError(
            _absent(data, ham10000.TITLE if ham10000.TITLE in absent else min(absent), records)
        )
    check_network(config)
    run.check_config(config)
    files_key([records[i] for i in used], config.size, config.size)  # or an image is not there
    check_same_images(run, config, [records[i] for i in used])
    pixels = _build_cache(run, config, [records[i] for i in used])
    # Ids alone miss copies that a dataset holds under another name, so pictures are compared, too.
    found = find_duplicates(thumbnails(lambda row: pixels[row], len(pixels)))
    pairs = [(used[one], used[other]) for one, other in found]
    divided = assign_fixed(records, components(records, pairs, listed), config.test_on)
    manifest = [divided[i] for i in used]
    overruled = Counter(
        record.dataset
        for i, record in zip(used, manifest, strict=True)
        if records[i].split in (Split.TEST, Split.EXCLUDED) and record.split in LEARNED
    )
    for name, images in sorted(overruled.items()):
        tqdm.write(
            f"Caution: {images:,} images of {name} are learned from, which its own splits test on "
            "or leave out. To keep those: `mmtl-train data split --keep`, and `prepare --manifest`."
        )
    check_splits(manifest, config)
    check_unfitted(run, config, manifest)
    _keep_inheritance(run, config, inheritance(config, manifest))
    run.save_config(config)
    save_manifest(run.manifest, manifest)
    return _count(manifest)


def prepare_manifest(
    records: Sequence[Record], run: Run, config: Config
) -> Counter[tuple[str, str]]:
    """Take a manifest as it is, splits and all, and cache its pixels.

    Args:
        records: Those without an image or a split are left out.
        run: Where the manifest and the cache go.
        config: Frozen into the run.

    Returns:
        Number of images by (dataset, split).

    Raises:
        DataError: There is nothing to train on or to validate on, an image cannot be read, the
            backbone does not take the size, or the run folder holds another configuration.
    """
    if records and not any(record.path for record in records):
        raise DataError(
            f"None of the manifest's {len(records):,} rows has an image file. `mmtl-train data "
            "check` tells what the table calls its images, and what files there are."
        )
    if config.test_on:
        raise DataError(
            "test_on is for a folder of datasets. In a manifest, give what is to be held out the "
            "split test, and what is of the same lesions the split excluded."
        )
    used = usable(records)
    check_splits(used, config)
    check_network(config)
    known = inheritance(config, used)
    run.check_config(config)
    check_unfitted(run, config, used)
    files_key(used, config.size, config.size)
    _keep_inheritance(run, config, known)
    _build_cache(run, config, used)
    run.save_config(config)
    save_manifest(run.manifest, used)
    return _count(used)


def _build_cache(run: Run, config: Config, records: Sequence[Record]) -> Pixels:
    """Cache the pixels; from where others give way until the new manifest is there, none is.

    Pixels and labels of two preparations never meet. The manifest of a run that is fitted stays,
    where it is of the same images, row by row: what was learned from is not known without it.
    """

    def replace_others() -> None:
        if fitted(run, config):
            tqdm.write(
                f"Caution: the pictures have been decoded anew, as files or the decoder have "
                f"changed; {run.folder} was fitted to them as they were."
            )
            if run.manifest.is_file() and _names(load_manifest(run.manifest)) == _names(records):
                return
        run.manifest.unlink(missing_ok=True)

    return build_cache(run.cache, records, config.size, config.size, replace_others)


def _names(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(record.dataset, record.image) for record in records]


def _keep_inheritance(run: Run, config: Config, known: Inheritance) -> None:
    """Note it, but where the run is fitted: what it went on from may have been fitted anew."""
    if not fitted(run, config) or (config.start_from and not run.inherited.is_file()):
        keep_inheritance(run, known)


def check_same_images(run: Run, config: Config, records: Sequence[Record]) -> None:
    """Whether a run that is fitted has these images and labels, before any of it is replaced.

    Raises:
        DataError: It has not.
    """
    if fitted(run, config) and run.manifest.is_file():
        ours, given = (
            fingerprint([replace(record, split=None, component="") for record in those])
            for those in (load_manifest(run.manifest), records)
        )
        if ours != given:
            raise fitted_to_other_data(run)


def check_splits(records: list[Record], config: Config) -> None:
    """Whether there is something to learn from, to stop and to calibrate on, for each network.

    Raises:
        DataError: There is not.
    """
    for split, dataset in ((Split.TRAIN, ""), (Split.VALIDATION, config.validate_on)):
        if not rows(records, split, dataset):
            of = f" of {dataset} (validate_on)" if dataset else ""
            raise DataError(
                f"There are no images{of} in the split {split}. `mmtl-train data split` deals out "
                'those of a manifest; validate_on = "" takes every dataset.'
            )
    to_learn_from(records, config, "The manifest")
    if config.folds > 1:
        for own in hold_out(with_components(records), config.folds, config.seed):
            try:
                to_learn_from(own, config, "each network")
            except DataError as error:
                raise DataError(f"folds = {config.folds} is too many: {error}") from None


def check_network(config: Config) -> None:
    """Whether the backbone takes images of these sizes, and what it learns from before is there.

    Raises:
        DataError: They do not; before anything is decoded.
        models.bundle.BundleError: A teacher is no whole bundle.
    """
    open_teachers(config.teachers, config.size)
    if config.start_from:
        check_fitted(Run(Path(config.start_from)))
    _, backbone = source_of(config)
    for size in {config.size, *config.sizes}:
        build_feature_map(backbone, None, size=size)


def _absent(data: Path, name: str, records: Sequence[Record]) -> str:
    """Why a dataset that is asked for cannot be used."""
    rows = sum(record.dataset == name for record in records)
    if rows:
        return f"{data} holds a table of {name} with {rows:,} rows, but none of their image files."
    found = ", ".join(sorted({record.dataset for record in records if record.path})) or "none"
    why = (
        " A HAM10000_metadata.csv is known by its columns image_id and dx, and needs lesion_id, "
        "age, sex and localization, too. For data without it: `mmtl-train data split`, and "
        "`prepare --manifest`."
        if name == ham10000.TITLE
        else ""
    )
    return f"{data} holds no images of {name}; found are {found}.{why}"


def _count(records: Sequence[Record]) -> Counter[tuple[str, str]]:
    return Counter((record.dataset, str(record.split)) for record in records)
