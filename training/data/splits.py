"""Who may learn from what: splits of a manifest over its components."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from training.data.components import names_of
from training.data.layouts import balanced, ham10000
from training.data.manifest import DataError, Record
from training.data.vocabulary import Split

TEST_MODULUS = 5
VALIDATION_MODULUS = 7
# Parts that a division by fractions is made of: fractions are met to a twentieth.
_PARTS = 20


def in_test_split(lesion: str) -> bool:
    """The test split that is fixed for ever: a fifth of HAM10000's lesions, by hash."""
    return _hash(lesion) % TEST_MODULUS == 0


def assign_fixed(
    records: Sequence[Record], labels: NDArray[np.int32], test_on: Collection[str] = ()
) -> list[Record]:
    """The split that the shipped bundle is made on.

    Test is the fixed fifth of HAM10000's lesions, the balanced set's `val` and whole datasets. Of
    what is left, everything that shares a component with these is excluded; a seventh of HAM10000's
    remaining components validates, with whatever of other datasets is joined to them.

    Args:
        records: All images of all datasets at hand.
        labels: Their components.
        test_on: Datasets, by name.

    Returns:
        The records, in order, with `split` and `component` filled in.
    """
    names = names_of(records, labels)
    tested = [_is_tested(record) or record.dataset in test_on for record in records]
    # A component with one tested image is tested or left out as a whole: never trained on.
    touched = {name for name, test in zip(names, tested, strict=True) if test}
    divided = {
        name
        for name, record in zip(names, records, strict=True)
        if record.dataset == ham10000.TITLE
    }

    def split(test: bool, name: str) -> Split:
        if test:
            return Split.TEST
        if name in touched:
            return Split.EXCLUDED
        if name in divided and _hash("validation " + name) % VALIDATION_MODULUS == 0:
            return Split.VALIDATION
        return Split.TRAIN

    return [
        replace(record, split=split(test, name), component=name)
        for record, test, name in zip(records, tested, names, strict=True)
    ]


def assign_published(
    records: Sequence[Record],
    labels: NDArray[np.int32],
    clean: bool,
    validation: float = 0.15,
    seed: int = 0,
) -> list[Record]:
    """The paper's split: test is the balanced set's `val`, everything else may be learned from.

    Args:
        records: The balanced set, and whatever else is trained on.
        labels: Their components.
        clean: Exclude every image that shares a component with the test set. The paper did not.
        validation: Share of what is left that validates, whole components at a time.
        seed: Of that choice.

    Raises:
        DataError: There is no balanced `val` among the records.
    """
    names = names_of(records, labels)
    tested = [is_published_test(record) for record in records]
    if not any(tested):
        raise DataError(
            "The paper's split needs the balanced set's `val` (valid-set-metadata.csv or its "
            "folder) among the data."
        )
    touched = {name for name, test in zip(names, tested, strict=True) if test}
    done = []
    for record, name, test in zip(records, names, tested, strict=True):
        left_out = clean and not test and name in touched
        split = Split.TEST if test else Split.EXCLUDED if left_out else Split.TRAIN
        done.append(replace(record, split=split, component=name))
    free = [i for i, record in enumerate(done) if record.split is Split.TRAIN]
    return _part(done, free, {Split.VALIDATION: validation}, seed)


def divide(
    records: Sequence[Record],
    labels: NDArray[np.int32],
    validation: float,
    test: float,
    seed: int = 0,
) -> list[Record]:
    """Train, validation and test, stratified by dataset and melanoma, whole components at a time.

    Args:
        records: Whatever their `split` was before.
        labels: Their components.
        validation: Share.
        test: Share.
        seed: Of the choice.

    Raises:
        DataError: The shares are too large, or there are too few components.
    """
    named = [
        replace(record, split=Split.TRAIN, component=name)
        for record, name in zip(records, names_of(records, labels), strict=True)
    ]
    shares = {Split.TEST: test, Split.VALIDATION: validation}
    return _part(named, list(range(len(named))), shares, seed)


def keep(
    records: Sequence[Record],
    labels: NDArray[np.int32],
    validation: float,
    seed: int = 0,
) -> list[Record]:
    """The splits that the records have already, without what would leak from one into another.

    Tested is what was to be, whole. Of what else there is, whatever shares a component with it is
    excluded, and what trains, or is in no split, also where its component validates. A record in no
    split trains; where none validates, a share of those that train does.

    Args:
        records: With splits, some of them.
        labels: Their components.
        validation: Share, where none validates.
        seed: Of that choice.

    Raises:
        DataError: None has a split.
    """
    if not any(record.split for record in records):
        raise DataError(
            "No row has a split of its own to keep: a table says it in a column `split` (train, "
            "validation, test), or folders do. Leave --keep out."
        )
    names = names_of(records, labels)

    def components_of(split: Split) -> set[str]:
        return {n for n, record in zip(names, records, strict=True) if record.split is split}

    tested, validating = components_of(Split.TEST), components_of(Split.VALIDATION)

    def kept(record: Record, name: str) -> Split:
        if record.split in (Split.TEST, Split.EXCLUDED):
            return record.split
        if name in tested or (name in validating and record.split is not Split.VALIDATION):
            return Split.EXCLUDED
        return record.split or Split.TRAIN

    done = [
        replace(record, split=kept(record, name), component=name)
        for record, name in zip(records, names, strict=True)
    ]
    if any(record.split is Split.VALIDATION for record in done):
        return done
    free = [i for i, record in enumerate(done) if record.split is Split.TRAIN]
    return _part(done, free, {Split.VALIDATION: validation}, seed)


def fold(
    records: Sequence[Record], labels: NDArray[np.int32], folds: int, seed: int = 0
) -> list[list[Record]]:
    """K manifests: in each, another k-th of the components validates.

    Raises:
        DataError: There are fewer components than folds.
    """
    names = names_of(records, labels)
    number = _numbers(records, names, folds, seed)
    return [
        [
            replace(
                record,
                split=Split.VALIDATION if number[i] == held else Split.TRAIN,
                component=names[i],
            )
            for i, record in enumerate(records)
        ]
        for held in range(folds)
    ]


def hold_out(records: Sequence[Record], folds: int, seed: int = 0) -> list[list[Record]]:
    """K manifests of one that has splits: in each, another k-th of what it trains on validates.

    What validates in it is excluded from all of them, so that it has chosen none of k networks.

    Args:
        records: With splits and components.
        folds: K.
        seed: Of the division.

    Raises:
        DataError: There are fewer components to train on than folds.
    """
    train = [i for i, record in enumerate(records) if record.split is Split.TRAIN]
    chosen = [records[i] for i in train]
    numbers = _numbers(chosen, [record.component for record in chosen], folds, seed)
    number = dict(zip(train, numbers.tolist(), strict=True))

    def split(position: int, held: int) -> Split | None:
        before = records[position].split
        if before is Split.VALIDATION:
            return Split.EXCLUDED
        return Split.VALIDATION if number.get(position) == held else before

    return [
        [replace(record, split=split(i, held)) for i, record in enumerate(records)]
        for held in range(folds)
    ]


def _part(
    records: list[Record], free: list[int], shares: dict[Split, float], seed: int
) -> list[Record]:
    """Give shares of the records at `free` to other splits."""
    wanted = {split: round(share * _PARTS) for split, share in shares.items()}
    if any(share < 0 for share in shares.values()) or sum(wanted.values()) >= _PARTS:
        raise DataError("The shares of validation and test must be at least 0, and below 1 in sum.")
    if any(share > 0 and not wanted[split] for split, share in shares.items()):
        raise DataError(f"A share is 0, or more than {0.5 / _PARTS:g}: twentieths are dealt out.")
    if not any(wanted.values()):
        return records
    chosen = [records[i] for i in free]
    names = [record.component for record in chosen]
    numbers = _numbers(chosen, names, _PARTS, seed)
    numbers = _large_last(numbers, names, len(names) * max(wanted.values()) / _PARTS / 2)
    bounds, done = 0, list(records)
    for split, parts in wanted.items():
        for position, number in zip(free, numbers.tolist(), strict=True):
            if bounds <= number < bounds + parts:
                done[position] = replace(records[position], split=split)
        bounds += parts
    return done


def _numbers(
    records: Sequence[Record], names: Sequence[str], parts: int, seed: int
) -> NDArray[np.int64]:
    """Which of `parts` equal parts each record is in (Stratified, Group K-Fold of scikit-learn)."""
    if parts < 2 or len(set(names)) < parts:
        raise DataError(
            f"{len(set(names)):,} components (lesions, patients) cannot be parted in {parts}"
            + (", as shares are dealt out." if parts == _PARTS else ".")
        )
    strata, stratum = np.unique(
        [f"{record.dataset} {record.melanoma}" for record in records], return_inverse=True
    )
    numbers = np.empty(len(records), np.int64)
    # A stratum with fewer images than parts is common (a small dataset), and needs no warning.
    rare = np.bincount(stratum, minlength=len(strata)) < parts
    stratum = np.where(rare[stratum], -1, stratum)
    if (stratum == -1).sum() < parts:
        stratum = np.where(stratum == -1, stratum.max(), stratum)
    folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(folds.split(np.zeros(len(records)), stratum, names)):
        numbers[held] = number
    return numbers


def _large_last(numbers: NDArray[np.int64], names: Sequence[str], most: float) -> NDArray[np.int64]:
    """The parts' numbers, those with a component of more than so many images at the end.

    What is dealt out comes from the beginning: a test set that is mostly one lesion or patient
    would tell little of others.
    """
    large = {name for name, count in Counter(names).items() if count > most}
    holds = {int(number) for number, name in zip(numbers, names, strict=True) if name in large}
    order = sorted(range(_PARTS), key=lambda number: number in holds)
    return np.argsort(order)[numbers]


def _is_tested(record: Record) -> bool:
    if record.dataset == ham10000.TITLE:
        return in_test_split(record.lesion or record.image)
    return is_published_test(record)


def is_published_test(record: Record) -> bool:
    """Whether the paper tests on a record: the balanced set's `val`."""
    return balanced.is_part(record) and record.split is Split.TEST


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
