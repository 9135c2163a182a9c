"""`mmtl-train prepare | fit | export | evaluate`, from drawn pictures to a served answer."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastapi.testclient import TestClient

from app.settings import Settings
from models.bundle import NAME, load_bundle
from models.recalibration import OUTCOMES, recalibrate, save_recalibrated
from tests.conftest import started
from tests.training.conftest import SMALL
from tests.training.folders import BALANCED_LESIONS, draw_ham10000
from training import export as exporting
from training import quantize as quantizing
from training.card import model_card, save_figures
from training.cli import cli
from training.cli import main as run_command_line
from training.config import Config
from training.data.manifest import DataError, fingerprint, load_manifest, save_manifest
from training.data.vocabulary import Split
from training.export import bundle_name, export, load_fitted
from training.fit import fit
from training.predictions import predict
from training.prepare import prepare, prepare_manifest
from training.quantize import TRUNK_WEIGHT
from training.release import evaluate_model, held_out
from training.robustness import flagged_shares
from training.run import Run, rows, to_calibrate_on
from training.zoo import load_zoo

pytestmark = pytest.mark.usefixtures("small_backbone")


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
    assert "Caution" not in capsys.readouterr().out
    leaking = [replace(r, image=f"{r.image}-2", split=Split.TEST, component="") for r in records]
    taught = next(row for row, record in enumerate(records) if record.split is Split.TRAIN)
    save_manifest(tmp_path / "leaking.csv", [*records, leaking[taught]])
    told[2] = str(tmp_path / "leaking.csv")
    cli([*told[:-1], str(tmp_path / "leaking"), "--epochs", "3"], standalone_mode=False)
    assert "Caution: 1 images of test are of a lesion" in capsys.readouterr().out
    told[2] = str(manifest)
    gone = Path(records[0].path)
    gone.rename(gone.with_suffix(".away"))
    with pytest.raises(DataError, match=gone.name):
        cli([*told, "--epochs", "3"], standalone_mode=False)
    assert Run(run).load_data()[0] == records  # what was prepared before is as it was
    gone.with_suffix(".away").rename(gone)
    recipe.write_text('validate_on = "elsewhere"\n')
    with pytest.raises(DataError, match=r"no images of elsewhere \(validate_on\)"):
        cli(told, standalone_mode=False)
    recipe.write_text('backbone = "vit_b_32"\nvalidate_on = ""\n')
    with pytest.raises(DataError, match=r"takes no images of 160 px .* Set size = 224, and leave"):
        cli(told, standalone_mode=False)
    recipe.write_text('test_on = ["isic2017"]\n')
    with pytest.raises(DataError, match=r"test_on is for a folder .* the split test"):
        cli(told, standalone_mode=False)
    with pytest.raises(DataError, match="--train-on is for a folder"):
        cli([*told, "--train-on", "HAM10000"], standalone_mode=False)
    with pytest.raises(DataError, match="Give either a folder of datasets, or --manifest"):
        cli(["prepare"], standalone_mode=False)


def test_a_fitted_run_is_not_prepared_of_other_data(fitted: Run, tmp_path: Path) -> None:
    # What it has learned from would not be known any more, to who goes on from it.
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    records = load_manifest(run.manifest)
    prepare_manifest(records, run, run.load_config())
    test = rows(records, Split.TRAIN)[0]
    moved = [*records[:test], replace(records[test], split=Split.TEST), *records[test + 1 :]]
    with pytest.raises(DataError, match="was fitted to other data"):
        prepare_manifest(moved, run, run.load_config())
    assert load_manifest(run.manifest) == records


def test_there_is_something_to_learn_from(fitted: Run, tmp_path: Path) -> None:
    records = load_manifest(fitted.manifest)
    for melanoma in (False, None):
        plain = [replace(r, melanoma=melanoma) if r.split is Split.TRAIN else r for r in records]
        with pytest.raises(DataError, match="must have training images with and without melanoma"):
            prepare_manifest(plain, Run(tmp_path / "run"), fitted.load_config())


def test_a_diagnosis_known_of_melanomas_alone_says_nothing(fitted: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    config = fitted.load_config().model_copy(update={"epochs": 1})
    # As folders `melanoma` and `benign` have it: every image would be called a melanoma.
    records = [
        record if record.melanoma else replace(record, diagnosis=None)
        for record in load_manifest(fitted.manifest)
    ]
    prepare_manifest(records, run, config)
    fit(run, workers=0)
    head = load_fitted(run, load_manifest(run.manifest)).heads["diagnosis"]
    assert not any(values.any() for values in head.parameters())


def test_a_test_split_that_was_learned_from_is_told_of(fitted_bundle: Path, fitted: Run) -> None:
    records = load_manifest(fitted.manifest)
    known = next(r for r in records if r.split is Split.TRAIN)
    found = predict(load_bundle(fitted_bundle), held_out(records, Split.TEST))
    for more, told in (([], False), ([replace(known, image="copy", split=Split.TEST)], True)):
        bundle = load_bundle(fitted_bundle)
        own = [*records, *more]
        data = bundle.manifest.training_data.model_copy(update={"fingerprint": fingerprint(own)})
        manifest = bundle.manifest.model_copy(update={"training_data": data})
        report = evaluate_model(found, own, Split.TEST, bundle=replace(bundle, manifest=manifest))
        assert any("1 are of a lesion, a patient" in each for each in report["cautions"]) is told


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path, data: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(DataError, match="is not a run folder"):
        fit(run)
    with pytest.raises(DataError, match="holds no dataset in a layout"):
        prepare(tmp_path, run, SMALL)
    with pytest.raises(DataError, match=r"train_on must name HAM10000.*prepare --manifest"):
        prepare(data, run, SMALL.model_copy(update={"train_on": ("isic2017",)}))
    for update, sentence in (
        ({"validate_on": "elsewhere"}, r"no images of elsewhere \(validate_on\)"),
        ({"folds": 1000}, r"cannot be parted in 1000"),
        ({"folds": 180}, r"folds = 180 is too many: each network must have .* without melanoma"),
        ({"weights_dir": "nowhere"}, r"weights_dir: nowhere is not a folder"),
        ({"weights_dir": str(tmp_path)}, r"weights_dir: .*lite0\.pth does not exist"),
    ):
        with pytest.raises(DataError, match=sentence):
            prepare(data, run, SMALL.model_copy(update=update))
        assert not run.config.exists()  # and another recipe may have the folder
    with pytest.raises(DataError, match=r"start_from: nowhere has no fitted network"):
        prepare(data, run, SMALL.model_copy(update={"start_from": "nowhere"}))
    prepare(data, run, SMALL)
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
    with pytest.raises(
        DataError, match=r"holds no images of HAM10000; found are .*image_id and dx"
    ):
        prepare(tmp_path / "data", run, SMALL.model_copy(update={"train_on": ("HAM10000",)}))
    table.write_text(whole)
    shutil.rmtree(ham / "HAM10000_images")
    with pytest.raises(DataError, match=r"with 40 rows, but none of their image files"):
        prepare(tmp_path / "data", run, SMALL.model_copy(update={"train_on": ("HAM10000",)}))


def test_every_backbone_gives_a_bundle_its_name() -> None:
    assert bundle_name("tf_efficientnet_lite2") == "mmtl-lite2"
    assert bundle_name("regnet_x_16gf") == "mmtl-regnet-x-16gf"
    for entry in load_zoo():
        assert re.fullmatch(NAME, bundle_name(entry.name))


def test_a_bundle_is_evaluated_with_its_own_run_only(
    fitted_bundle: Path, fitted: Run, data: Path, tmp_path: Path
) -> None:
    other = Run(tmp_path / "other")
    shutil.copytree(fitted.folder, other.folder)
    records, _ = other.load_data()
    bundle = load_bundle(fitted_bundle)
    found = predict(bundle, held_out(records, Split.TEST))
    # Rows that `prepare` leaves out make no other manifest of it.
    more = [*records, replace(records[0], image="a", path=""), replace(records[0], split=None)]
    report = evaluate_model(found, more, Split.TEST, bundle=bundle)
    assert not any("not the one" in caution for caution in report["cautions"])
    learned = rows(records, Split.TRAIN)[0]
    records[learned] = replace(records[learned], split=Split.EXCLUDED)
    save_manifest(other.manifest, records)
    report = evaluate_model(found, records, Split.TEST, bundle=bundle)
    assert "not the one that the bundle was fitted with" in report["cautions"][0]
    with pytest.raises(DataError, match="fitted on other data"):
        save_figures(bundle, report)
    with pytest.raises(DataError, match="fitted on other data"):
        export(other, tmp_path / "bundle")


def test_prevalence_and_thresholds_are_of_the_images_that_it_is_calibrated_on(
    fitted: Run, fitted_bundle: Path
) -> None:
    records, _ = fitted.load_data()
    seen = [records[row] for row in to_calibrate_on(records, fitted.load_config())]
    bundle = load_bundle(fitted_bundle)
    found = predict(bundle, seen)
    share = np.mean([bool(record.melanoma) for record in seen])
    assert bundle.manifest.prevalence == pytest.approx(share)
    assert found.probability.mean() == pytest.approx(share, abs=0.01)
    assert found.ood_score is not None
    passed = found.ood_score <= bundle.artifact("onnx").ood_threshold
    assert passed.mean() == pytest.approx(0.99, abs=1 / len(seen))


def test_every_artifact_is_written_and_verified(fitted_bundle: Path) -> None:
    bundle = load_bundle(fitted_bundle)
    formats = [artifact.format for artifact in bundle.manifest.artifacts]
    assert formats == ["onnx", "torch_export", "torchscript"]
    assert sorted(path.name for path in fitted_bundle.iterdir()) == [
        "MODEL_CARD.md",
        "bundle.json",
        "metrics.json",
        "model.onnx",
        "model.pt2",
        "model.torchscript.pt",
    ]
    # Of the machine that exported it, the ONNX file says nothing.
    sources = str(Path(exporting.__file__).parent).encode()
    assert sources not in (fitted_bundle / "model.onnx").read_bytes()


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
    tmp_path_factory: pytest.TempPathFactory, fitted_bundle: Path, fitted: Run
) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "quantized"
    shutil.copytree(fitted_bundle, folder)
    arguments = ["--run", str(fitted.folder), "--bundle", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        # Of so few images, one is more than the share that is allowed.
        patch.setattr(quantizing, "MOST_FLIPS", 0.05)
        cli(["quantize", *arguments], standalone_mode=False)
    return folder


def test_a_network_in_integers_decides_alike_and_is_what_a_cpu_serves(
    quantized_folder: Path, fitted_bundle: Path, fitted: Run
) -> None:
    bundle = load_bundle(quantized_folder)
    assert [(a.format, a.precision) for a in bundle.manifest.artifacts] == [
        ("onnx", "fp32"),
        ("torch_export", "fp32"),
        ("torchscript", "fp32"),
        ("onnx", "int8"),
    ]
    assert bundle.artifact_for_cpu().precision == "int8"
    before = {path.name: path.read_bytes() for path in fitted_bundle.iterdir()}
    assert all(
        (quantized_folder / name).read_bytes() == data
        for name, data in before.items()
        if name not in ("bundle.json", "metrics.json", "MODEL_CARD.md")
    )
    # What was published is of what a CPU answered with before.
    assert bundle.manifest.metrics == ()
    assert load_bundle(fitted_bundle).manifest.metrics
    assert not (quantized_folder / "metrics.json").exists()
    graph = onnx.load(bundle.path(bundle.artifact_for_cpu())).graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    trunk = next(node for node in graph.node if TRUNK_WEIGHT in node.input)
    assert trunk.op_type == "Conv"  # in floats, as everything behind it
    records, _ = fitted.load_data()
    # Its threshold is not where the floats' came from, and what it gave is its own.
    seen = [r for r in held_out(records, Split.VALIDATION) if r.dataset == "HAM10000"]
    melanoma = np.array([bool(record.melanoma) for record in seen])
    called = predict(bundle, seen).probability >= bundle.artifact_for_cpu().melanoma_threshold
    point = bundle.manifest.point(bundle.artifact_for_cpu())
    assert (
        point.criterion == "fewest decisions other than model.onnx's (sensitivity of at least 90 %)"
    )
    assert (point.images, point.melanomas) == (len(seen), melanoma.sum())
    assert point.sensitivity == pytest.approx(called[melanoma].mean(), abs=1e-9)
    assert point.specificity == pytest.approx((~called[~melanoma]).mean(), abs=1e-9)
    assert bundle.manifest.point(bundle.artifact("onnx", "fp32")) == bundle.manifest.operating_point
    served = bundle.artifact_for_cpu()
    report = json.loads((fitted_bundle / "metrics.json").read_text())
    of_served = {"artifact_sha256": served.sha256, "threshold": served.melanoma_threshold}
    assert f"of {served.file} is" in model_card(bundle, report | of_served)
    assert point.criterion in model_card(bundle, report | of_served)
    assert point.criterion not in model_card(bundle, report)
    tested = held_out(records, Split.TEST)
    integers, floats = predict(bundle, tested), predict(bundle, tested, "fp32")
    assert np.abs(integers.probability - floats.probability).max() > 0
    flips = (integers.probability >= integers.threshold) != (floats.probability >= floats.threshold)
    assert flips.mean() < 0.05
    with started(Settings(bundle=quantized_folder, device="cpu", max_batch=2)) as client:
        for record, expected in list(zip(tested, integers.probability, strict=True))[:5]:
            assert _probability(client, Path(record.path)) == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_quantized_is_one_sentence(
    fitted_bundle: Path, fitted: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(fitted.folder, run.folder)
    records, mapped = run.load_data()
    pixels = np.array(mapped)
    np.save(run.cache, pixels[:, ::2, ::2])
    with pytest.raises(DataError, match=r"looks at 64 x 64 pixels; the images of .* have 32 x 32"):
        quantizing.quantize(run, fitted_bundle)
    save_manifest(run.manifest, [replace(record, melanoma=None) for record in records])
    np.save(run.cache, pixels)
    with pytest.raises(DataError, match="validation images with and without melanoma"):
        quantizing.quantize(run, fitted_bundle)


def test_integers_that_decide_otherwise_are_not_written(
    fitted_bundle: Path, fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(fitted_bundle, folder)
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
    fitted_bundle: Path, fitted: Run, artifact: str
) -> None:
    with (fitted.folder / "report" / "predictions.csv").open() as file:
        predicted = {
            row["image"]: float(row["melanoma_probability"])
            for row in csv.DictReader(file)
            if row["dataset"] == "HAM10000"
        }
    records, _ = fitted.load_data()
    settings = Settings(bundle=fitted_bundle, artifact=artifact, trust_torch=True, max_batch=2)
    with started(settings) as client:
        for row in rows(records, Split.TEST, "HAM10000")[:5]:
            probability = _probability(client, Path(records[row].path))
            assert probability == pytest.approx(predicted[records[row].image], abs=1e-3)


def test_the_figures_the_card_and_the_page_say_what_was_measured(
    fitted_bundle: Path, fitted: Run
) -> None:
    metrics = json.loads((fitted_bundle / "metrics.json").read_text())
    card = (fitted_bundle / "MODEL_CARD.md").read_text()
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
    # The balanced set is drawn of HAM10000's own pictures.
    assert metrics["not learned from"] == {}
    assert "Sources that it never learned from" not in card


def test_a_table_of_predictions_is_evaluated_and_compared(
    fitted_bundle: Path, fitted: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "theirs.csv"
    lines = (fitted.folder / "report" / "predictions.csv").read_text().splitlines()
    table.write_text("\n".join(lines[:-3]))
    arguments = ["--run", str(fitted.folder), "--out", str(tmp_path / "report")]
    theirs = ["--predictions", str(table), "--threshold", "0.3", "--against", str(fitted_bundle)]
    cli(["evaluate", *arguments, *theirs], standalone_mode=False)
    assert "AUROC less" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any("images of this split have a prediction" in line for line in report["cautions"])
    assert report["sets"]["HAM10000"]["compared"]["differences"]["AUROC"]["value"] == 0
    of_bundle = ["evaluate", *arguments, "--bundle", str(fitted_bundle)]
    for wrong, sentence in (
        ([*of_bundle, "--threshold", "0.9"], "--threshold is of a table of predictions"),
        (
            [*of_bundle, "--against", str(fitted_bundle), "--against-threshold", "0.9"],
            "--against-threshold is of a table",
        ),
        (["evaluate", *arguments, "--predictions", str(fitted_bundle)], "--predictions is a table"),
        ([*of_bundle, "--predictions", str(table)], "Name --bundle or --predictions"),
        ([*of_bundle, str(tmp_path / "report")], "holds no dataset in a layout"),
    ):
        with pytest.raises(DataError, match=sentence):
            cli(wrong, standalone_mode=False)
    with pytest.raises(DataError, match="a table of predictions is none"):
        cli(["evaluate", *arguments, *theirs, "--publish"], standalone_mode=False)
    bundle = ["--bundle", str(fitted_bundle), "--split", "train"]
    cli(["evaluate", *arguments, *bundle], standalone_mode=False)
    assert "fitted to: the figures are better" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(DataError, match="Only figures of the test split"):
        cli(["evaluate", *arguments, *bundle, "--publish"], standalone_mode=False)


def test_what_was_fitted_to_outcomes_is_told_and_not_published(
    fitted: Run, fitted_bundle: Path, tmp_path: Path
) -> None:
    """They may be those of the very images that it is evaluated on."""
    shipped, clinic = load_bundle(fitted_bundle), tmp_path / "clinic"
    logits = np.linspace(-3, 3, 60)
    melanoma = logits + np.random.default_rng(0).normal(0, 2, 60) > 0
    manifest = recalibrate(shipped.manifest, logits, melanoma, f"predictions.csv {OUTCOMES}")
    save_recalibrated(shipped, clinic, manifest, "fitted to 60 outcomes")
    told = ["evaluate", "--run", str(fitted.folder), "--bundle", str(clinic)]
    told += ["-o", str(tmp_path / "report")]
    cli(told, standalone_mode=False)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any("were fitted to outcomes" in line for line in report["cautions"])
    with pytest.raises(DataError, match="was recalibrated on outcomes"):
        cli([*told, "--publish"], standalone_mode=False)
    # Nor does it go unsaid where it is the other one.
    told[told.index(str(clinic))] = str(fitted_bundle)
    cli([*told, "--against", str(clinic)], standalone_mode=False)
    cautions = json.loads((tmp_path / "report" / "report.json").read_text())["cautions"]
    assert any("'s calibration and threshold were fitted to outcomes" in each for each in cautions)


def test_only_what_was_held_out_is_called_so(fitted: Run, fitted_bundle: Path) -> None:
    records, bundle = load_manifest(fitted.manifest), load_bundle(fitted_bundle)
    for split, own, kind in (
        (Split.TEST, True, "held out"),
        (Split.TEST, False, "test"),
        (Split.VALIDATION, True, "validation"),
    ):
        found = predict(bundle, [r for r in records if r.split is split][:20])
        flagged = flagged_shares(bundle, found, split, own, [], [], None)["flagged"]
        assert {name.split(":")[0] for name in flagged} == {kind}


def test_a_name_that_another_dataset_has_too_is_no_picture_of_it(
    fitted: Run, fitted_bundle: Path
) -> None:
    records, bundle = load_manifest(fitted.manifest), load_bundle(fitted_bundle)
    held_out = [r for r in records if r.split is Split.TEST]
    found = predict(bundle, held_out[:20])
    learned = [replace(held_out[0], image="photo-1"), held_out[1]]
    known = [
        replace(held_out[30], image="photo-1", dataset="clinic"),
        replace(held_out[31], image="photo-2", dataset="clinic"),
        replace(held_out[1], dataset="clinic"),  # an ISIC id is the same picture anywhere
    ]
    for own, kind in (
        (True, "dermoscopy not learned from"),
        (False, "dermoscopy of another dataset"),
    ):
        flagged = flagged_shares(bundle, found, Split.TEST, own, learned, known, None)["flagged"]
        assert flagged[f"{kind}: clinic"]["images"] == 2


def test_what_was_predicted_elsewhere_needs_no_files(
    fitted: Run, fitted_bundle: Path, tmp_path: Path
) -> None:
    records = load_manifest(fitted.manifest)
    save_manifest(tmp_path / "table.csv", [replace(record, path="") for record in records])
    with pytest.raises(
        DataError, match=r"None of the manifest's \d+ images of test has a file here"
    ):
        cli(
            ["evaluate", "--manifest", str(tmp_path / "table.csv"), "--bundle", str(fitted_bundle)],
            standalone_mode=False,
        )
    told = ["--manifest", str(tmp_path / "table.csv"), "-o", str(tmp_path / "report")]
    told += ["--predictions", str(fitted.folder / "report" / "predictions.csv")]
    cli(["evaluate", *told], standalone_mode=False)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    ours = json.loads((fitted_bundle / "metrics.json").read_text())
    assert report["sets"].keys() == ours["sets"].keys()
    for name, figures in report["sets"].items():
        assert figures["images"] == ours["sets"][name]["images"]
    assert not any("have a prediction" in each for each in report["cautions"])


def test_too_few_lesions_are_told_before_any_image_is_predicted(
    fitted: Run, tmp_path: Path
) -> None:
    tested = held_out(load_manifest(fitted.manifest), Split.TEST)
    save_manifest(tmp_path / "few.csv", tested[:15])
    arguments = ["--manifest", str(tmp_path / "few.csv"), "--bundle", str(tmp_path / "none")]
    with pytest.raises(DataError, match="nothing can be said"):
        cli(["evaluate", *arguments], standalone_mode=False)


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


def test_an_error_of_the_system_is_one_sentence_whatever_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut() -> None:
        raise OSError("broken data stream")

    monkeypatch.setattr("training.cli.cli", cut)
    with pytest.raises(SystemExit):
        run_command_line()
    assert capsys.readouterr().err == "mmtl-train: a file: broken data stream.\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["of-python", "of-a-gpu", "of-torch"],
)
def test_that_there_is_no_memory_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("training.cli.cli", fail)
    with pytest.raises(SystemExit):
        run_command_line()
    assert capsys.readouterr().err.startswith("mmtl-train: There is not enough memory")


def test_what_is_a_fault_of_ours_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("training.cli.cli", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_command_line()


def _probability(client: TestClient, path: Path) -> float:
    answer = client.post("/predict", files={"files": path.read_bytes()}).json()
    return answer["results"][0]["prediction"]["melanoma"]["probability"]
