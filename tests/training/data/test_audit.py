"""Leakage between two sets is found by id, by picture and across names."""

import csv
from pathlib import Path

import pytest

from tests.training.data.drawn import picture
from tests.training.folders import write_table
from training.data.audit import audit, save_leaks
from training.data.duplicates import pair_up
from training.data.layouts import Dataset, read_datasets


def table(folder: Path, rows: list[tuple[str, str, str]]) -> list[Dataset]:
    folder.mkdir()
    keys = ("image", "lesion", "patient", "melanoma")
    write_table(
        folder / f"{folder.name}.csv", [dict(zip(keys, (*r, "0"), strict=True)) for r in rows]
    )
    return read_datasets([folder])


def test_what_is_shared_is_counted_on_both_sides(tmp_path: Path) -> None:
    a = table(
        tmp_path / "a",
        [
            ("ISIC_0000001", "IL_1", "IP_1"),
            ("ISIC_0000002", "IL_1", "IP_1"),
            ("ISIC_0000003", "IL_3", "IP_3"),
            ("ISIC_0000004", "", ""),
            ("ISIC_0000005", "", ""),
        ],
    )
    b = table(
        tmp_path / "b",
        [
            ("ISIC_0000011", "IL_1", "IP_9"),
            ("ISIC_0000012", "IL_12", "IP_3"),
            ("ISIC_0000004", "", ""),
            ("ISIC_0000014", "IL_14", ""),
        ],
    )
    found = audit(a, b)
    assert found.figures() == {
        "rows_a": 5,
        "rows_b": 4,
        "shared_images": 1,
        "shared_lesions": 1,
        "shared_patients": 1,
        "listed_pairs": 0,
        "bare_ids_in_both": 0,
        "pictures_compared": None,
        "near_duplicate_pairs": None,
        "rows_by_image": 1,
        "rows_by_lesion": 1,
        "rows_by_patient": 1,
        "rows_by_lesion_or_patient": 2,
        "rows_by_duplicate": 0,
        "rows_by_any": 3,
        "rows_a_by_image": 1,
        "rows_a_by_lesion": 2,
        "rows_a_by_patient": 1,
        "rows_a_by_lesion_or_patient": 3,
        "rows_a_by_duplicate": 0,
        "rows_a_by_any": 4,
    }
    assert [leak.reasons for leak in found.leaks] == [("lesion",), ("patient",), ("image",)]
    givers = [leak.partner.image for leak in found.leaks]
    assert givers == ["ISIC_0000001", "ISIC_0000003", "ISIC_0000004"]


def test_a_table_that_is_in_neither_tells_that_two_images_are_of_one_lesion(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [("ISIC_0000001", "", "")])
    b = table(tmp_path / "b", [("ISIC_0000002", "IL_7", "")])
    knowing = table(
        tmp_path / "ham", [("ISIC_0000001", "HAM_1", ""), ("ISIC_0000002", "HAM_1", "")]
    )
    assert audit(a, b).rows_by_any == 0
    assert audit(a, b, knowing).rows_by_lesion == 1


def test_a_leak_by_several_steps_is_called_a_chain(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [("ISIC_0000001", "IL_1", "")])
    b = table(tmp_path / "b", [("ISIC_0000002", "", "IP_2")])
    knowing = table(tmp_path / "c", [("ISIC_0000003", "IL_1", "IP_2")])
    (leak,) = audit(a, b, knowing).leaks
    assert leak.reasons == ("chain",)


def test_copies_under_another_name_are_found_by_picture(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "a" / "images" / f"a{number}.png", number)
        picture(tmp_path / "b" / "images" / f"b{number}.png", number + 3)
    for part in "ab":
        rows = [{"image": f"{part}{n}", "melanoma": "0"} for n in range(4)]
        write_table(tmp_path / part / "labels.csv", rows)
    found = audit(
        read_datasets([tmp_path / "a"]),
        read_datasets([tmp_path / "b"]),
        compare=pair_up,
    )
    assert (found.near_duplicate_pairs, found.rows_by_duplicate, found.rows_by_any) == (1, 1, 1)
    save_leaks(tmp_path / "leaks.csv", found.leaks)
    with (tmp_path / "leaks.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["image"], row["image_a"], row["reasons"]) == ("b0", "a3", "near duplicate")


def test_listed_duplicates_count_across_the_two_sides(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [("ISIC_0000001", "", "")])
    b = table(tmp_path / "b", [("ISIC_0000002", "", "")])
    write_table(
        tmp_path / "b" / "pairs.csv",
        [{"image_name_1": "ISIC_0000001", "image_name_2": "ISIC_0000002"}],
    )
    found = audit(a, read_datasets([tmp_path / "b"]))
    assert (found.listed_pairs, found.rows_by_duplicate, found.rows_by_any) == (1, 1, 1)
    assert b[0].pairs == []


def test_listed_duplicates_count_whatever_they_are_called(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [("case_17", "", "")])
    table(tmp_path / "b", [("case_90", "", "")])
    write_table(
        tmp_path / "b" / "pairs.csv", [{"image_name_1": "case_17", "image_name_2": "case_90.jpg"}]
    )
    found = audit(a, read_datasets([tmp_path / "b"]))
    assert (found.listed_pairs, found.rows_by_duplicate, found.rows_by_any) == (1, 1, 1)
    assert [leak.reasons for leak in found.leaks] == [("listed duplicate",)]


PIXELS = "balanced/train_balanced_224x224"


@pytest.mark.parametrize(
    ("a", "b", "knowing", "expected"),
    [
        (
            "balanced/train-set-metadata.csv",
            "balanced/valid-set-metadata.csv",
            (),
            {"shared_lesions": 484, "rows_by_lesion": 741, "rows_by_lesion_or_patient": 1320},
        ),
        (
            "isic2020/train.csv",
            "balanced/valid-set-metadata.csv",
            (),
            {"shared_images": 733, "rows_by_image": 733},
        ),
        # Folders of pictures alone: HAM10000 knows their lesions.
        (f"{PIXELS}/train", f"{PIXELS}/val", ("ham10000",), {"rows_a_by_lesion": 200}),
        # Their lesions are MSK4_ in the one and IL_ in the other.
        ("isic2017", "balanced/valid-set-metadata.csv", (), {"rows_a_by_lesion": 48}),
    ],
    ids=["the paper's split", "ISIC 2020", "balanced pixels", "ISIC 2017"],
)
def test_the_known_leaks_of_the_real_data(
    shared_data: Path, a: str, b: str, knowing: tuple[str, ...], expected: dict[str, int]
) -> None:
    found = audit(
        read_datasets([shared_data / a]),
        read_datasets([shared_data / b]),
        read_datasets([shared_data / name for name in knowing]),
    ).figures()
    assert {name: found[name] for name in expected} == expected
