"""Preparing a run again: what is fitted is not lost, and not taken for something else."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.lesions import lesion
from tests.training.conftest import SMALL, small
from tests.training.folders import draw_ham10000
from training.cli import cli
from training.config import Config
from training.data.manifest import DataError, load_manifest
from training.data.splits import hold_out
from training.data.vocabulary import Split
from training.fit import fit
from training.prepare import prepare, prepare_manifest
from training.run import Run
from training.state import load_tensors

ONE_EPOCH = SMALL.model_copy(update={"train_on": ("HAM10000",), "epochs": 1, "size": 32})


def fitted(folder: Path, data: Path, config: Config = ONE_EPOCH, lesions: int = 120) -> Run:
    draw_ham10000(data / "ham10000", lesions)
    run = Run(folder)
    with small():
        prepare(data, run, config)
        fit(run, workers=0)
    return run


def content(run: Run) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.folder)): path.read_bytes()
        for path in run.folder.rglob("*")
        if path.is_file()
    }


def test_a_fitted_run_is_whole_after_other_data_is_refused(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", tmp_path / "data")
    before = content(run)
    pictures = sorted((tmp_path / "data").rglob("*.jpg"))
    picture, pixels = pictures[0], pictures[0].read_bytes()
    picture.unlink()
    with small(), pytest.raises(DataError, match="was fitted to other data"):
        prepare(tmp_path / "data", run, ONE_EPOCH)
    assert content(run) == before
    picture.write_bytes(pixels[: len(pixels) // 2])
    with small(), pytest.raises(DataError, match="damaged"):
        prepare(tmp_path / "data", run, ONE_EPOCH)
    after = content(run)
    assert {name: after.get(name) for name in before} == before
    picture.write_bytes(pixels)
    (table,) = (tmp_path / "data").rglob("HAM10000_metadata*")
    told = table.read_text()
    table.write_text(told.replace(",mel,", ",nv,"))
    with small(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.__version__", "99")  # whose pixels are decoded anew
        with pytest.raises(DataError, match="was fitted to other data"):
            prepare(tmp_path / "data", run, ONE_EPOCH)
    assert content(run)["manifest.csv"] == before["manifest.csv"]
    table.write_text(told)
    with small():
        prepare(tmp_path / "data", run, ONE_EPOCH)
    assert content(run)["manifest.csv"] == before["manifest.csv"]
    assert not list(run.folder.glob("*.part*"))


def test_what_a_run_was_fitted_to_is_known_after_other_tables_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fitted(tmp_path / "run", tmp_path / "data")
    before = content(run)
    one, other = [r for r in load_manifest(run.manifest) if r.split is Split.TRAIN][:3:2]
    assert one.component != other.component
    links = tmp_path / "data" / "links"
    links.mkdir()
    rows = [f"{record.image},P1,{int(record.melanoma or 0)}" for record in (one, other)]
    (links / "cases.csv").write_text("\n".join(["image,patient,melanoma", *rows]))
    with small(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.__version__", "99")  # whose pixels are decoded anew
        with pytest.raises(DataError, match="was fitted to other data"):
            prepare(tmp_path / "data", run, ONE_EPOCH)
    assert "the pictures have been decoded anew" in capsys.readouterr().out
    assert content(run)["manifest.csv"] == before["manifest.csv"]
    assert content(run)["best.pt"] == before["best.pt"]


def test_an_ensemble_that_is_fitted_keeps_its_data(tmp_path: Path) -> None:
    config = ONE_EPOCH.model_copy(update={"folds": 2})
    run = fitted(tmp_path / "run", tmp_path / "data", config, 320)
    before = content(run)
    records = load_manifest(run.manifest)
    moved = next(row for row, record in enumerate(records) if record.split is Split.TRAIN)
    records[moved] = replace(records[moved], split=Split.TEST)
    with small(), pytest.raises(DataError, match=r"fold-\d was fitted to other data"):
        prepare_manifest(records, run, config)
    assert content(run) == before
    with small():
        prepare(tmp_path / "data", run, config)
        fit(run, workers=0)
    assert content(run)["fold-2/manifest.csv"] == before["fold-2/manifest.csv"]
    with small(), pytest.MonkeyPatch.context() as patch:
        # As another version of scikit-learn may part them.
        otherwise = partial(hold_out, seed=1)
        patch.setattr(
            "training.folds.hold_out", lambda records, folds, _: otherwise(records, folds)
        )
        with pytest.raises(DataError, match=r"fold-\d was fitted to other data"):
            fit(run, workers=0)
    assert content(run)["fold-2/manifest.csv"] == before["fold-2/manifest.csv"]


def test_what_a_fitted_run_went_on_from_stays_what_it_was(tmp_path: Path) -> None:
    first = fitted(tmp_path / "first", tmp_path / "data")
    records = load_manifest(first.manifest)
    config = ONE_EPOCH.model_copy(update={"start_from": str(first.folder)})
    second, third = Run(tmp_path / "second"), Run(tmp_path / "third")
    fewer = [r for row, r in enumerate(records) if r.split is not Split.TRAIN or row % 2]
    with small():
        prepare_manifest(records, second, config)
        fit(second, workers=0)
        prepare_manifest(records, third, config)
        inherited = load_manifest(second.inherited)
        first.checkpoint.unlink()
        first.best.unlink()
        prepare_manifest(fewer, first, ONE_EPOCH)
        fit(first, workers=0)
        prepare_manifest(records, second, config)
        with pytest.raises(DataError, match="has learned from other images"):
            fit(third, workers=0)
    assert load_manifest(second.inherited) == inherited
    assert len(inherited) > sum(record.split is not Split.TEST for record in fewer)


def test_a_split_that_is_overruled_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_ham10000(tmp_path / "ham10000", 120)
    for number in range(4):
        part = (
            tmp_path / "clinic" / ("train", "test")[number % 2] / ("melanoma", "nevus")[number // 2]
        )
        part.mkdir(parents=True)
        (part / f"{number}.jpg").write_bytes(lesion(9000 + number, 40, 30, number < 2))
    with small():
        config = ONE_EPOCH.model_copy(update={"train_on": ("HAM10000", "clinic")})
        counts = prepare(tmp_path, Run(tmp_path / "run"), config)
    assert counts["clinic", "train"] == 4
    assert "Caution: 2 images of clinic are learned from, which its own splits test on" in (
        capsys.readouterr().out
    )


def test_heads_that_nothing_teaches_are_told_of_and_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_ham10000(tmp_path / "data" / "ham10000", 120)
    (table,) = (tmp_path / "data").rglob("HAM10000_metadata*")
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *(row.rpartition(",")[0] + "," for row in rows)]))
    run = Run(tmp_path / "run")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("size = 64\nepochs = 1\nbatch_size = 8\n")
    with small():
        given = ["prepare", str(tmp_path / "data"), "--config", str(recipe), "--run"]
        cli([*given, str(run.folder)], standalone_mode=False)
        told = capsys.readouterr().out
        assert "no training image has a label of site, or all have the same one" in told
        assert "will find every class, or year of age, equally probable." in told
        fit(run, workers=0)
        recipe.write_text(f"{recipe.read_text()}start_from = '{run.folder}'\n")
        cli([*given, str(tmp_path / "again")], standalone_mode=False)
        assert f"the network keeps what {run.folder} taught it of them" in capsys.readouterr().out
    weights = load_tensors(run.best)
    assert not weights["heads.site.weight"].any()
    assert weights["heads.sex.weight"].any()
