"""`mmtl-train prepare | fit | export | evaluate`, from drawn pictures to a served answer."""

import csv
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastapi.testclient import TestClient
from torch import nn

from app.settings import Settings
from models.bundle import NAME, load_bundle
from tests.conftest import started
from tests.training.data.drawn import draw_isic_cli_old
from tests.training.folders import BALANCED_LESIONS, draw_balanced, draw_ham10000
from training import evaluate as evaluating
from training import export as exporting
from training import fit as fitting
from training import quantize as quantizing
from training.card import save_figures
from training.cli import cli
from training.cli import main as run_command_line
from training.config import Config
from training.data.manifest import DataError, load_manifest, save_manifest
from training.data.vocabulary import Split
from training.export import bundle_name, export
from training.fit import fit
from training.losses import MultiTaskLoss
from training.predictions import predict
from training.prepare import prepare, prepare_manifest
from training.quantize import TRUNK_WEIGHT
from training.release import evaluate_model, held_out
from training.run import Run, rows
from training.state import warmup_cosine
from training.zoo import load_zoo

CONFIG = Config(
    size=64,
    epochs=8,
    batch_size=8,
    learning_rate=5e-3,
    warmup_epochs=0.5,
    ema_decay=0.5,
    patience=8,
    train_on=("HAM10000", "isic2017"),
)


@pytest.fixture(scope="module", autouse=True)
def _small_backbone():
    """What is learned here can be learned by two convolutions, in seconds."""

    def build(*_: object):
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=3), nn.ReLU()
        )
        return backbone, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "build_feature_map", build)
        # A tenth of the resamples: what is tested is what is measured, not how sharply.
        patch.setattr(evaluating, "REPLICATES", 100)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    ham = draw_ham10000(folder / "ham10000", 320)
    draw_balanced(folder / "balanced", ham)
    (folder / "originals").mkdir()
    shutil.copy(ham / "HAM10000_images" / "ISIC_0000001.jpg", folder / "originals")
    (folder / "other").mkdir()
    shutil.copy(ham / "HAM10000_images" / "ISIC_0000002.jpg", folder / "other" / "photo_x.jpg")
    draw_isic_cli_old(folder / "isic2017", first=8000)
    draw_isic_cli_old(folder / "isic2020", first=9000)
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    prepare(data, run, CONFIG)
    fit(run, workers=0)
    return run


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, data: Path, fitted: Run) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    arguments = ["--run", str(fitted.folder), "--bundle", str(folder)]
    cli(["export", *arguments], standalone_mode=False)
    report = ["--publish", "--out", str(fitted.folder / "report")]
    cli(["evaluate", str(data), *arguments, *report], standalone_mode=False)
    return folder


def test_prepare_leaves_the_held_out_lesions_out(fitted: Run) -> None:
    records, pixels = fitted.load_data()
    assert pixels.shape == (686, 64, 64, 3)
    used = {records[row].lesion for row in rows(records, Split.TRAIN)}
    used |= {records[row].lesion for row in rows(records, Split.VALIDATION)}
    # The first image of each of these lesions stands in the balanced set; it has a second one.
    assert not used & {f"HAM_{number:07d}" for number in BALANCED_LESIONS}
    assert len(rows(records, Split.TEST, "balanced")) == 40


def test_a_dataset_can_be_held_out_as_a_whole(data: Path, tmp_path: Path) -> None:
    held = {"train_on": ["HAM10000"], "test_on": ["isic2017"]}
    counts = prepare(data, Run(tmp_path), Config(size=32, **held))
    assert {split for dataset, split in counts if dataset == "isic2017"} == {"test"}
    with pytest.raises(DataError, match="holds no images of isic2016"):
        prepare(data, Run(tmp_path / "other"), Config(size=32, test_on=("isic2016",)))


def test_fit_writes_a_log_and_the_best_weights(fitted: Run) -> None:
    with fitted.log.open() as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == [str(epoch) for epoch in range(1, 9)]
    assert max(float(row["validation_auroc"]) for row in log) > 0.8
    assert all(np.isfinite(float(value)) for row in log for value in row.values())
    assert fitted.best.is_file()


def test_an_interrupted_run_ends_as_an_undisturbed_one(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Run(tmp_path / "again")
    shutil.copytree(fitted.folder, again.folder)
    for path in (again.checkpoint, again.best, again.log):
        path.unlink()
    one_epoch = fitting.train_one_epoch

    def killed_in_the_fourth(state, *arguments):
        if state.epoch == 3:
            raise KeyboardInterrupt
        return one_epoch(state, *arguments)

    monkeypatch.setattr(fitting, "train_one_epoch", killed_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        fit(again, workers=0)
    monkeypatch.undo()
    fit(again, workers=1)  # the number of workers does not change what is drawn
    ours, theirs = (torch.load(r.best, weights_only=True) for r in (again, fitted))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


def test_a_run_keeps_its_configuration_and_its_data(fitted: Run, data: Path) -> None:
    with pytest.raises(DataError, match=r"another configuration \(epochs 8 -> 3\)"):
        prepare(data, fitted, CONFIG.model_copy(update={"epochs": 3}))


def test_every_option_of_a_recipe_is_learned_with(
    data: Path, tmp_path: Path, bundle_folder: Path
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
        "teachers": (str(bundle_folder),),
        "validate_on": "",
    }
    prepare(data, run, CONFIG.model_copy(update=recipe))
    fit(run, workers=0)
    with run.log.open() as file:
        first, second = csv.DictReader(file)
    assert float(second["train_age"]) < float(first["train_age"])
    assert "<svg" in run.curves.read_text()
    bundle, _ = export(run, tmp_path / "bundle", views=4, name="ours", version="1.2.3")
    assert (bundle.manifest.name, bundle.manifest.version) == ("ours", "1.2.3")
    assert bundle.manifest.operating_point.dataset == "validation split"


def test_a_recipe_of_mixtures_goes_on_where_it_was_stopped(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "epochs": 2,
        "sizes": (48, 64),
        "augmentation": "occluded",
        "mixing": "mixup",
        "first_layer_rate": 0.1,
        "task_balancing": "famo",
        "precision": "bfloat16",
    }
    undisturbed, stopped = Run(tmp_path / "undisturbed"), Run(tmp_path / "stopped")
    some = load_manifest(fitted.manifest)[::2]
    prepare_manifest(some, undisturbed, CONFIG.model_copy(update=recipe))
    shutil.copytree(undisturbed.folder, stopped.folder)
    fit(undisturbed, workers=0)
    one_epoch = fitting.train_one_epoch

    def stopped_in_the_second(state, *arguments):
        if state.epoch == 1:
            raise KeyboardInterrupt
        return one_epoch(state, *arguments)

    monkeypatch.setattr(fitting, "train_one_epoch", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, workers=0)
    monkeypatch.undo()
    fit(stopped, workers=0)
    with undisturbed.log.open() as one, stopped.log.open() as other:
        ours, theirs = list(csv.DictReader(one)), list(csv.DictReader(other))
    for row in (*ours, *theirs):
        del row["seconds"]
    assert ours == theirs
    assert float(ours[1]["train_age"]) < float(ours[0]["train_age"])
    assert len(list(stopped.tensorboard.iterdir())) == 2  # a file for each start


def test_a_manifest_brings_its_own_splits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, run = tmp_path / "clean.csv", tmp_path / "run"
    folders = [str(data / "ham10000"), str(data / "balanced")]
    cli(["data", "split", *folders, "--clean", "-o", str(manifest)], standalone_mode=False)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('backbone = "mnasnet0_5"\nsize = 64\nvalidate_on = ""\n')
    told = ["prepare", "--manifest", str(manifest), "--config", str(recipe), "--run", str(run)]
    cli([*told, "--epochs", "3"], standalone_mode=False)
    assert "balanced (ISIC2019)" in capsys.readouterr().out
    config = Run(run).load_config()
    assert (config.backbone, config.size, config.epochs) == ("mnasnet0_5", 64, 3)
    records, pixels = Run(run).load_data()
    assert pixels.shape == (len(records), 64, 64, 3)
    assert {record.split for record in records} >= {Split.TRAIN, Split.VALIDATION, Split.TEST}
    recipe.write_text('validate_on = "elsewhere"\n')
    with pytest.raises(DataError, match=r"no images of elsewhere \(validate_on\)"):
        cli(told, standalone_mode=False)
    recipe.write_text('backbone = "vit_b_32"\nvalidate_on = ""\n')
    with pytest.raises(DataError, match=r"takes no images of 160 px .* Set size = 224"):
        cli(told, standalone_mode=False)
    with pytest.raises(DataError, match="--train-on is for a folder"):
        cli([*told, "--train-on", "HAM10000"], standalone_mode=False)
    with pytest.raises(DataError, match="Give a folder of datasets, or --manifest"):
        cli(["prepare"], standalone_mode=False)


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path, data: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(DataError, match="is not a run folder"):
        fit(run)
    with pytest.raises(DataError, match="holds no dataset in a layout"):
        prepare(tmp_path, run, CONFIG)
    with pytest.raises(DataError, match=r"train_on must name HAM10000.*prepare --manifest"):
        prepare(data, run, CONFIG.model_copy(update={"train_on": ("isic2017",)}))
    for update, sentence in (
        ({"validate_on": "elsewhere"}, r"no images of elsewhere \(validate_on\)"),
        ({"folds": 1000}, r"cannot be parted in 1000"),
        ({"weights_dir": "nowhere"}, r"weights_dir: nowhere is not a folder"),
    ):
        with pytest.raises(DataError, match=sentence):
            prepare(data, run, CONFIG.model_copy(update=update))
        assert not run.config.exists()  # and another recipe may have the folder
    with pytest.raises(DataError, match=r"start_from: nowhere has no fitted network"):
        prepare(data, run, CONFIG.model_copy(update={"start_from": "nowhere"}))
    prepare(data, run, CONFIG)
    with pytest.raises(DataError, match=r"is not fitted\. Run `mmtl-train fit` first"):
        export(run, tmp_path / "bundle")
    with pytest.raises(DataError, match="cannot be called 'Our network': small letters"):
        export(run, tmp_path / "bundle", name="Our network")
    with pytest.raises(DataError, match=r"three numbers, 1\.0\.2, not 'v2'"):
        export(run, tmp_path / "bundle", version="v2")


def test_why_a_dataset_cannot_be_learned_from_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    ham = draw_ham10000(tmp_path / "data" / "ham10000", 20)
    table = ham / "HAM10000_metadata.csv"
    whole = table.read_text()
    table.write_text(whole.replace(",dx,", ",diagnosis_code,"))
    with pytest.raises(DataError, match=r"holds no images of HAM10000; found are .* and dx\."):
        prepare(tmp_path / "data", run, CONFIG.model_copy(update={"train_on": ("HAM10000",)}))
    table.write_text(whole)
    shutil.rmtree(ham / "HAM10000_images")
    with pytest.raises(DataError, match=r"with 40 rows, but none of their image files"):
        prepare(tmp_path / "data", run, CONFIG.model_copy(update={"train_on": ("HAM10000",)}))


def test_every_backbone_gives_a_bundle_its_name() -> None:
    assert bundle_name("tf_efficientnet_lite2") == "mmtl-lite2"
    assert bundle_name("regnet_x_16gf") == "mmtl-regnet-x-16gf"
    for entry in load_zoo():
        assert re.fullmatch(NAME, bundle_name(entry.name))


def test_a_bundle_is_evaluated_with_its_own_run_only(
    bundle_folder: Path, fitted: Run, data: Path, tmp_path: Path
) -> None:
    other = Run(tmp_path / "other")
    shutil.copytree(fitted.folder, other.folder)
    records, _ = other.load_data()
    learned = rows(records, Split.TRAIN)[0]
    records[learned] = replace(records[learned], split=Split.EXCLUDED)
    save_manifest(other.manifest, records)
    bundle = load_bundle(bundle_folder)
    found = predict(bundle, held_out(records, Split.TEST))
    report = evaluate_model(found, records, Split.TEST, bundle=bundle)
    assert "not the one that the bundle was fitted with" in report["cautions"][0]
    with pytest.raises(DataError, match="fitted on other data"):
        save_figures(bundle, report)
    with pytest.raises(DataError, match="fitted on other data"):
        export(other, tmp_path / "bundle")


def test_a_damaged_file_is_named(fitted: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"checkpoint\.pt is damaged .* Delete it and fit again"):
        fit(run, workers=0)
    whole = bytearray((fitted.checkpoint).read_bytes())
    for start in (40, 200, 500, 1500):  # within the pickle
        run.checkpoint.write_bytes(bytes(whole[:start] + b"\xff" * 30 + whole[start + 30 :]))
        with pytest.raises(DataError, match=r"checkpoint\.pt "):
            fit(run, workers=0)
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
    recipe = CONFIG.model_copy(update={"epochs": 1, "start_from": str(before.folder)})
    prepare_manifest(load_manifest(fitted.manifest), run, recipe)
    best = fit(run, workers=0)
    shutil.rmtree(before.folder)
    assert fit(run, workers=0, pretrained=True) == best


def test_a_worker_that_vanishes_is_one_sentence_and_what_was_fitted_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    prepare(data, run, CONFIG.model_copy(update={"epochs": 3}))
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


def test_every_artifact_is_written_and_verified(bundle_folder: Path) -> None:
    bundle = load_bundle(bundle_folder)
    formats = [artifact.format for artifact in bundle.manifest.artifacts]
    assert formats == ["onnx", "torch_export", "torchscript"]
    assert sorted(path.name for path in bundle_folder.iterdir()) == [
        "MODEL_CARD.md",
        "bundle.json",
        "metrics.json",
        "model.onnx",
        "model.pt2",
        "model.torchscript.pt",
    ]
    # Of the machine that exported it, the ONNX file says nothing.
    sources = str(Path(exporting.__file__).parent).encode()
    assert sources not in (bundle_folder / "model.onnx").read_bytes()


def test_as_many_views_as_there_are() -> None:
    with pytest.raises(DataError, match="--views is 1, 4"):
        cli(["export", "--views", "3"], standalone_mode=False)


def test_an_artifact_that_disagrees_is_not_written(
    fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporting.open_runner

    def wrong(*arguments):
        run = right(*arguments)
        return lambda images: {name: value + 0.01 for name, value in run(images).items()}

    monkeypatch.setattr(exporting, "open_runner", wrong)
    with pytest.raises(DataError, match=r"model\.onnx differs from eager torch by 0\.01"):
        export(fitted, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def quantized_folder(
    tmp_path_factory: pytest.TempPathFactory, bundle_folder: Path, fitted: Run
) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "quantized"
    shutil.copytree(bundle_folder, folder)
    arguments = ["--run", str(fitted.folder), "--bundle", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        # Of so few images, one is more than the share that is allowed.
        patch.setattr(quantizing, "MOST_FLIPS", 0.05)
        cli(["quantize", *arguments], standalone_mode=False)
    return folder


def test_a_network_in_integers_decides_alike_and_is_what_a_cpu_serves(
    quantized_folder: Path, bundle_folder: Path, fitted: Run
) -> None:
    bundle = load_bundle(quantized_folder)
    assert [(a.format, a.precision) for a in bundle.manifest.artifacts] == [
        ("onnx", "fp32"),
        ("torch_export", "fp32"),
        ("torchscript", "fp32"),
        ("onnx", "int8"),
    ]
    assert bundle.artifact_for_cpu().precision == "int8"
    before = {path.name: path.read_bytes() for path in bundle_folder.iterdir()}
    assert all(
        (quantized_folder / name).read_bytes() == data
        for name, data in before.items()
        if name not in ("bundle.json", "metrics.json", "MODEL_CARD.md")
    )
    # What was published is of what a CPU answered with before.
    assert bundle.manifest.metrics == ()
    assert load_bundle(bundle_folder).manifest.metrics
    assert not (quantized_folder / "metrics.json").exists()
    graph = onnx.load(bundle.path(bundle.artifact_for_cpu())).graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    trunk = next(node for node in graph.node if TRUNK_WEIGHT in node.input)
    assert trunk.op_type == "Conv"  # in floats, as everything behind it
    records, _ = fitted.load_data()
    tested = held_out(records, Split.TEST)
    integers, floats = predict(bundle, tested), predict(bundle, tested, "fp32")
    assert np.abs(integers.probability - floats.probability).max() > 0
    flips = (integers.probability >= integers.threshold) != (floats.probability >= floats.threshold)
    assert flips.mean() < 0.05
    with started(Settings(bundle=quantized_folder, device="cpu", max_batch=2)) as client:
        for record, expected in list(zip(tested, integers.probability, strict=True))[:5]:
            assert _probability(client, Path(record.path)) == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_quantized_is_one_sentence(
    bundle_folder: Path, fitted: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    records, mapped = run.load_data()
    pixels = np.array(mapped)
    np.save(run.cache, pixels[:, ::2, ::2])
    with pytest.raises(DataError, match=r"looks at 64 x 64 pixels; the images of .* have 32 x 32"):
        quantizing.quantize(run, bundle_folder)
    save_manifest(run.manifest, [replace(record, melanoma=None) for record in records])
    np.save(run.cache, pixels)
    with pytest.raises(DataError, match="validation images with and without melanoma"):
        quantizing.quantize(run, bundle_folder)


def test_integers_that_decide_otherwise_are_not_written(
    bundle_folder: Path, fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(quantizing, "MOST_FLIPS", -1.0)
    monkeypatch.setattr(quantizing, "_FLOAT_CONVOLUTIONS", (0, 1))
    with pytest.raises(DataError, match="answers too differently"):
        quantizing.quantize(fitted, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("artifact", ["onnx", "torch_export", "torchscript"])
def test_the_service_answers_what_evaluate_predicted(
    bundle_folder: Path, fitted: Run, artifact: str
) -> None:
    with (fitted.folder / "report" / "predictions.csv").open() as file:
        predicted = {
            row["image"]: float(row["melanoma_probability"])
            for row in csv.DictReader(file)
            if row["dataset"] == "HAM10000"
        }
    records, _ = fitted.load_data()
    settings = Settings(bundle=bundle_folder, artifact=artifact, trust_torch=True, max_batch=2)
    with started(settings) as client:
        for row in rows(records, Split.TEST, "HAM10000")[:5]:
            probability = _probability(client, Path(records[row].path))
            assert probability == pytest.approx(predicted[records[row].image], abs=1e-3)


def test_the_figures_the_card_and_the_page_say_what_was_measured(
    bundle_folder: Path, fitted: Run
) -> None:
    metrics = json.loads((bundle_folder / "metrics.json").read_text())
    card = (bundle_folder / "MODEL_CARD.md").read_text()
    report = json.loads((fitted.folder / "report" / "report.json").read_text())
    assert metrics == report
    auroc = metrics["sets"]["HAM10000"]["melanoma"]["AUROC"]
    assert auroc["low"] <= auroc["value"] <= auroc["high"]
    assert {"accuracy", "majority"} < metrics["sets"]["HAM10000"]["tasks"]["age"].keys()
    assert metrics["sets"]["balanced"]["images"] == 40
    assert metrics["originals"]["images"] == 1
    flagged = metrics["out of distribution"]["flagged"]
    assert flagged["other: photo"]["images"] == 1
    assert flagged["dermoscopy not learned from: isic2020"]["images"] == 6
    assert f"{auroc['value']:.3f}" in card
    assert f"{auroc['value']:.3f}" in (fitted.folder / "report" / "report.html").read_text()
    assert "CC BY-NC" in card
    assert f"| balanced | 40 | {metrics['sets']['balanced']['melanomas']} |" in card


def test_a_table_of_predictions_is_evaluated_and_compared(
    bundle_folder: Path, fitted: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "theirs.csv"
    lines = (fitted.folder / "report" / "predictions.csv").read_text().splitlines()
    table.write_text("\n".join(lines[:-3]))
    arguments = ["--run", str(fitted.folder), "--out", str(tmp_path / "report")]
    theirs = ["--predictions", str(table), "--threshold", "0.3", "--against", str(bundle_folder)]
    cli(["evaluate", *arguments, *theirs], standalone_mode=False)
    assert "AUROC less" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any("images of this split have a prediction" in line for line in report["cautions"])
    assert report["sets"]["HAM10000"]["compared"]["differences"]["AUROC"]["value"] == 0
    with pytest.raises(DataError, match="a table of predictions is none"):
        cli(["evaluate", *arguments, *theirs, "--publish"], standalone_mode=False)
    bundle = ["--bundle", str(bundle_folder), "--split", "train"]
    cli(["evaluate", *arguments, *bundle], standalone_mode=False)
    assert "fitted to: the figures are better" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(DataError, match="Only figures of the test split"):
        cli(["evaluate", *arguments, *bundle, "--publish"], standalone_mode=False)


def test_an_expected_error_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mmtl-train", "fit", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run_command_line()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"mmtl-train: {tmp_path} is not a run folder. Run `mmtl-train prepare` first.\n"
    )


def test_warm_up_rises_and_the_cosine_falls() -> None:
    rates = [warmup_cosine(epoch / 10, 1, 5) for epoch in range(51)]
    assert rates[0] == pytest.approx(0, abs=2e-3)
    assert rates[10] == 1
    assert rates[30] == pytest.approx(0.5)
    assert rates[50] == pytest.approx(0)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)


def _probability(client: TestClient, path: Path) -> float:
    answer = client.post("/predict", files={"files": path.read_bytes()}).json()
    return answer["results"][0]["prediction"]["melanoma"]["probability"]
