"""`fit`: what it writes, what interrupts it, and how it goes on."""

import csv
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.conftest import SMALL
from training import fit as fitting
from training.data.manifest import DataError, load_manifest
from training.export import export, load_networks
from training.fit import fit
from training.losses import MultiTaskLoss
from training.prepare import prepare, prepare_manifest
from training.run import Run
from training.state import precision_on, warmup_cosine

pytestmark = pytest.mark.usefixtures("small_backbone")


def test_fit_writes_a_log_and_the_best_weights(fitted: Run) -> None:
    with fitted.log.open() as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == [str(epoch) for epoch in range(1, 9)]
    assert max(float(row["validation_auroc"]) for row in log) > 0.8
    assert all(np.isfinite(float(value)) for row in log for value in row.values())
    assert fitted.best.is_file()


def stop_after(epochs: int, run: Run) -> None:
    """Fit so many epochs, and be interrupted in the next."""
    one_epoch = fitting.train_one_epoch

    def interrupted(state, *arguments):
        if state.epoch == epochs:
            raise KeyboardInterrupt
        return one_epoch(state, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "train_one_epoch", interrupted)
        fit(run, workers=0)


def test_an_interrupted_run_ends_as_an_undisturbed_one(
    fitted: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Run(tmp_path / "again")
    shutil.copytree(fitted.folder, again.folder)
    for path in (again.checkpoint, again.best, again.log):
        path.unlink()
    stop_after(3, again)
    capsys.readouterr()
    load_networks(again, again.load_data()[0])  # to export it, for one
    assert f"{again.folder} was stopped after 3 of 8 epochs" in capsys.readouterr().out
    fit(again, workers=1)  # the number of workers does not change what is drawn
    capsys.readouterr()
    load_networks(again, again.load_data()[0])
    assert "was stopped" not in capsys.readouterr().out
    ours, theirs = (torch.load(r.best, weights_only=True) for r in (again, fitted))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


def test_a_run_keeps_its_configuration_and_its_data(fitted: Run, data: Path) -> None:
    with pytest.raises(DataError, match=r"another configuration \(epochs 8 -> 3\)"):
        prepare(data, fitted, SMALL.model_copy(update={"epochs": 3}))


def test_every_option_of_a_recipe_is_learned_with(
    data: Path, tmp_path: Path, fitted_bundle: Path
) -> None:
    run = Run(tmp_path / "run")
    recipe = {
        "epochs": 2,
        "accumulate": 2,
        "backbone_rate": 0.5,
        "frozen_epochs": 1,
        "freeze_batch_norm": True,
        "imbalance": "focal",
        "task_balancing": "uncertainty",
        "teachers": (str(fitted_bundle),),
        "validate_on": "",
    }
    prepare(data, run, SMALL.model_copy(update=recipe))
    fit(run, workers=0)
    with run.log.open() as file:
        first, second = csv.DictReader(file)
    assert float(second["train_age"]) < float(first["train_age"])
    assert "<svg" in run.curves.read_text()
    bundle, _ = export(run, tmp_path / "bundle", views=4, name="ours", version="1.2.3")
    assert (bundle.manifest.name, bundle.manifest.version) == ("ours", "1.2.3")
    assert bundle.manifest.operating_point.dataset == "validation split"


def test_a_recipe_of_mixtures_goes_on_where_it_was_stopped(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "epochs": 2,
        "sizes": (48, 64),
        "augmentation": "occluded",
        "mixing": "mixup",
        "first_layer_rate": 0.1,
        "task_balancing": "famo",
        "precision": "auto",
    }
    monkeypatch.setattr("training.state.has_amx", lambda: True)
    undisturbed, stopped = Run(tmp_path / "undisturbed"), Run(tmp_path / "stopped")
    some = load_manifest(fitted.manifest)[::2]
    prepare_manifest(some, undisturbed, SMALL.model_copy(update=recipe))
    shutil.copytree(undisturbed.folder, stopped.folder)
    fit(undisturbed, workers=0)
    stop_after(1, stopped)
    assert "Computing in bfloat16" in capsys.readouterr().out
    # On another machine, it goes on with what it has begun with.
    monkeypatch.setattr("training.state.has_amx", lambda: False)
    fit(stopped, workers=0)
    assert "Computing in bfloat16" in capsys.readouterr().out
    with undisturbed.log.open() as one, stopped.log.open() as other:
        ours, theirs = list(csv.DictReader(one)), list(csv.DictReader(other))
    for row in (*ours, *theirs):
        del row["seconds"]
    assert ours == theirs
    assert float(ours[1]["train_age"]) < float(ours[0]["train_age"])
    assert len(list(stopped.tensorboard.iterdir())) == 2  # a file for each start


def test_a_damaged_file_is_named(fitted: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    with pytest.raises(
        DataError, match=r"checkpoint\.pt is damaged\. Delete checkpoint\.pt and best\.pt"
    ):
        fit(run, workers=0)
    whole = bytearray((fitted.checkpoint).read_bytes())
    for start in (40, 200, 500, 1500):  # within the pickle
        run.checkpoint.write_bytes(bytes(whole[:start] + b"\xff" * 30 + whole[start + 30 :]))
        with pytest.raises(DataError, match=r"checkpoint\.pt "):
            fit(run, workers=0)
    torch.save({"epoch": 1}, run.checkpoint)
    with pytest.raises(DataError, match=r"of another version|another version .*has no identity"):
        fit(run, workers=0)
    with pytest.raises(DataError, match="another version"):
        load_networks(run, load_manifest(run.manifest))
    shutil.copyfile(fitted.checkpoint, run.checkpoint)
    torch.save({"other": torch.zeros(1)}, run.best)
    with pytest.raises(DataError, match=r"best\.pt was made by another version .*another network"):
        load_networks(run, load_manifest(run.manifest))
    run.best.unlink()
    for go_on in (
        lambda: fit(run, workers=0),
        lambda: load_networks(run, load_manifest(run.manifest)),
    ):
        with pytest.raises(DataError, match=r"is gone\. Delete .*checkpoint\.pt, too"):
            go_on()
    run.cache.write_bytes(run.cache.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"pixels\.npy is damaged"):
        fit(run, workers=0)


def test_a_loss_that_is_not_finite_stops_the_run(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    run.checkpoint.unlink()
    nan = torch.tensor(torch.nan, requires_grad=True)
    monkeypatch.setattr(MultiTaskLoss, "forward", lambda *_: (nan, {}))
    with pytest.raises(DataError, match="not finite"):
        fit(run, workers=0)


def test_a_network_that_diverges_in_an_epoch_s_last_step_stops_the_run(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    run.checkpoint.unlink()
    one_epoch = fitting.train_one_epoch

    def diverge(state, *arguments):
        losses = one_epoch(state, *arguments)
        for parameter in state.average.parameters():
            parameter.data.fill_(torch.nan)
        return losses

    monkeypatch.setattr(fitting, "train_one_epoch", diverge)
    with pytest.raises(DataError, match=r"loss of epoch 1 is not finite\. Prepare another"):
        fit(run, workers=0)


def test_what_goes_wrong_in_a_worker_is_told_as_it_is(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    run.checkpoint.unlink()

    def fail(*_: object):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(fitting.AugmentedImages, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        fit(run, workers=1)


def test_a_log_that_was_not_written_is_made_up_for(fitted: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    whole = run.log.read_text()
    run.log.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # killed just before the end
    run.curves.unlink()
    fit(run, workers=0)
    assert run.log.read_text() == whole
    assert run.curves.is_file()


def test_a_run_resumes_without_what_it_began_with(fitted: Run, tmp_path: Path) -> None:
    before, run = Run(tmp_path / "before"), Run(tmp_path / "run")
    shutil.copytree(fitted.folder, before.folder)
    recipe = SMALL.model_copy(update={"epochs": 1, "start_from": str(before.folder)})
    prepare_manifest(load_manifest(fitted.manifest), run, recipe)
    unfinished = run.folder / ".checkpoint.pt.123.part"  # of a process that was killed
    unfinished.touch()
    best = fit(run, workers=0)
    assert not unfinished.exists()
    shutil.rmtree(before.folder)
    assert fit(run, workers=0, pretrained=True) == best


def test_a_worker_that_vanishes_is_one_sentence_and_what_was_fitted_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    prepare(data, run, SMALL.model_copy(update={"epochs": 3}))
    item = fitting.AugmentedImages.__getitem__

    def die(images: fitting.AugmentedImages, number: int):
        if images.epoch == 1 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return item(images, number)

    monkeypatch.setattr(fitting.AugmentedImages, "__getitem__", die)
    with pytest.raises(DataError, match=r"died in epoch 2 .* fewer --workers"):
        fit(run, workers=1)
    with run.log.open() as file:
        assert len(list(csv.DictReader(file))) == 1
    fit(run, workers=0)
    with run.log.open() as file:
        assert len(list(csv.DictReader(file))) == 3


@pytest.mark.parametrize(
    ("precision", "fast", "found"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("float32", True, "float32"),
        ("bfloat16", False, "bfloat16"),
    ],
)
def test_bfloat16_is_taken_where_the_processor_multiplies_it(
    precision: str, fast: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.state.has_amx", lambda: fast)
    assert precision_on("cpu", SMALL.model_copy(update={"precision": precision})) == found


def test_warm_up_rises_and_the_cosine_falls() -> None:
    rates = [warmup_cosine(epoch / 10, 1, 5) for epoch in range(51)]
    assert rates[0] == pytest.approx(0, abs=2e-3)
    assert rates[10] == 1
    assert rates[30] == pytest.approx(0.5)
    assert rates[50] == pytest.approx(0)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
