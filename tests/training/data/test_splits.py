"""No component is on two sides, the fixed test split stays fixed, shares are met."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.components import components
from training.data.layouts import gather, read_datasets
from training.data.manifest import DataError, Record
from training.data.splits import (
    assign_fixed,
    assign_published,
    divide,
    fold,
    hold_out,
    in_test_split,
    keep,
)
from training.data.vocabulary import Split

LEARNED = (Split.TRAIN, Split.VALIDATION)
rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=80)


def of(records: list[Record], *splits: Split) -> set[str]:
    return {record.component for record in records if record.split in splits}


def test_the_test_split_is_the_fixed_one() -> None:
    assert [n for n in range(20) if in_test_split(f"HAM_{n:07d}")] == [2, 5, 9, 11, 16, 17, 18]


def test_what_validates_in_the_fixed_split_is_fixed_too() -> None:
    records = [Record(f"ISIC_{n:07d}", "", "HAM10000", f"HAM_{n:07d}") for n in range(60)]
    done = assign_fixed(records, components(records))
    held = [n for n, record in enumerate(done) if record.split is Split.VALIDATION]
    assert held == [19, 23, 26, 31, 42, 47]


@given(rows, rows)
def test_the_fixed_split_keeps_components_apart(ours: list, theirs: list) -> None:
    records = [Record(f"ISIC_{i:07d}", "", "HAM10000", f"HAM_{lesion}") for lesion, i in ours]
    records += [
        Record(f"ISIC_{i:07d}", "", "balanced (ISIC2019)", f"IL_{lesion}", split=Split.TEST)
        for lesion, i in theirs
    ]
    done = assign_fixed(records, components(records))
    for record in done[: len(ours)]:
        assert (record.split is Split.TEST) == in_test_split(record.lesion)
    assert all(record.split is Split.TEST for record in done[len(ours) :])
    assert not of(done, *LEARNED) & of(done, Split.TEST)
    assert not of(done, Split.TRAIN) & of(done, Split.VALIDATION)


@given(rows, rows)
def test_a_dataset_that_is_tested_on_is_not_learned_from(ours: list, theirs: list) -> None:
    records = [Record(f"ISIC_{i:07d}", "", "HAM10000", f"HAM_{lesion}") for lesion, i in ours]
    records += [Record(f"ISIC_{i:07d}", "", "isic2017", f"IL_{lesion}") for lesion, i in theirs]
    done = assign_fixed(records, components(records), {"isic2017"})
    assert all(record.split is Split.TEST for record in done[len(ours) :])
    tested = of(done[len(ours) :], Split.TEST)
    assert not any(r.component in tested and r.split in LEARNED for r in done)


@pytest.mark.parametrize("folds", [2, 3])
def test_every_training_image_is_held_out_once(folds: int) -> None:
    records = patients(120)
    before = divide(records, components(records), 0.2, 0.2)
    parted = hold_out(before, folds)
    for position, record in enumerate(before):
        after = Counter(own[position].split for own in parted)
        if record.split is Split.TRAIN:
            assert after == {Split.TRAIN: folds - 1, Split.VALIDATION: 1}
        elif record.split is Split.VALIDATION:
            assert after == {Split.EXCLUDED: folds}
        else:
            assert after == {record.split: folds}
    for own in parted:
        assert not of(own, Split.TRAIN) & of(own, Split.VALIDATION)


def patients(count: int) -> list[Record]:
    """Two images a patient, a fifth of the patients with melanoma, in two datasets."""
    return [
        Record(
            f"ISIC_{2 * n + copy:07d}",
            "",
            ("A", "B")[n % 2],
            patient=f"IP_{n}",
            melanoma=n % 5 == 0,
        )
        for n in range(count)
        for copy in range(2)
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_division_is_stratified_grouped_and_reproducible(seed: int) -> None:
    records = patients(400)
    done = divide(records, components(records), validation=0.1, test=0.2, seed=seed)
    assert not of(done, Split.TRAIN) & of(done, Split.VALIDATION, Split.TEST)
    assert not of(done, Split.VALIDATION) & of(done, Split.TEST)
    counts = Counter(record.split for record in done)
    assert counts[Split.TEST] / 800 == pytest.approx(0.2, abs=0.01)
    assert counts[Split.VALIDATION] / 800 == pytest.approx(0.1, abs=0.01)
    for part in (Split.TRAIN, Split.VALIDATION, Split.TEST):
        members = [record for record in done if record.split is part]
        assert np.mean([bool(r.melanoma) for r in members]) == pytest.approx(0.2, abs=0.03)
        assert np.mean([r.dataset == "A" for r in members]) == pytest.approx(0.5, abs=0.05)
    assert done == divide(records, components(records), 0.1, 0.2, seed)
    assert done != divide(records, components(records), 0.1, 0.2, seed + 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from([None, *Split])), min_size=1, max_size=60
    )
)
def test_splits_that_are_kept_do_not_leak(given: list[tuple[int, Split | None]]) -> None:
    records = [
        Record(f"ISIC_{n:07d}", "", "A", patient=f"IP_{patient}", split=split)
        for n, (patient, split) in enumerate(given)
    ]
    # So that one validates, and none need be chosen.
    records.append(Record("ISIC_9999999", "", "A", patient="IP_99", split=Split.VALIDATION))
    done = keep(records, components(records), validation=0.15)
    assert not of(done, Split.TRAIN) & of(done, Split.VALIDATION, Split.TEST)
    assert not of(done, Split.VALIDATION) & of(done, Split.TEST)
    tested = of(done, Split.TEST)
    validating = {
        d.component for r, d in zip(records, done, strict=True) if r.split is Split.VALIDATION
    }
    for record, now in zip(records, done, strict=True):
        if record.split in (Split.TEST, Split.EXCLUDED):
            assert now.split is record.split
        elif now.component in tested:
            assert now.split is Split.EXCLUDED
        elif record.split is Split.VALIDATION:
            assert now.split is Split.VALIDATION
        else:
            assert now.split is (Split.EXCLUDED if now.component in validating else Split.TRAIN)


@pytest.mark.parametrize("seed", range(3))
def test_a_patient_with_a_large_share_of_the_images_trains(seed: int) -> None:
    records = [
        replace(record, patient="many" if n < 200 else record.patient)
        for n, record in enumerate(patients(400))
    ]
    done = divide(records, components(records), validation=0.1, test=0.2, seed=seed)
    assert {record.split for record in done[:200]} == {Split.TRAIN}
    counts = Counter(record.split for record in done[200:])
    assert counts[Split.TEST] / 600 == pytest.approx(0.2, abs=0.02)
    assert counts[Split.VALIDATION] / 600 == pytest.approx(0.1, abs=0.02)


def test_where_none_validates_a_share_of_what_trains_does() -> None:
    records = [
        replace(record, split=Split.TEST if n < 100 else (None, Split.TRAIN)[n // 2 % 2])
        for n, record in enumerate(patients(250))
    ]
    done = keep(records, components(records), validation=0.25, seed=1)
    assert [r.split is Split.TEST for r in done] == [n < 100 for n in range(500)]
    counts = Counter(record.split for record in done)
    assert counts[Split.VALIDATION] / 400 == pytest.approx(0.25, abs=0.02)
    assert not of(done, Split.VALIDATION) & of(done, Split.TRAIN)
    nothing = patients(5)
    with pytest.raises(DataError, match=r"No row has a split of its own to keep.*Leave --keep out"):
        keep(nothing, components(nothing), 0.15)


def test_folds_hold_each_component_out_once() -> None:
    records = patients(60)
    manifests = fold(records, components(records), 5)
    held = [of(manifest, Split.VALIDATION) for manifest in manifests]
    assert sum(len(part) for part in held) == len(set.union(*held)) == 60
    assert all(not of(m, Split.VALIDATION) & of(m, Split.TRAIN) for m in manifests)
    with pytest.raises(DataError, match=r"60 components .* cannot be parted in 61"):
        fold(records, components(records), 61)


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    records = patients(60)
    with pytest.raises(DataError, match="below 1 in sum"):
        divide(records, components(records), validation=0.5, test=0.5)
    with pytest.raises(DataError, match="A share is 0, or more than"):
        divide(records, components(records), validation=0.02, test=0.2)


def test_the_papers_split_leaks_and_the_clean_one_does_not() -> None:
    records = patients(50)
    records += [
        Record("ISIC_0000000", "", "balanced (ISIC2020)", melanoma=True, split=Split.TEST),
        Record("ISIC_0000900", "", "balanced (ISIC2020)", patient="IP_7", split=Split.TEST),
    ]
    labels = components(records)
    paper = assign_published(records, labels, clean=False)
    clean = assign_published(records, labels, clean=True)
    assert of(paper, *LEARNED) & of(paper, Split.TEST)
    assert not of(clean, *LEARNED) & of(clean, Split.TEST)
    assert sum(record.split is Split.TEST for record in clean) == 2
    assert sum(record.split is Split.EXCLUDED for record in clean) == 4
    with pytest.raises(DataError, match="balanced set's `val`"):
        assign_published(patients(3), labels[:6], clean=True)


def test_on_the_real_data_no_held_out_lesion_is_learned_from(shared_data: Path) -> None:
    records, listed = gather(read_datasets([shared_data]))
    done = assign_fixed(records, components(records, (), listed))
    ham = [record for record in done if record.dataset == "HAM10000"]
    lesion_of = {record.image: record.lesion for record in ham}
    held = [r for r in done if r.dataset.startswith("balanced") and r.split is Split.TEST]
    assert len(held) == 1_962
    touched = {lesion_of[record.image] for record in held if record.image in lesion_of} - {None}
    learned = [record for record in done if record.split in LEARNED]
    assert not {record.image for record in learned} & {record.image for record in held}
    assert not {r.lesion for r in learned if r.dataset == "HAM10000"} & touched
    assert not any(in_test_split(r.lesion) for r in learned if r.dataset == "HAM10000")
    counts = Counter(record.split for record in ham)
    # One more is left out for its picture, which `prepare` compares.
    assert (counts[Split.TEST], counts[Split.TRAIN]) == (1981, 6431)
