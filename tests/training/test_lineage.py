"""What a network has learned from, by whatever way."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from models.bundle import TrainingData
from tests.bundles import make_bundle
from training.config import Config, parse_config
from training.data.manifest import DataError, Record, load_manifest, save_manifest
from training.data.vocabulary import Split
from training.lineage import (
    check_inherited,
    inheritance,
    keep_inheritance,
    learned,
    training_data,
)
from training.run import Run
from training.state import identity_of, save_tensors


def records(splits: str, dataset: str = "HAM10000", first: int = 0) -> list[Record]:
    """One a letter: t(rain), v(alidation), T(est), x(cluded)."""
    named = {"t": Split.TRAIN, "v": Split.VALIDATION, "T": Split.TEST, "x": Split.EXCLUDED}
    return [
        Record(
            f"ISIC_{number:07d}", "", dataset, split=named[letter], component=f"ISIC_{number:07d}"
        )
        for number, letter in enumerate(splits, start=first)
    ]


def fitted(folder: Path, own: list[Record], **settings: object) -> Run:
    run = Run(folder)
    folder.mkdir()
    run.save_config(Config(**settings))
    save_manifest(run.manifest, own)
    save_tensors(run.checkpoint, {"identity": identity_of(run.load_config(), own)})
    run.best.touch()
    return run


@pytest.mark.parametrize("lost", ["checkpoint", "manifest"])
def test_a_run_does_not_go_on_from_one_that_learned_nobody_knows_what(
    tmp_path: Path, lost: str
) -> None:
    first = fitted(tmp_path / "first", records("ttvT"))
    if lost == "checkpoint":
        first.checkpoint.unlink()
    else:
        save_manifest(first.manifest, records("tTvt"))
    with pytest.raises(DataError, match="learned from is not known"):
        inheritance(Config(start_from=str(first.folder)), records("tv", first=10))


def inherit(run: Run, config: Config, own: list[Record]) -> None:
    keep_inheritance(run, inheritance(config, own))


def names(found: list[Record]) -> list[int]:
    return sorted(int(record.image.removeprefix("ISIC_")) for record in found)


def test_a_run_that_goes_on_keeps_what_was_learned_before(tmp_path: Path) -> None:
    first = fitted(tmp_path / "first", records("ttvTx"))
    second = fitted(
        tmp_path / "second",
        records("tv", "isic2017", 10),
        start_from=str(first.folder),
        validate_on="isic2017",
    )
    inherit(second, second.load_config(), load_manifest(second.manifest))
    assert names(learned(second)) == [0, 1, 2, 10, 11]
    third = fitted(tmp_path / "third", records("t", first=20), start_from=str(second.folder))
    inherit(third, third.load_config(), load_manifest(third.manifest))
    assert names(learned(third)) == [0, 1, 2, 10, 11, 20]
    found = training_data(third)
    assert [(source.name, source.images) for source in found.sources] == [
        ("HAM10000", 4),
        ("isic2017", 2),
    ]


def test_images_that_are_set_aside_are_not_learned_from(tmp_path: Path) -> None:
    own = records("tv") + records("tv", "isic2017", 10) + records("v", "balanced (ISIC2019)", 20)
    run = fitted(tmp_path / "run", own)
    assert names(learned(run)) == [0, 1, 10]
    assert [(source.name, source.images) for source in training_data(run).sources] == [
        ("HAM10000", 2),
        ("isic2017", 1),
    ]
    of_all = fitted(tmp_path / "of all", own, validate_on="")
    assert names(learned(of_all)) == [0, 1, 10, 11, 20]


def test_what_is_learned_twice_counts_once(tmp_path: Path) -> None:
    first = fitted(tmp_path / "first", records("ttvT"))
    again = fitted(tmp_path / "again", records("ttvT"), start_from=str(first.folder))
    inherit(again, again.load_config(), load_manifest(again.manifest))
    assert names(learned(again)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        ("tttv", "ttTv", r"learned from 1 of the 1 images of the split test \(ISIC_0000002"),
        ("tttv", "tttT", "split test"),  # it was chosen by it
        ("tttv", "ttvt", "split validation"),
    ],
)
def test_a_run_does_not_go_on_from_one_that_knows_what_it_is_measured_on(
    tmp_path: Path, before: str, now: str, sentence: str
) -> None:
    first = fitted(tmp_path / "first", records(before))
    run, config = Run(tmp_path / "now"), Config(start_from=str(first.folder))
    with pytest.raises(DataError, match=sentence):
        inherit(run, config, records(now))
    assert not run.inherited.exists()


def test_another_image_of_the_same_lesion_is_known_too(tmp_path: Path) -> None:
    first = fitted(tmp_path / "first", records("tv"))
    other = [replace(record, component="ISIC_0000000") for record in records("T", first=50)]
    with pytest.raises(DataError, match="split test"):
        inherit(Run(tmp_path / "now"), Config(start_from=str(first.folder)), other)


def test_images_of_two_clinics_may_have_one_name(tmp_path: Path) -> None:
    named = [replace(record, image="17", component="") for record in records("t")]
    first = fitted(tmp_path / "first", named)
    other = [replace(named[0], dataset="elsewhere", split=Split.TEST)]
    assert inheritance(Config(start_from=str(first.folder)), other).records == named


def test_another_image_of_the_same_patient_is_known_too(tmp_path: Path) -> None:
    own = [replace(record, patient="IP_0000007") for record in records("tv")]
    first = fitted(tmp_path / "first", own)
    other = [replace(r, patient="ip_0000007", component="") for r in records("T", first=50)]
    with pytest.raises(DataError, match="lesions or patients"):
        inherit(Run(tmp_path / "now"), Config(start_from=str(first.folder)), other)


def test_what_earlier_teachers_learned_from_is_named(tmp_path: Path) -> None:
    teacher = make_bundle(tmp_path / "teacher")
    theirs = {source.name for source in teacher.manifest.training_data.sources}
    run = fitted(tmp_path / "0", records("tv"), teachers=(str(teacher.folder),))
    for number in (1, 2):
        before = str(run.folder)
        run = fitted(tmp_path / str(number), records("tv"), start_from=before)
        inherit(run, run.load_config(), load_manifest(run.manifest))
    shutil.rmtree(teacher.folder)
    assert {source.name for source in training_data(run).sources} == {"HAM10000"} | theirs
    run.inherited_sources.write_text("[{]")
    with pytest.raises(DataError, match=r"inherited\.json is damaged .* prepare` again"):
        training_data(run)
    inherit(run, Config(), records("tv"))
    assert not run.inherited_sources.exists()


@pytest.mark.parametrize(
    ("images", "archives", "owners"),
    [
        (("ISIC_0000001",), True, False),
        (("17",), False, True),
        (("ISIC_0000001", "17"), True, True),
    ],
)
def test_images_of_the_archive_keep_its_terms_in_a_folder_of_any_name(
    tmp_path: Path, images: tuple[str, ...], archives: bool, owners: bool
) -> None:
    (record,) = records("t", "downloads")
    run = fitted(tmp_path / "run", [replace(record, image=image) for image in images])
    found = training_data(run)
    (source,) = found.sources
    assert ("CC BY-NC" in found.licence) == ("CC BY-NC" in source.licence) == archives
    assert ("as its owner says" in source.licence) == owners


def test_a_run_whose_inheritance_is_not_known_says_so(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", records("tv"), start_from="elsewhere")
    with pytest.raises(DataError, match=r"prepared by an earlier version.*prepare` again"):
        training_data(run)


def test_a_run_goes_on_from_what_it_was_prepared_for(tmp_path: Path) -> None:
    first = fitted(tmp_path / "first", records("tvT"))
    run = Run(tmp_path / "now")
    run.folder.mkdir()
    inherit(run, Config(start_from=str(first.folder)), records("tvT"))
    check_inherited(run, first)
    shutil.rmtree(first.folder)
    fitted(tmp_path / "first", [*records("tvT"), *records("t", first=10)])
    with pytest.raises(DataError, match=r"has learned from other images than .*prepare` again"):
        check_inherited(run, first)
    first.best.unlink()
    with pytest.raises(DataError, match="has no fitted network"):
        check_inherited(run, first)


def test_validation_may_be_the_same(tmp_path: Path) -> None:
    first = fitted(tmp_path / "first", records("tvT"))
    run = fitted(tmp_path / "now", records("tvT"))
    inherit(run, Config(start_from=str(first.folder)), records("tvT"))
    assert run.inherited.is_file()
    inherit(run, Config(), records("tvT"))  # prepared anew, from the beginning
    assert not run.inherited.exists()


def test_there_must_be_something_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"start_from: .*nowhere has no fitted network"):
        inherit(Run(tmp_path), Config(start_from=str(tmp_path / "nowhere")), records("tv"))
    (tmp_path / "ensemble" / "fold-1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"ensemble is an ensemble\. .*: .*ensemble/fold-1\."):
        inherit(Run(tmp_path), Config(start_from=str(tmp_path / "ensemble")), records("tv"))
    with pytest.raises(DataError, match=r"start_from: with folds"):
        parse_config({"start_from": "runs/a", "folds": 3}, "a recipe")


def test_what_teachers_learned_from_is_named(tmp_path: Path) -> None:
    teacher = make_bundle(tmp_path / "teacher")
    run = fitted(tmp_path / "run", records("tv"), teachers=(str(teacher.folder),))
    found = training_data(run)
    assert isinstance(found, TrainingData)
    theirs = {source.name for source in teacher.manifest.training_data.sources}
    assert theirs
    assert {source.name for source in found.sources} == {"HAM10000"} | theirs
