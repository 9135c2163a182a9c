import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.images import decode
from tests.training.folders import draw_balanced, draw_ham10000
from training.data import balanced, ham10000
from training.data.cache import build_cache, open_cache
from training.data.manifest import (
    DataError,
    Diagnosis,
    Record,
    Sex,
    Site,
    Split,
    fingerprint,
    load_manifest,
    save_manifest,
)
from training.data.splits import assign, components, in_test_split, near_duplicates


@pytest.fixture(scope="module")
def ham(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_ham10000(tmp_path_factory.mktemp("data") / "ham10000")


def test_ham10000_is_read_into_the_canonical_vocabulary(ham: Path) -> None:
    records = ham10000.read(ham)
    assert len(records) == 120
    melanoma = records[4]
    assert melanoma == Record(
        image="ISIC_0000004",
        path=str(ham / "HAM10000_images" / "ISIC_0000004.jpg"),
        dataset="HAM10000",
        lesion="HAM_0000002",
        melanoma=True,
        diagnosis=Diagnosis.MEL,
        age=10.0,
        sex=None,
        site=Site.UPPER_EXTREMITY,
    )
    assert {r.site for r in records} == {*Site, None}
    assert records[0].age is None
    assert {r.sex for r in records} == {Sex.MALE, Sex.FEMALE, None}


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("dx", "wart", r"row 2, column dx: 'wart' is not one of akiec"),
        ("age", "old", r"row 2, column age: 'old' is not an age in years"),
        ("age", "-5", r"column age: '-5' is not an age"),
        ("image_id", "ISIC_X", r"row 2: the image ISIC_X\.jpg is in none of the folders"),
    ],
)
def test_a_bad_cell_is_named(
    ham: Path, tmp_path: Path, column: str, value: str, sentence: str
) -> None:
    (tmp_path / "HAM10000_images").symlink_to(ham / "HAM10000_images")
    with (ham / "HAM10000_metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[0][column] = value
    with (tmp_path / "HAM10000_metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(DataError, match=sentence):
        ham10000.read(tmp_path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_table_is_read_or_refused_in_a_sentence(tmp_path_factory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "HAM10000_metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match="HAM10000_metadata"):
        ham10000.read(folder)


def test_the_balanced_table_keeps_the_rows_without_pixels(ham: Path, tmp_path: Path) -> None:
    records = balanced.read_validation_table(draw_balanced(tmp_path, ham))
    assert [bool(record.path) for record in records] == [True] * 24 + [False] * 17
    assert [record.melanoma for record in records[:4]] == [False, False, True, True]
    assert records[0].site is Site.TORSO
    assert {record.dataset for record in records} == {"balanced (ISIC2017)", "balanced (ISIC2019)"}


def test_a_manifest_is_read_back_as_it_was(ham: Path, tmp_path: Path) -> None:
    records, _ = assign(ham10000.read(ham), [])
    save_manifest(tmp_path / "manifest.csv", records)
    assert load_manifest(tmp_path / "manifest.csv") == records


def test_a_manifest_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    with pytest.raises(DataError, match="Run `mmtl-train prepare` first"):
        load_manifest(path)
    save_manifest(path, [Record("a", "a.jpg", "d")])
    path.write_text(path.read_text() + "b,b.jpg,d,,,wart,,,,,\n")
    with pytest.raises(DataError, match=r"row 3: 'wart' is not a valid Diagnosis"):
        load_manifest(path)
    path.write_text("image\na\n")
    with pytest.raises(DataError, match="expected the columns"):
        load_manifest(path)


def test_the_fingerprint_is_of_labels_and_splits_not_of_paths_or_order() -> None:
    one, two = Record("a", "a.jpg", "d", melanoma=True), Record("b", "b.jpg", "d")
    same = fingerprint([one, two])
    assert fingerprint([two, replace(one, path="elsewhere.jpg")]) == same
    assert fingerprint([replace(one, melanoma=False), two]) != same
    assert fingerprint([replace(one, split=Split.TEST), two]) != same


def test_components_join_by_image_across_datasets_and_by_lesion_within_one() -> None:
    records = [
        Record("1", "", "A", "x"),
        Record("2", "", "A", "x"),
        Record("2", "", "B", "y"),
        Record("3", "", "B", "y"),
        Record("4", "", "B", "x"),  # another dataset's "x"
        Record("5", "", "A"),
        Record("6", "", "A"),
    ]
    first, *_, fourth, fifth, sixth = found = components(records, [(5, 6)]).tolist()
    assert found[:4] == [first] * 4
    assert len({first, fourth, fifth}) == 3
    assert fifth == sixth


lesions = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=80)


@given(lesions, lesions)
def test_no_component_is_on_two_sides(ours: list, theirs: list) -> None:
    training = [Record(f"I{i}", "", "HAM", f"L{lesion}") for lesion, i in ours]
    held_out = [Record(f"I{i}", "", "other", f"O{lesion}") for lesion, i in theirs]
    done, held = assign(training, held_out)
    for record in done:
        assert (record.split is Split.TEST) == in_test_split(record.lesion)
    learned = {r.component for r in done if r.split in (Split.TRAIN, Split.VALIDATION)}
    kept = {r.component for r in [*done, *held] if r.split is Split.TEST}
    assert not learned & kept
    validated = {r.component for r in done if r.split is Split.VALIDATION}
    assert not validated & {r.component for r in done if r.split is Split.TRAIN}


def test_the_test_split_is_the_fixed_one() -> None:
    assert [n for n in range(20) if in_test_split(f"HAM_{n:07d}")] == [2, 5, 9, 11, 16, 17, 18]


def test_near_duplicates_are_found_and_others_are_not(ham: Path) -> None:
    names = [f"ISIC_{2 * number:07d}.jpg" for number in range(20)]
    files = [(ham / "HAM10000_images" / name).read_bytes() for name in names]
    pixels = np.stack([decode(data, 64, 64).pixels for data in files])
    brighter = np.clip(pixels[[3, 8]].astype(int) + 12, 0, 255).astype(np.uint8)
    assert near_duplicates(pixels) == []
    assert near_duplicates(np.concatenate([pixels, brighter])) == [(3, 20), (8, 21)]


def test_the_cache_is_exactly_what_serving_decodes(ham: Path, tmp_path: Path) -> None:
    records = ham10000.read(ham)[:7]
    pixels = build_cache(tmp_path / "pixels.npy", records, 64, 48)
    for row, record in enumerate(records):
        expected = decode(Path(record.path).read_bytes(), 64, 48).pixels
        np.testing.assert_array_equal(pixels[row], expected)
    with pytest.raises(DataError, match="holds 7 images, the manifest 8"):
        open_cache(tmp_path / "pixels.npy", 8)


def test_an_unreadable_image_is_named_and_no_cache_is_left(tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"bad\.jpg: The bytes are not an image"):
        build_cache(tmp_path / "pixels.npy", [Record("bad", str(path), "d")], 64, 64)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jpg"]


def test_on_the_real_data_no_held_out_lesion_is_learned_from(shared_data: Path) -> None:
    training = ham10000.read(shared_data / "ham10000")
    held_out = balanced.read_validation_table(shared_data / "balanced")
    done, held = assign(training, held_out)
    assert (len(training), len(held_out)) == (10_015, 1_962)
    lesion_of = {record.image: record.lesion for record in training}
    touched = {lesion_of[record.image] for record in held if record.image in lesion_of} - {None}
    learned = [record for record in done if record.split in (Split.TRAIN, Split.VALIDATION)]
    assert not {record.image for record in learned} & {record.image for record in held}
    assert not {record.lesion for record in learned} & touched
    assert not any(in_test_split(r.lesion) for r in learned if r.dataset == "HAM10000")
    counts = Counter((record.dataset, record.split) for record in done)
    assert counts["HAM10000", Split.TEST] == 1981
    assert counts["HAM10000", Split.TRAIN] == 6431
