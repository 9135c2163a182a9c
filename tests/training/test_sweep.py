"""Recipes tried on the same data, and compared."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training import team_member
from tests.training.folders import draw_ham10000
from training import fit as fitting
from training import sweep as sweeping
from training.cli import cli
from training.config import Config, parse_config
from training.data.manifest import DataError, load_manifest, save_manifest
from training.prepare import prepare
from training.run import Run
from training.sweep import load_recipes

SWEEPS = Path(__file__).parents[2] / "configs" / "sweeps"
SWEEP = """
[all]
size = 32
epochs = 2
batch_size = 16
learning_rate = 5e-3
warmup_epochs = 0.5
ema_decay = 0.5

[recipes.plain]

[recipes.mixup]
mixing = "mixup"
epochs = 1
"""


class Stopped(BaseException):
    """As a signal stops it."""


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_ready_sweeps_are_sound(path: Path) -> None:
    recipes = load_recipes(path)
    assert len(recipes) >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[all]", "needs at least two recipes"),
        ("[recipes.one]", "needs at least two recipes"),
        ("[recipe.one]", "there is no recipe in a sweep"),
        ("recipes = 3", "needs at least two recipes"),
        ("[recipes.a]\n[recipes.b]", "the recipes a and b are the same"),
        ("[recipes.a]\n[recipes.'../b']\nseed = 1", "'../b' cannot be a recipe"),
        ("[recipes.a]\n[recipes.b]\nepocs = 1", "recipe b: there is no setting epocs"),
        ("[recipes.a]\n[recipes.b]\nvalidate_on = ''", "b validates on other images than a"),
        ("[recipes", "is not TOML"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        load_recipes(path)
    assert said in str(refused.value)
    assert "sweep.toml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_images_to_learn_from_are_no_recipe_of_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text('[recipes.a]\n[recipes.b]\ntrain_on = ["HAM10000", "isic2017"]')
    with pytest.raises(DataError, match=r"differ in train_on are for a folder of datasets"):
        cli(["sweep", str(path), "--manifest", "manifest.csv"], standalone_mode=False)


def test_what_all_recipes_share_is_changed_by_one(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    recipes = load_recipes(path)
    assert list(recipes) == ["plain", "mixup"]
    assert [config.size for config in recipes.values()] == [32, 32]
    assert [config.epochs for config in recipes.values()] == [2, 1]


def test_a_stopped_sweep_goes_on_and_compares_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_ham10000(tmp_path / "data" / "ham10000", 320)
    recipes, folder = tmp_path / "sweep.toml", tmp_path / "sweep"
    recipes.write_text(SWEEP)
    told = ["sweep", str(recipes), str(tmp_path / "data"), "--run", str(folder), "--workers", "0"]
    monkeypatch.setattr(fitting, "build_feature_map", team_member.build)
    fitted: list[str] = []

    def fit(run: Run, workers: int) -> float:
        fitted.append(run.folder.name)
        if fitted == ["plain", "mixup"]:
            raise Stopped
        return fitting.fit(run, workers)

    monkeypatch.setattr(sweeping, "fit", fit)
    with pytest.raises(Stopped):
        cli(told, standalone_mode=False)
    assert "1 of 2 recipes are done" in (folder / "sweep.md").read_text()
    best = Run(folder / "plain").best.stat().st_mtime_ns
    cli(told, standalone_mode=False)
    assert fitted == ["plain", "mixup", "plain", "mixup"]
    assert Run(folder / "plain").best.stat().st_mtime_ns == best  # not fitted again
    page = (folder / "sweep.md").read_text()
    assert "seed 0" in page
    assert "2 of 2 recipes are done" in page
    assert "| mixup | mixing none -> mixup, epochs 2 -> 1 | 1 |" in page
    assert page in capsys.readouterr().out
    plain, mixup = json.loads((folder / "sweep.json").read_text())["recipes"]
    assert plain["difference"] is None
    difference = mixup["auroc"]["value"] - plain["auroc"]["value"]
    assert mixup["difference"]["value"] == pytest.approx(difference, abs=1e-5)
    assert mixup["difference"]["low"] <= mixup["difference"]["value"] <= mixup["difference"]["high"]
    # One cache on the disk for both.
    assert Run(folder / "mixup").cache.samefile(Run(folder / "plain").cache)
    recipes.write_text(SWEEP + "seed = 1\n")
    with pytest.raises(DataError, match=r"another configuration \(seed 0 -> 1\)"):
        cli(told, standalone_mode=False)
    # Other data in the same folder: neither the first recipe nor a later one is taken for it.
    recipes.write_text(SWEEP)
    shutil.rmtree(tmp_path / "data")
    draw_ham10000(tmp_path / "data" / "ham10000", 322)
    with pytest.raises(DataError, match=r"Recipe plain: .*other data"):
        cli(told, standalone_mode=False)
    shutil.rmtree(folder / "plain")
    with pytest.raises(DataError, match="1 of 2 recipes failed"):
        cli(told, standalone_mode=False)
    assert "mixup was fitted to other data" in (folder / "sweep.md").read_text()


def test_images_of_a_manifest_without_components_are_resampled_by_lesion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_ham10000(tmp_path / "data" / "ham10000", 320)
    monkeypatch.setattr(fitting, "build_feature_map", team_member.build)
    run = Run(tmp_path / "run")
    config = parse_config({"size": 32, "epochs": 1}, "here")
    prepare(tmp_path / "data", run, config)
    records = load_manifest(run.manifest)
    save_manifest(run.manifest, [replace(record, component="") for record in records])
    fitting.fit(run, 0)
    found = sweeping.ask(run)
    lesions = {(r.dataset, r.image): r.lesion for r in records}
    assert len(set(found.components)) == len({lesions[image] for image in found.images}) > 1


def test_an_ensemble_is_not_said_to_be_chosen_on_the_images_it_is_compared_on() -> None:
    answers = sweeping.Answers([], np.zeros(0, bool), np.zeros(0, np.float32), [], "data")
    plain, ensemble = Config(), Config(folds=3)
    said = "Those of an ensemble are not chosen on them"
    assert said not in sweeping.table([], answers, {"a": plain, "b": plain}, {})
    assert said in sweeping.table([], answers, {"a": plain, "b": ensemble}, {})


def test_a_recipe_that_fails_does_not_keep_the_others_from_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.toml"
    first, _, _ = SWEEP.partition("[recipes.mixup]")
    path.write_text(
        f"{first}[recipes.hot]\nlearning_rate = 1e30\n"
        f"[recipes.untaught]\nteachers = ['{tmp_path / 'none'}']\n[recipes.last]\nseed = 1\n"
    )
    draw_ham10000(tmp_path / "data" / "ham10000", 320)
    monkeypatch.setattr(fitting, "build_feature_map", team_member.build)
    told = [str(path), str(tmp_path / "data"), "--run", str(tmp_path / "sweep"), "--workers", "0"]
    with pytest.raises(DataError, match=r"2 of 4 recipes failed; .*sweep\.md says why"):
        cli(["sweep", *told], standalone_mode=False)
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "2 of 4 recipes are done" in table
    assert "| untaught | failed: " in table
    assert "| hot | failed: The loss of epoch 1 is not finite. Prepare another run" in table
    assert "| last | seed 0 -> 1" in table
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert list(found["failed"]) == ["hot", "untaught"]
