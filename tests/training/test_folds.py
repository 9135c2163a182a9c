"""An ensemble over folds: who learns from what, and one bundle of all its networks."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.bundle import load_bundle
from tests.training import team_member
from tests.training.folders import draw_ham10000
from training import fit as fitting
from training.cli import cli
from training.config import Config
from training.data.manifest import DataError, load_manifest, save_manifest
from training.data.vocabulary import Split
from training.fit import fit
from training.folds import members
from training.network import ServedNetwork
from training.prepare import prepare
from training.quantize import quantize
from training.run import Run, rows
from training.runners import onnx_runner
from training.sweep import ask

CONFIG = Config(
    folds=2, size=32, epochs=2, batch_size=16, learning_rate=5e-3, warmup_epochs=0.5, ema_decay=0.5
)


@pytest.fixture(autouse=True)
def _small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "build_feature_map", team_member.build)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ensemble")
    draw_ham10000(folder / "data" / "ham10000", 320)
    run = Run(folder / "run")
    prepare(folder / "data", run, CONFIG)
    return run


def test_a_stopped_ensemble_goes_on_and_is_one_bundle_of_its_networks_means(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that is not fitted, whichever test comes before.
    unfitted = shutil.ignore_patterns("fold-*")
    run = Run(shutil.copytree(run.folder, tmp_path / "run", symlinks=True, ignore=unfitted))
    one_epoch = fitting.train_one_epoch

    def stopped_in_the_second_network(state, *arguments):
        if state.config.seed == 1 and state.epoch == 1:
            raise KeyboardInterrupt
        return one_epoch(state, *arguments)

    monkeypatch.setattr(fitting, "train_one_epoch", stopped_in_the_second_network)
    with pytest.raises(KeyboardInterrupt):
        fit(run, workers=0)
    first, second = (Run(run.folder / name) for name in ("fold-1", "fold-2"))
    whole = first.best.stat().st_mtime_ns
    monkeypatch.setattr(fitting, "train_one_epoch", one_epoch)
    fit(run, workers=0)
    assert first.best.stat().st_mtime_ns == whole  # not fitted again
    assert not run.best.exists()
    assert first.cache.samefile(run.cache)
    assert (first.load_config().seed, second.load_config().seed) == (0, 1)

    for folder, fitted in (("mean", run), ("first", first), ("second", second)):
        arguments = ["--run", str(fitted.folder), "--bundle", str(tmp_path / folder)]
        cli(["export", *arguments], standalone_mode=False)
    bundle = load_bundle(tmp_path / "mean")
    assert "2 networks together" in bundle.manifest.description
    records, pixels = run.load_data()
    images = np.stack([pixels[row] for row in rows(records, Split.VALIDATION)])
    mean, one, other = (
        onnx_runner(load_bundle(tmp_path / name).path(bundle.artifact("onnx", "fp32")))(images)
        for name in ("mean", "first", "second")
    )
    for name in set(ServedNetwork.OUTPUTS) - {"ood_score"}:  # each fitted to other images
        expected = (one[name] + other[name]) / 2
        np.testing.assert_allclose(mean[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)
    assert not np.allclose(one["melanoma_logit"], other["melanoma_logit"])
    np.testing.assert_allclose(ask(run).scores, mean["melanoma_logit"], rtol=1e-4, atol=1e-4)

    with pytest.raises(DataError, match="is an ensemble, which is not put in integers"):
        quantize(run, tmp_path / "mean")


def test_each_network_is_stopped_by_images_that_only_it_has_not_seen(run: Run) -> None:
    records = load_manifest(run.manifest)
    split = {record.image: record.split for record in records}
    held: list[set[str]] = []
    for _, own in members(run, records):
        assert [record.image for record in own] == [record.image for record in records]
        parts = {part: {r.image for r in own if r.split is part} for part in Split}
        for image in parts[Split.VALIDATION] | parts[Split.TRAIN]:
            assert split[image] is Split.TRAIN
        seen, kept = (
            {r.component for r in own if r.split is part}
            for part in (Split.TRAIN, Split.VALIDATION)
        )
        assert not seen & kept
        held.append(parts[Split.VALIDATION])
    assert not held[0] & held[1]
    assert held[0] | held[1] == {image for image, part in split.items() if part is Split.TRAIN}


def test_networks_of_other_images_are_not_taken_together(run: Run, tmp_path: Path) -> None:
    fit(run, workers=0)
    changed = Run(tmp_path / "changed")
    changed.save_config(run.load_config())
    changed.take_pixels(run)
    first, *others = load_manifest(run.manifest)
    save_manifest(changed.manifest, [replace(first, age=35.0), *others])
    for name in ("fold-1", "fold-2"):
        (changed.folder / name).symlink_to(run.folder / name)
    with pytest.raises(DataError, match="was fitted on other data"):
        ask(changed)


def test_too_few_lesions_are_one_sentence(run: Run, tmp_path: Path) -> None:
    few = Run(tmp_path / "few")
    few.save_config(CONFIG.model_copy(update={"folds": 100}))
    few.take_pixels(run)
    records = load_manifest(run.manifest)
    train = [r for r in records if r.split is Split.TRAIN][:20]
    save_manifest(few.manifest, [*train, *(r for r in records if r.split is not Split.TRAIN)])
    with pytest.raises(DataError, match=r"components .* cannot be parted in 100"):
        fit(few, workers=0)
