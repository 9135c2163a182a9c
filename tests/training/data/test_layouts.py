"""Every layout is recognised, and read into one vocabulary."""

import csv
import errno
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.data.drawn import LAYOUTS, draw_plain, isic, picture
from tests.training.folders import draw_balanced, draw_ham10000
from training.data.layouts import Dataset, gather, name_of, read_datasets, read_sides
from training.data.manifest import DataError, Record, save_manifest
from training.data.vocabulary import Diagnosis, Sex, Site, Split


def read(tmp_path: Path, name: str) -> Dataset:
    title, draw, _ = LAYOUTS[name]
    (tmp_path / name).mkdir()
    draw(tmp_path / name)
    (dataset,) = read_datasets([tmp_path / name])
    assert title == dataset.layout.TITLE
    return dataset


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_drawn_copy_is_recognised_and_its_images_found(tmp_path: Path, name: str) -> None:
    dataset = read(tmp_path, name)
    assert sum(bool(record.path) for record in dataset.records) == LAYOUTS[name][2]
    assert all(Path(record.path).is_file() for record in dataset.records if record.path)
    assert not any(fault.fatal for fault in dataset.faults)


def test_many_datasets_are_found_below_one_folder(tmp_path: Path) -> None:
    for name in ("isic2019", "kaggle10k", "plain"):
        folder = tmp_path / "deep" / name
        folder.mkdir(parents=True)
        LAYOUTS[name][1](folder)
    found = read_datasets([tmp_path])
    assert [dataset.layout.TITLE for dataset in found] == ["ISIC 2019", "Kaggle 10k", "plain CSV"]


def test_a_folder_without_a_dataset_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset in a layout that is known.*HAM10000.*plain"):
        read_datasets([tmp_path])
    with pytest.raises(DataError, match="missing does not exist"):
        read_datasets([tmp_path / "missing"])


def test_ham10000_is_read_into_the_canonical_vocabulary(tmp_path: Path) -> None:
    records = read(tmp_path, "ham10000").records
    assert records[4] == Record(
        image="ISIC_0000004",
        path=str(tmp_path / "ham10000" / "HAM10000_images_part_1" / "ISIC_0000004.jpg"),
        dataset="HAM10000",
        lesion="HAM_0000002",
        melanoma=True,
        diagnosis=Diagnosis.MEL,
        age=10.0,
        sex=None,
        site=Site.UPPER_EXTREMITY,
    )
    assert {record.site for record in records} == {*Site, None}
    assert {record.sex for record in records} == {Sex.MALE, Sex.FEMALE, None}


def test_isic_2019_joins_its_two_tables(tmp_path: Path) -> None:
    records = read(tmp_path, "isic2019").records
    assert [record.diagnosis for record in records] == [
        Diagnosis.MEL,
        Diagnosis.NV,
        Diagnosis.BCC,
        Diagnosis.AKIEC,
        Diagnosis.BKL,
        Diagnosis.DF,
        Diagnosis.VASC,
        Diagnosis.SCC,
        None,
    ]
    assert [record.melanoma for record in records] == [True] + [False] * 7 + [None]
    assert (records[1].image, records[1].lesion) == (isic(1), "BCN_0000000")
    assert (records[0].age, records[1].age, records[1].site) == (None, 55.0, Site.TORSO)


def test_isic_2020_joins_official_tables_and_lists_its_duplicates(tmp_path: Path) -> None:
    dataset = read(tmp_path, "isic2020-official")
    tested, first, *_ = dataset.records
    assert (first.melanoma, first.lesion, first.patient) == (True, "IL_0000000", "IP_0000000")
    assert first.path.endswith("resized_128/ISIC_0000000.png")
    assert (tested.image, tested.melanoma, tested.patient) == (isic(90), None, "IP_0000009")
    assert dataset.pairs == [(isic(0), isic(5))]


def test_isic_2020_takes_lesions_from_v2_and_ages_from_kaggle(tmp_path: Path) -> None:
    LAYOUTS["isic2020-kaggle"][1](tmp_path)
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"lesion_id": "IL_0000001", "age_approx": "", "image_name": row["image_name"]}
    write(tmp_path / "v2.csv", rows)
    (dataset,) = read_datasets([tmp_path])
    assert len(dataset.records) == 6
    assert (dataset.records[0].age, dataset.records[0].lesion) == (45.0, "IL_0000001")


@pytest.mark.parametrize("name", ["isic-cli-old", "isic-cli-new"])
def test_isic_cli_is_read_with_old_and_new_columns(tmp_path: Path, name: str) -> None:
    dataset = read(tmp_path, name)
    assert [record.melanoma for record in dataset.records[:3]] == [True, False, False]
    assert dataset.records[0].diagnosis is Diagnosis.MEL
    assert dataset.records[0].dataset == name
    if name == "isic-cli-new":
        # A cyst is none of the eight, but benign; a clinical picture is no dermoscopic one.
        assert dataset.records[2].diagnosis is None
        assert {fault.kind for fault in dataset.faults} == {"unknown value", "not dermoscopic"}
        assert dataset.records[0].patient == "IP_0000000"


def test_the_balanced_table_keeps_the_rows_without_pixels(tmp_path: Path) -> None:
    ham = draw_ham10000(tmp_path / "ham", 60)
    (dataset,) = read_datasets([draw_balanced(tmp_path / "balanced", ham)])
    assert [bool(record.path) for record in dataset.records] == [True] * 24 + [False] * 17
    assert [record.melanoma for record in dataset.records[:4]] == [False, False, True, True]
    assert dataset.records[0].site is Site.TORSO
    assert {r.dataset for r in dataset.records} == {"balanced (ISIC2017)", "balanced (ISIC2019)"}
    assert {record.split for record in dataset.records} == {Split.TEST}


def test_the_balanced_folders_alone_tell_image_and_class(tmp_path: Path) -> None:
    for part, name in (("train", "mel"), ("val", "mel")):
        picture(tmp_path / part / name / f"ISIC2019_{len(part):07d}_{name}.jpg", 1)
        (tmp_path / part / "oth").mkdir()
    picture(tmp_path / "val" / "oth" / "stray.jpg", 1)
    (dataset,) = read_datasets([tmp_path])
    assert {(r.image, r.melanoma, r.split) for r in dataset.records} == {
        (isic(5), True, Split.TRAIN),
        (isic(3), True, Split.TEST),
    }
    assert "stray file" in {fault.kind for fault in dataset.faults}
    (part,) = read_datasets([tmp_path / "val"])
    assert {record.split for record in part.records} == {Split.TEST}


def test_kaggle_names_are_its_own(tmp_path: Path) -> None:
    records = read(tmp_path, "kaggle10k").records
    assert {record.melanoma for record in records} == {True, False}
    assert records[0].image == "test/benign/melanoma_1"
    assert records[0].split is Split.TEST


def test_a_plain_table_is_read_by_its_usual_names(tmp_path: Path) -> None:
    first = read(tmp_path, "plain").records[0]
    assert (first.melanoma, first.sex, first.site) == (True, Sex.FEMALE, Site.TORSO)
    assert (first.age, first.patient, first.dataset) == (61.0, "0", "plain")


def test_a_name_that_two_pictures_have_is_refused(tmp_path: Path) -> None:
    for name in ("test/1.png", "train/1.png", "2.png", "2.jpg", "3.png", "3.jpg"):
        picture(tmp_path / name, 5)
    rows = [{"image": name, "melanoma": "1"} for name in ("1", "2", "3.png", "train/1.png")]
    write(tmp_path / "mine.csv", rows)
    (dataset,) = read_datasets([tmp_path])
    assert [fault.kind for fault in dataset.faults if fault.fatal] == ["ambiguous name"] * 2
    with pytest.raises(DataError, match=r"row 2, column image: .*test/1\.png and .*train/1\.png"):
        gather([dataset])
    paths = [Path(record.path).relative_to(tmp_path) for record in dataset.records[2:]]
    assert list(map(str, paths)) == ["3.png", "train/1.png"]


def test_a_manifest_of_our_own_is_read_as_it_is(tmp_path: Path) -> None:
    records = [Record("a", "", "d", melanoma=True, split=Split.TEST, component="a")]
    save_manifest(tmp_path / "manifest.csv", records)
    assert read_datasets([tmp_path / "manifest.csv"])[0].records == records


@pytest.mark.parametrize(
    ("cell", "image"),
    [
        ("images/isic_0000001_downsampled.jpg", isic(1)),
        ("images\\ISIC_0000001.png", isic(1)),
        ("ISIC_0000001.jpg", isic(1)),
        ("case.01", "case.01"),
        ("case.01.jpg", "case.01"),
    ],
)
def test_an_image_is_known_by_its_id_whatever_its_path(cell: str, image: str) -> None:
    assert name_of(cell) == image


def test_a_table_that_no_layout_claims_is_told_of(tmp_path: Path) -> None:
    table = LAYOUTS["isic2019"][1](tmp_path)
    table.write_text(table.read_text().replace("sex", "gender"))
    (tmp_path / "latin.csv").write_bytes("image,sexe\né,f\n".encode("latin-1"))
    (dataset,) = read_datasets([tmp_path])
    unread = sorted(fault.message for fault in dataset.faults if fault.kind == "unread table")
    assert [str(table) in unread[0], "latin.csv" in unread[1]] == [True, True]
    (tmp_path / "latin.csv").write_bytes("imagé,sexe\na,f\n".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"latin\.csv holds no dataset .* It is empty, or no CSV in UTF-8"
    ):
        read_datasets([tmp_path / "latin.csv"])


@pytest.mark.parametrize("name", ["ham10000", "plain"])
def test_a_table_in_another_encoding_does_not_vanish(tmp_path: Path, name: str) -> None:
    LAYOUTS[name][1](tmp_path)
    (table,) = (path for path in tmp_path.iterdir() if path.is_file())
    rows = table.read_bytes().splitlines()
    rows[2] = rows[2] + " é".encode("latin-1")
    table.write_bytes(b"\n".join(rows))
    with pytest.raises(DataError, match=r"after row \d: it is not a CSV file in UTF-8"):
        read_datasets([tmp_path])


def test_predictions_that_lie_about_hide_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "ham10000").mkdir()
    LAYOUTS["ham10000"][1](tmp_path / "ham10000")
    row = {"image": "a", "melanoma": "1", "melanoma_probability": "0.5"}
    write(tmp_path / "predictions.csv", [row])
    (dataset,) = read_datasets([tmp_path])
    assert dataset.layout.TITLE == "HAM10000"
    (named,) = read_datasets([tmp_path / "predictions.csv"])
    assert (named.layout.TITLE, named.records[0].melanoma) == ("plain CSV", True)


def test_kaggles_classes_alone_are_read_without_a_split(tmp_path: Path) -> None:
    LAYOUTS["kaggle10k"][1](tmp_path)
    (tmp_path / "train").rename(tmp_path / "mine")
    (dataset,) = read_datasets([tmp_path / "mine"])
    assert {record.split for record in dataset.records} == {None}
    assert {record.melanoma for record in dataset.records} == {True, False}


def test_a_table_with_labels_of_its_own_is_not_isic_2019s(tmp_path: Path) -> None:
    row = {"image": "a", "age_approx": "50", "anatom_site_general": "", "sex": "m"}
    write(tmp_path / "mine.csv", [row | {"melanoma": "1"}])
    (dataset,) = read_datasets([tmp_path])
    assert (dataset.layout.TITLE, dataset.records[0].melanoma) == ("plain CSV", True)


def test_a_link_back_ends(tmp_path: Path) -> None:
    draw_plain(tmp_path / "plain")
    (tmp_path / "plain" / "images" / "back").symlink_to(tmp_path)
    (dataset,) = read_datasets([tmp_path, tmp_path / "plain"])
    assert len(dataset.place.files) == 6


def test_a_balanced_table_whose_name_tells_no_part_is_refused(tmp_path: Path) -> None:
    table = LAYOUTS["balanced"][1](tmp_path)
    table.rename(tmp_path / "metadata.csv")
    with pytest.raises(DataError, match=r"metadata\.csv: its name must say train or val"):
        read_datasets([tmp_path])


def test_a_mask_is_no_picture(tmp_path: Path) -> None:
    LAYOUTS["isic-cli-old"][1](tmp_path)
    picture(tmp_path / "annotations" / f"{isic(0)}_segmentation.png", 5)
    (tmp_path / f"{isic(0)}.jpg").rename(tmp_path / f"{isic(0)}_downsampled.jpg")
    (dataset,) = read_datasets([tmp_path])
    assert dataset.records[0].path.endswith("_downsampled.jpg")


def test_labels_that_disagree_are_told_and_malignant_alone_is_not_melanoma(tmp_path: Path) -> None:
    rows = [
        {"image": "a", "diagnosis": "nevus", "melanoma": "1"},
        {"image": "b", "diagnosis": "basal cell carcinoma", "melanoma": "Malignant"},
        {"image": "c", "diagnosis": "Merkel cell carcinoma", "melanoma": "malignant"},
        {"image": "d", "diagnosis": "melanoma in situ", "melanoma": "malignant"},
        {"image": "e", "diagnosis": "", "melanoma": "malignant"},
    ]
    write(tmp_path / "mine.csv", rows)
    (dataset,) = read_datasets([tmp_path])
    assert [record.melanoma for record in dataset.records] == [True, False, None, True, True]
    assert [fault.kind for fault in dataset.faults] == ["unknown value", "labels disagree"]


def test_pairs_alone_are_a_dataset_without_images(tmp_path: Path) -> None:
    LAYOUTS["isic2020-official"][1](tmp_path)
    (dataset,) = read_datasets([tmp_path / "ISIC_2020_Training_Duplicates.csv"])
    assert (dataset.records, dataset.pairs) == ([], [(isic(0), isic(5))])


def test_one_part_of_kaggles_set_can_be_named(tmp_path: Path) -> None:
    LAYOUTS["kaggle10k"][1](tmp_path)
    (dataset,) = read_datasets([tmp_path / "test"])
    assert {record.split for record in dataset.records} == {Split.TEST}


def test_rows_of_one_image_that_disagree_are_refused(tmp_path: Path) -> None:
    table = draw_plain(tmp_path)
    table.write_text(table.read_text() + "images/clinic-0.png,no,61,F,back,0\n")
    datasets = read_datasets([tmp_path])
    with pytest.raises(DataError, match=r"clinic-0\.png stands in two rows, which disagree"):
        gather(datasets)
    table.write_text(table.read_text().replace("clinic-0.png,no", "clinic-0.png,yes"))
    assert len(gather(read_datasets([tmp_path]))[0]) == 6


def test_class_folders_are_diagnoses_or_say_whether_it_is_melanoma(tmp_path: Path) -> None:
    records = read(tmp_path, "class-folders").records
    assert records[0] == Record(
        image="Val/BKL/case 5.png",
        path=str(tmp_path / "class-folders" / "Val" / "BKL" / "case 5.png"),
        dataset="class-folders",
        melanoma=False,
        diagnosis=Diagnosis.BKL,
        split=Split.VALIDATION,
    )
    melanomas = [record for record in records if record.melanoma]
    assert {record.diagnosis for record in melanomas} == {Diagnosis.MEL}
    assert {record.split for record in melanomas} == {Split.TRAIN, Split.VALIDATION}
    for name in ("Benign", "MALIGNANT"):
        picture(tmp_path / "other" / name / "a.png", 1)
    (dataset,) = read_datasets([tmp_path / "other"])
    assert [(r.melanoma, r.diagnosis, r.split) for r in dataset.records] == [
        (False, None, None),
        (True, None, None),
    ]


def test_a_folder_of_no_class_beside_others_is_told(tmp_path: Path) -> None:
    LAYOUTS["class-folders"][1](tmp_path)
    picture(tmp_path / "train" / "wart" / "a.png", 1)
    picture(tmp_path / "train" / "b.png", 1)
    with pytest.raises(DataError, match=r"train/wart: 'wart' is not a diagnosis that is known"):
        gather(read_datasets([tmp_path]))
    (dataset,) = read_datasets([tmp_path])
    assert [fault.kind for fault in dataset.faults] == ["stray file", "unknown class"]


def test_folders_that_are_no_classes_are_no_dataset(tmp_path: Path) -> None:
    for name in ("0", "1", "images", "other"):
        picture(tmp_path / name / "a.png", 1)
    with pytest.raises(DataError, match="no dataset in a layout that is known"):
        read_datasets([tmp_path])


def test_kaggles_folders_with_validation_are_somebody_s_own(tmp_path: Path) -> None:
    LAYOUTS["kaggle10k"][1](tmp_path)
    picture(tmp_path / "val" / "benign" / "a.jpg", 9)
    (dataset,) = read_datasets([tmp_path])
    assert dataset.layout.TITLE == "class folders"
    assert {record.split for record in dataset.records} == {*Split} - {Split.EXCLUDED}


@pytest.mark.parametrize("name", ["image", "isic_id"])
def test_a_split_that_is_not_known_is_no_guess(tmp_path: Path, name: str) -> None:
    row = {name: "ISIC_0000001", "diagnosis": "nevus", "split": "test"}
    write(tmp_path / "mine.csv", [row, row | {name: "ISIC_0000002", "split": "holdout"}])
    (dataset,) = read_datasets([tmp_path])
    assert dataset.records[0].split is Split.TEST
    with pytest.raises(DataError, match=r"row 3, column split: 'holdout' is not one of train, val"):
        gather([dataset])


def test_labels_that_were_added_to_the_archive_s_table_are_read(tmp_path: Path) -> None:
    row = {"isic_id": "ISIC_0000001", "diagnosis_1": "Malignant", "melanoma": "1", "split": "val"}
    write(tmp_path / "metadata.csv", [row, row | {"isic_id": "ISIC_0000002", "melanoma": "0"}])
    (dataset,) = read_datasets([tmp_path])
    assert dataset.layout.TITLE == "ISIC archive (isic-cli)"
    assert [r.melanoma for r in dataset.records] == [True, False]
    assert {r.split for r in dataset.records} == {Split.VALIDATION}


def test_usual_spellings_of_a_plain_table_are_read(tmp_path: Path) -> None:
    row = {"image": "a", "label": "nv", "Gender": "F", "Location": "back", "split": "val"}
    others = {"b": "melanocytic naevi", "c": "mel", "d": "Melanoma"}
    write(
        tmp_path / "mine.csv",
        [row, *({**row, "image": image, "label": label} for image, label in others.items())],
    )
    (dataset,) = read_datasets([tmp_path])
    assert dataset.records[0] == Record(
        image="a",
        path="",
        dataset=tmp_path.name,
        melanoma=False,
        diagnosis=Diagnosis.NV,
        sex=Sex.FEMALE,
        site=Site.TORSO,
        split=Split.VALIDATION,
    )
    nevus, *melanomas = dataset.records[1:]
    assert nevus.diagnosis is Diagnosis.NV
    assert [(r.diagnosis, r.melanoma) for r in melanomas] == [(Diagnosis.MEL, True)] * 2
    (tmp_path / "mine.csv").write_text("image;age;melanoma\na;45,5;1\nb;1,000;0\n")
    (dataset,) = read_datasets([tmp_path])
    assert [record.age for record in dataset.records] == [45.5, None]
    assert [fault.kind for fault in dataset.faults] == ["bad value"]


TAMPERED = sorted(name for name in LAYOUTS if name not in ("kaggle10k", "class-folders"))
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "latin-1", "cp037")
cells = st.text(st.characters(codec="latin-1"), max_size=12) | st.sampled_from(
    ["", "UNKNOWN", "nan", "-5", "1e9", "MELANOMA", "Torso ", "ISIC_0000001", "true", "Benign"]
)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_mixed_case_and_semicolons_change_nothing(tmp_path_factory) -> None:
    for name in TAMPERED:
        folder = tmp_path_factory.mktemp("mixed") / name
        folder.mkdir()
        table = LAYOUTS[name][1](folder)
        before = gather(read_datasets([folder]))
        with table.open() as file:
            header, *rows = list(csv.reader(file))
        with table.open("w", newline="", encoding="utf-16") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow([cell.upper() for cell in header])
            writer.writerows(rows)
        assert gather(read_datasets([folder])) == before


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_table_is_read_or_refused_in_a_sentence(tmp_path_factory, name, data) -> None:
    folder = tmp_path_factory.mktemp("tampered") / name
    folder.mkdir()
    table = LAYOUTS[name][1](folder)
    with table.open() as file:
        header, *rows = list(csv.reader(file))
    if data.draw(st.booleans(), label="drop a column"):
        dropped = data.draw(st.integers(0, len(header) - 1), label="which")
        header, rows = [
            (part[:dropped] + part[dropped + 1 :]) if i == 0 else part
            for i, part in enumerate([header, rows])
        ]
        rows = [row[:dropped] + row[dropped + 1 :] for row in rows]
    if data.draw(st.booleans(), label="mix the case"):
        header = [cell.upper() for cell in header]
        rows = [[cell.title() for cell in row] for row in rows]
    for _ in range(data.draw(st.integers(0, 3), label="cells")):
        row = data.draw(st.integers(0, len(rows) - 1), label="row")
        column = data.draw(st.integers(0, len(header) - 1), label="column")
        rows[row][column] = data.draw(cells, label="cell")
    if data.draw(st.booleans(), label="repeat a row"):
        rows.append(data.draw(st.sampled_from(rows), label="which one"))
    delimiter = data.draw(st.sampled_from(",;\t"), label="delimiter")
    encoding = data.draw(st.sampled_from(ENCODINGS), label="encoding")
    with table.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    try:
        records, _ = gather(read_datasets([folder]))
    except DataError as error:
        sentence = str(error)
        assert str(folder) in sentence
        if " is not " in sentence and "CSV file" not in sentence:
            assert table.name in sentence or ".csv" in sentence
            assert ", row " in sentence
            assert ", column " in sentence
    else:
        assert all(isinstance(record, Record) for record in records)
        assert all(record.age is None or 0 <= record.age <= 120 for record in records)


def clinic(folder: Path, header: str, *rows: str) -> Dataset:
    """A table of a clinic's own, with a picture a row, which the first cell names."""
    folder.mkdir()
    (folder / "cases.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    for number, row in enumerate(rows):
        picture(folder / f"{row.partition(',')[0]}.jpg", number)
    (dataset,) = read_datasets([folder])
    return dataset


def test_patients_of_a_table_that_is_like_ham10000s_are_read(tmp_path: Path) -> None:
    header = "image_id,patient_id,dx,lesion_id,age,sex,localization"
    found = clinic(tmp_path / "own", header, "a,P1,nv,,40,male,back", "b,P1,mel,,41,male,back")
    assert [record.patient for record in found.records] == ["P1", "P1"]


def test_harvards_copy_of_ham10000_says_where_an_image_was_made(tmp_path: Path) -> None:
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"
    row = "HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir_modern"
    (record,) = clinic(tmp_path / "harvard", header, row).records
    assert (record.dataset, record.lesion, record.image) == (
        "HAM10000",
        "HAM_0000118",
        "ISIC_0027419",
    )
    own = header.replace("dx_type,", "")
    (record,) = clinic(tmp_path / "own", own, row.replace("histo,", "")).records
    assert record.dataset == "vidir_modern"


def test_columns_are_found_however_their_words_are_joined(tmp_path: Path) -> None:
    header = "Image,Patient ID,Lesion-ID,melanoma,Age (years),Gender,Ward"
    found = clinic(tmp_path / "own", header, "a,P1,L1,0,40,m,7")
    (record,) = found.records
    assert (record.patient, record.lesion, record.melanoma) == ("P1", "L1", False)
    assert (record.age, record.sex) == (40, Sex.MALE)
    (fault,) = found.faults
    assert (fault.kind, fault.fatal) == ("unread column", False)
    assert "nothing is read of ward (" in fault.message


@pytest.mark.parametrize(
    ("header", "row", "melanoma"),
    [
        ("image,patient_id,sex,age,anatom_site_general,melanoma", "a,P1,male,40,torso,1", True),
        (
            "image,patient_id,sex,age_approx,anatom_site_general,melanoma",
            "a,P,male,40,torso,1",
            True,
        ),
        (
            "image,patient_id,sex,age_approx,anatom_site_general,diagnosis",
            "a,P1,male,40,torso,melanoma",
            True,
        ),
        (
            "image,patient_id,sex,age_approx,anatom_site_general,benign_malignant",
            "a,P1,male,40,torso,malignant",
            True,
        ),
        ("image,patient_id,sex,age_approx,anatom_site_general,dx", "a,P1,male,40,torso,mel", True),
        (
            "image_id,patient_id,lesion_id,dx,age,sex,localization,melanoma",
            "a,P1,L1,,40,male,back,1",
            True,
        ),
        ("image_id,patient_id,dx,melanoma,age", "a,P1,nv,0,40", False),
    ],
)
def test_a_table_that_is_like_a_published_one_keeps_its_labels(
    tmp_path: Path, header: str, row: str, melanoma: bool
) -> None:
    (record,) = clinic(tmp_path / "own", header, row).records
    assert (record.melanoma, record.patient, record.age) == (melanoma, row.split(",")[1], 40)


def test_the_real_folders_are_recognised(shared_data: Path) -> None:
    found = {dataset.place.name: dataset for dataset in read_datasets([shared_data])}
    assert {name: (d.layout.TITLE, len(d.records)) for name, d in found.items()} == {
        "balanced": ("balanced", 9_810),
        "ham10000": ("HAM10000", 10_015),
        "isic2017": ("ISIC archive (isic-cli)", 2_288),
        "isic2019": ("ISIC 2019", 25_331),
        "isic2020": ("ISIC 2020", 44_108),
        "originals": ("plain CSV", 20),
    }
    pictures = {name: sum(bool(r.path) for r in d.records) for name, d in found.items()}
    assert pictures["balanced"] == 2_395
    assert pictures["isic2020"] == 10_897
    faults = [fault for dataset in found.values() for fault in dataset.faults]
    assert [fault.kind for fault in faults] == ["unread column"]  # of originals: width, height


def test_nobody_is_no_patient(tmp_path: Path) -> None:
    LAYOUTS["isic2020-kaggle"][1](tmp_path)
    table = tmp_path / "train.csv"
    table.write_text(re.sub(r"IP_\d+", "-1", table.read_text()))
    (dataset,) = read_datasets([tmp_path])
    assert {record.patient for record in dataset.records} == {None}


def test_a_table_of_one_s_own_says_more_than_folders(tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        picture(tmp_path / name / f"{name}.jpg", 5)
    rows = [
        {"image": "benign", "patient": "1", "diagnosis": "nevus"},
        {"image": "malignant", "patient": "1", "diagnosis": "basal cell carcinoma"},
    ]
    write(tmp_path / "labels.csv", rows)
    for named in (tmp_path, tmp_path / "labels.csv"):
        (dataset,) = read_datasets([named])
        assert [(r.melanoma, r.patient) for r in dataset.records] == [(False, "1")] * 2
    (tmp_path / "labels.csv").unlink()
    (dataset,) = read_datasets([tmp_path])
    assert dataset.layout.TITLE == "Kaggle 10k"


def test_every_table_of_ham10000_s_is_read(tmp_path: Path) -> None:
    whole = LAYOUTS["ham10000"][1](tmp_path)
    with whole.open() as file:
        rows = list(csv.DictReader(file))
    write(tmp_path / "train.csv", rows[2:])
    write(tmp_path / "test.csv", rows[:2])
    whole.unlink()
    of_2018 = [{**row, "image_id": row["image_id"].replace("ISIC_0", "ISIC_1")} for row in rows]
    write(tmp_path / "ISIC2018_Task3_Test_GroundTruth.csv", of_2018[:1])
    trained = [{**row, "image_id": row["image_id"].replace("ISIC_0", "ISIC_2")} for row in rows]
    write(tmp_path / "ISIC2018_Task3_Training_metadata.csv", trained[:1])
    (dataset,) = read_datasets([tmp_path])
    found = Counter((record.dataset, record.split) for record in dataset.records)
    assert found == {
        ("ISIC 2018", Split.TEST): 1,
        ("HAM10000", None): 1,
        ("HAM10000", Split.TEST): 2,
        ("HAM10000", Split.TRAIN): len(rows) - 2,
    }


def test_the_challenges_test_tables_are_not_learned_from(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    whole = LAYOUTS["isic2019"][1](tmp_path / "a").parent
    for kind in ("GroundTruth", "Metadata"):
        with (whole / f"ISIC_2019_Training_{kind}.csv").open() as file:
            rows = list(csv.DictReader(file))
        write(whole / f"ISIC_2019_Training_{kind}.csv", rows[2:])
        write(whole / f"ISIC_2019_Test_{kind}.csv", rows[:2])
    (tmp_path / "b").mkdir()
    for number, part in enumerate(("Training", "Validation", "Test_v2")):
        row = {"image_id": isic(100 + number), "melanoma": "0.0"}
        write(tmp_path / "b" / f"ISIC-2017_{part}_Part3_GroundTruth.csv", [row])
    of_2019, of_2017 = read_datasets([tmp_path])
    assert [r.split for r in of_2019.records if r.split] == [Split.TEST] * 2
    assert len(of_2019.records) == len(rows)
    assert {r.image: r.split for r in of_2017.records} == {
        isic(100): None,
        isic(101): Split.VALIDATION,
        isic(102): Split.TEST,
    }


def test_tables_complete_each_other(tmp_path: Path) -> None:
    write(tmp_path / "truth.csv", [{"image_id": isic(1), "melanoma": "1", "site": "back"}])
    others = {"image_id": isic(1), "age_approximate": "40", "sex": "male", "site": "back"}
    write(tmp_path / "people.csv", [others])
    (dataset,) = read_datasets([tmp_path])
    assert [(r.melanoma, r.age, r.sex) for r in dataset.records] == [(True, 40, Sex.MALE)]
    assert not dataset.faults
    write(tmp_path / "people.csv", [others | {"site": "hand"}])
    with pytest.raises(DataError, match=r"stands in two rows, which disagree \(site\)"):
        gather(read_datasets([tmp_path]))


@pytest.mark.parametrize("name", ["manifest.csv", "notes.csv"])
def test_what_lies_in_the_balanced_folders_does_not_make_its_test_images_others(
    tmp_path: Path, name: str
) -> None:
    for part in ("train", "val"):
        for which in ("mel", "oth"):
            number = 2 * (part == "val") + (which == "mel")
            picture(tmp_path / part / which / f"ISIC2019_{number:07d}_{which}.jpg", number)
    (tmp_path / "notes.csv").write_text("who,what\nme,that\n")
    (dataset,) = read_datasets([tmp_path])
    save_manifest(tmp_path / name, dataset.records)
    (again,) = read_datasets([tmp_path])
    assert again.records == dataset.records
    assert {record.split for record in again.records} == {Split.TRAIN, Split.TEST}


def test_an_isic_id_is_found_in_whichever_column_names_the_image(tmp_path: Path) -> None:
    picture(tmp_path / "images" / f"{isic(1)}.jpg", 5)
    row = {"id": "1", "path": f"images/{isic(1)}.jpg", "melanoma": "0"}
    write(tmp_path / "mine.csv", [row])
    ((record,),) = (dataset.records for dataset in read_datasets([tmp_path]))
    assert record.image == isic(1)
    assert Path(record.path).is_file()
    picture(tmp_path / "photo17.png", 6)
    write(tmp_path / "mine.csv", [{"image": "photo17.png", "id": isic(17), "melanoma": "0"}])
    ((record,),) = (dataset.records for dataset in read_datasets([tmp_path]))
    assert (record.image, Path(record.path).name) == (isic(17), "photo17.png")


def test_pieces_of_one_picture_keep_their_names(tmp_path: Path) -> None:
    rows = []
    for piece in ("a", "b"):
        picture(tmp_path / "images" / f"{isic(1)}_{piece}.jpg", 5)
        path = f"images/{isic(1)}_{piece}.jpg"
        rows.append({"image": f"c{piece}", "path": path, "melanoma": "0"})
    write(tmp_path / "mine.csv", rows)
    records, _ = gather(read_datasets([tmp_path]))
    assert [record.image for record in records] == [row["path"] for row in rows]
    assert all(Path(record.path).is_file() for record in records)


def test_datasets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for clinic_name in ("a", "b"):
        (tmp_path / clinic_name).mkdir()
        row = {"image": "001.jpg", "patient": "1", "melanoma": "0"}
        write(tmp_path / clinic_name / "labels.csv", [row])
    tables = [tmp_path / name / "labels.csv" for name in ("a", "b")]
    records, _ = gather(read_datasets(tables))
    assert [record.dataset for record in records] == ["a/labels", "b/labels"]
    (first,), (second,) = read_sides(*([table] for table in tables))
    assert [first.records, second.records] == [[record] for record in records]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (linked,) = read_datasets([tmp_path / "a", tmp_path / "link", tmp_path / "b" / ".." / "a"])
    assert len(linked.records) == 1
    (one,), (same,) = read_sides([tables[0]], [tables[0]])
    assert one.records == same.records
    assert one.records[0].dataset == "labels"


def test_a_dataset_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        LAYOUTS["ham10000"][1](tmp_path / name)
    with pytest.raises(DataError, match=r"of HAM10000 is in .*/a and in .*/b\. Name one"):
        gather(read_datasets([tmp_path]))
    table = "HAM10000_metadata"
    tables = [tmp_path / name / f"{table}.csv" for name in ("a", "b")]
    where = f"{tmp_path}/a/{table} and in {tmp_path}/b/{table}"
    with pytest.raises(DataError, match=f"of HAM10000 is in {where}"):
        gather(read_datasets(tables))


@pytest.mark.parametrize("below", ["more", "classes/benign", "isic2019/ISIC_2019_Training_Input"])
def test_without_a_folder_that_cannot_be_read_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """Whether it holds a dataset or some of one's images: there would be less to train on."""
    LAYOUTS["isic2019"][1](tmp_path / "isic2019")
    for number, name in enumerate(("benign", "malignant")):
        picture(tmp_path / "classes" / name / "a.png", number)
    for name in ("more", "isic2019/lost+found", "lost+found"):
        (tmp_path / name).mkdir()
    closed: set[Path] = set()
    listed, scanned = os.listdir, os.scandir

    def look(function: Any) -> Any:  # tests may run as root, whom no mode keeps out
        def guarded(folder: Any) -> Any:
            if Path(folder) in closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            return function(folder)

        return guarded

    monkeypatch.setattr(os, "listdir", look(listed))
    monkeypatch.setattr(os, "scandir", look(scanned))
    closed |= {tmp_path / "lost+found", tmp_path / "isic2019" / "lost+found"}
    assert len(gather(read_datasets([tmp_path]))[0]) == 11
    closed.add(tmp_path / below)
    with pytest.raises(PermissionError, match=re.escape(f"{tmp_path / below}")):
        read_datasets([tmp_path])


def test_a_table_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_plain(tmp_path)
    opened = Path.open

    def look(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.suffix == ".csv":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", look)
    with pytest.raises(PermissionError, match=r"labels\.csv"):
        read_datasets([tmp_path])
