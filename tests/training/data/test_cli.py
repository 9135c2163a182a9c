"""`mmtl-train data`, as a researcher uses it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.data.drawn import LAYOUTS, isic, picture
from tests.training.folders import write_table
from training.cli import main
from training.data.layouts import load_layouts
from training.data.manifest import Record, load_manifest, save_manifest
from training.data.vocabulary import Split


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mmtl-train", "data", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("isic2019", "plain"):
        (tmp_path / name).mkdir()
        LAYOUTS[name][1](tmp_path / name)
    return tmp_path


def test_check_counts_and_names_what_is_wrong(folder: Path, capsys) -> None:
    assert run(capsys, "check", folder)[0] == 0
    damaged = next((folder / "plain" / "images").iterdir())
    damaged.write_bytes(b"no image")
    picture(folder / "others" / "photo.jpg", 1)
    (folder / "others" / "notes.csv").write_text("who,what\nme,that\n")
    table = folder / "plain" / "labels.csv"
    table.write_text(table.read_text().replace(",61,", ",old,", 1))
    status, out, _ = run(capsys, "check", folder)
    assert status == 1
    assert "2 (2 to mend)" in out
    assert f"{damaged}: The bytes are not an image" in out
    assert f"{table}, row 2, column age: 'old' is not an age in years." in out
    assert f"{folder / 'others'}: 1 images of no dataset." in out
    assert f"{folder / 'others' / 'notes.csv'}: a table that no layout claims." in out
    _, out, _ = run(capsys, "check", folder, "--json", "--no-pixels")
    found = json.loads(out)
    assert [item["layout"] for item in found["datasets"]] == ["ISIC 2019", "plain CSV"]
    assert found["datasets"][0]["known"] == {
        "melanoma": 8,
        "diagnosis": 8,
        "age": 8,
        "sex": 9,
        "site": 9,
        "lesion": 9,
        "patient": 0,
    }
    assert found["datasets"][0]["melanomas"] == 1
    assert found["datasets"][0]["counts"]["sex"] == {"female": 9}


def test_check_tells_everything_that_must_be_mended_and_some_of_the_rest(
    tmp_path: Path, capsys
) -> None:
    names = [f"{number:03}" for number in range(90)]
    for name in names:
        picture(tmp_path / f"{name}.jpg", int(name))
    ages = ["old"] * 30 + ["61"] * 60
    rows = [
        {"image": name, "melanoma": "0", "age": age, "diagnosis": "a new one"}
        for name, age in zip(names, reversed(ages), strict=True)
    ]
    write_table(tmp_path / "labels.csv", rows)
    status, out, _ = run(capsys, "check", tmp_path, "--no-pixels")
    assert status == 1
    assert out.count("'old' is not an age in years.") == out.count("To mend: ") == 30
    assert out.count("'a new one' is not a diagnosis") == 20
    assert "... and 70 more." in out


def test_annotate_joins_a_bare_folder_by_isic_id(folder: Path, capsys) -> None:
    for number in (0, 3, 77):
        picture(folder / "bare" / f"{isic(number)}_downsampled.jpg", number)
    out = folder / "out.csv"
    status, printed, _ = run(
        capsys, "annotate", folder / "bare", "--with", folder / "isic2019", "-o", out
    )
    assert status == 0
    assert f"2 of 3 images found in the metadata; wrote {out}." in printed
    assert f"not found: {isic(77)}_downsampled.jpg" in printed
    first, second, third = load_manifest(out)
    assert (first.melanoma, second.diagnosis, third.melanoma) == (True, "actinic keratosis", None)
    assert second.lesion == "BCN_0000001"


def test_annotate_keeps_what_the_folder_says_and_tells_of_disagreement(
    folder: Path, capsys
) -> None:
    for name in ("mel", "oth"):
        (folder / "set" / name).mkdir(parents=True)
    picture(folder / "set" / "oth" / "ISIC2019_0000000_oth.jpg", 0)
    out = folder / "out.csv"
    _, printed, _ = run(
        capsys, "annotate", folder / "set", "--with", folder / "isic2019", "-o", out
    )
    (record,) = load_manifest(out)
    assert record.melanoma is False
    assert "ISIC_0000000: melanoma is False in balanced (ISIC2019) and before, True" in printed


def test_annotate_tells_what_the_folder_s_own_table_does_not_name(folder: Path, capsys) -> None:
    for number in (0, 3):
        picture(folder / "own" / f"{isic(number)}.jpg", number)
    write_table(folder / "own" / "labels.csv", [{"image": isic(0), "melanoma": "1"}])
    out = folder / "out.csv"
    _, printed, told = run(
        capsys, "annotate", folder / "own", "--with", folder / "isic2019", "-o", out
    )
    assert "1 of 1 images found in the metadata" in printed
    assert f"Left out: 1 images in {folder / 'own'}, of no dataset." in told


def test_annotate_leaves_nothing_out_beside_a_list_of_duplicates(folder: Path, capsys) -> None:
    picture(folder / "bare" / f"{isic(0)}.jpg", 0)
    pairs = [{"image_name_1": isic(0), "image_name_2": isic(3)}]
    write_table(folder / "bare" / "duplicates.csv", pairs)
    out = folder / "out.csv"
    _, printed, told = run(
        capsys, "annotate", folder / "bare", "--with", folder / "isic2019", "-o", out
    )
    assert ("1 of 1 images" in printed, "Left out" in told) == (True, False)


def test_audit_answers_as_a_table_and_as_json(folder: Path, capsys) -> None:
    rows = [{"image": isic(1), "melanoma": "0"}, {"image": isic(50), "melanoma": "0"}]
    (folder / "b").mkdir()
    write_table(folder / "b" / "b.csv", rows)
    arguments = ("audit", folder / "isic2019", folder / "b", "--csv", folder / "leaks.csv")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "50.0%" in out
    assert (folder / "leaks.csv").read_text().count("\n") == 2
    found = json.loads(run(capsys, *arguments, "--json", "--no-pixels")[1])
    assert (found["rows_by_image"], found["rows_b"], found["rows_a"]) == (1, 2, 9)
    assert found["near_duplicate_pairs"] is None
    table = folder / "plain" / "labels.csv"
    table.write_text(table.read_text().replace(",61,", ",old,", 1))
    status, _, err = run(capsys, "audit", folder / "plain", folder / "b")
    assert (status, "'old' is not an age" in err) == (2, True)


def test_patients_that_a_table_names_under_several_datasets_are_told_of(
    tmp_path: Path, capsys
) -> None:
    rows = [f"{n}.jpg,{n // 2},camera {n % 2},{n % 5 == 0:d}" for n in range(60)]
    (tmp_path / "cases.csv").write_text("\n".join(["image,patient,dataset,melanoma", *rows]))
    arguments = ("split", tmp_path, "-o", tmp_path / "out.csv", "--no-pixels")
    status, _, err = run(capsys, *arguments)
    assert status == 0
    assert "Caution: 30 ids of patients or lesions stand under several names" in err
    status, _, err = run(capsys, *arguments, "--same-ids")
    assert (status, "Caution" in err) == (0, False)


def test_a_manifest_that_split_wrote_is_read_back_and_audited_within(folder: Path, capsys) -> None:
    rows = [{"image": isic(n), "patient": str(n // 2), "melanoma": str(n % 2)} for n in range(100)]
    for name in ("one", "two"):
        (folder / "clinic" / name).mkdir(parents=True)
        write_table(folder / "clinic" / name / f"{name}.csv", rows)
    out = folder / "elsewhere" / "manifest.csv"
    arguments = ("split", folder / "clinic", "-o", out, "--same-ids")
    assert run(capsys, *arguments)[0] == 0
    assert len(load_manifest(out)) == 200
    both = (out, out, "--split-a", "train", "--split-b", "test", "--json", "--same-ids")
    found = json.loads(run(capsys, "audit", *both)[1])
    assert (found["rows_by_any"], found["rows_a"] + found["rows_b"] > 100) == (0, True)
    ones, twos = (folder / "clinic" / name for name in ("one", "two"))
    assert "50 lesion or patient ids are equal" in run(capsys, "audit", ones, twos)[1]


def test_what_a_manifest_holds_together_stays_together(folder: Path, capsys) -> None:
    many = [Record(f"m-{n}", "", "clinic", melanoma=n % 2 == 0) for n in range(100)]
    for first in range(0, 60, 20):
        many[first] = replace(many[first], component="one")
    save_manifest(folder / "many.csv", many)
    out = folder / "out.csv"
    assert run(capsys, "split", folder / "many.csv", "-o", out)[0] == 0
    assert len({r.split for r in load_manifest(out) if r.image in ("m-0", "m-20", "m-40")}) == 1
    ends = [
        replace(each, split=Split.TRAIN if row < 20 else Split.TEST)
        for row, each in enumerate(many)
    ]
    save_manifest(out, ends)
    told = ("audit", out, out, "--split-a", "train", "--split-b", "test", "--json")
    assert json.loads(run(capsys, *told)[1])["rows_by_any"] == 2
    status, _, err = run(capsys, "audit", out, out, "--split-a", "validation")
    assert (status, "has no rows of the split validation" in err) == (2, True)


def test_annotate_gives_every_picture_a_name_of_its_own(folder: Path, capsys) -> None:
    for name in ("a/1.jpg", "b/1.jpg", f"{isic(3)}.jpg", f"b/{isic(3)}_downsampled.jpg"):
        picture(folder / "bare" / name, len(name))
    out = folder / "out.csv"
    run(capsys, "annotate", folder / "bare", "--with", folder / "isic2019", "-o", out)
    found = load_manifest(out)
    assert [record.image for record in found] == [isic(3), "a/1", "b/1"]
    assert found[0].path.endswith(f"{isic(3)}.jpg")


def test_a_manifest_in_a_folder_does_not_hide_its_datasets(folder: Path, capsys) -> None:
    out = folder / "manifest.csv"
    arguments = ("split", folder / "plain", "-o", out, "--validation", "0", "--test", "0")
    assert run(capsys, *arguments)[0] == 0
    found = json.loads(run(capsys, "check", folder, "--json", "--no-pixels")[1])
    assert [item["layout"] for item in found["datasets"]] == ["ISIC 2019", "plain CSV"]


def test_split_keeps_the_splits_that_rows_have_if_told_to(folder: Path, capsys) -> None:
    parts = ("train", "val", "test", "")
    rows = [
        {"image": f"own-{n}", "melanoma": str(n % 2), "split": parts[n % 4]} for n in range(200)
    ]
    picture(folder / "own" / "elsewhere" / "a.png", 1)
    write_table(folder / "own" / "mine.csv", rows)
    out = folder / "manifest.csv"
    status, _, err = run(capsys, "split", folder / "own", "-o", out, "--keep", "--no-pixels")
    assert (status, err) == (
        0,
        f"Left out: 1 images in {folder}/own/elsewhere, of no dataset.\n",
    )
    splits = (Split.TRAIN, Split.VALIDATION, Split.TEST, Split.TRAIN)
    kept = {record.image: record.split for record in load_manifest(out)}
    assert kept == {f"own-{n}": splits[n % 4] for n in range(200)}
    status, _, err = run(capsys, "split", folder / "own" / "mine.csv", "-o", out, "--no-pixels")
    assert (status, err) == (0, "150 rows had splits of their own, which --keep keeps.\n")


def test_split_tells_what_is_not_dermoscopic(folder: Path, capsys) -> None:
    rows = [
        {"isic_id": isic(n), "diagnosis": "nevus", "image_type": ("dermoscopic", "clinical")[n < 3]}
        for n in range(60)
    ]
    (folder / "archive").mkdir()
    write_table(folder / "archive" / "metadata.csv", rows)
    out = folder / "manifest.csv"
    status, _, err = run(capsys, "split", folder / "archive", "-o", out, "--no-pixels")
    assert (status, len(load_manifest(out))) == (0, 57)
    assert err.startswith("Left out: 3 images of archive that its table calls not dermoscopic")


def test_split_writes_manifests(folder: Path, capsys) -> None:
    rows = [
        {"image": isic(n), "patient": f"IP_{n // 2}", "melanoma": str(n % 4 // 2)}
        for n in range(200)
    ]
    write_table(folder / "many.csv", rows)
    out = folder / "manifest.csv"
    assert run(capsys, "split", folder / "many.csv", "-o", out)[0] == 0
    assert {record.split for record in load_manifest(out)} == {
        Split.TRAIN,
        Split.VALIDATION,
        Split.TEST,
    }
    assert run(capsys, "split", folder / "many.csv", "-o", out, "--folds", 3)[0] == 0
    assert len(load_manifest(folder / "manifest-3.csv")) == 200
    status, _, err = run(capsys, "split", folder / "many.csv", "--paper")
    assert (status, "needs the balanced set's `val`" in err) == (2, True)
    status, _, err = run(capsys, "split", folder / "many.csv", "--paper", "--clean")
    assert err == "mmtl-train: Choose one of --paper, --clean, --keep and --folds.\n"


def test_every_layout_says_what_a_bundle_must_say_of_its_data() -> None:
    for layout in load_layouts():
        assert layout.TITLE
        assert layout.LICENCE
