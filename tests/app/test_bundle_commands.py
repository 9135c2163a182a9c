import json
import os
import shutil
from pathlib import Path

import pytest

from models.bundle import OperatingPoint, load_bundle
from tests.bundles import make_bundle

pytestmark = pytest.mark.usefixtures("logs_as_before")


def test_a_bundle_is_verified_and_shown(run, bundle_folder: Path) -> None:
    assert run("bundle", "verify", bundle_folder)[:2] == (0, "ok       model.onnx\n")
    shown = run("bundle", "inspect", bundle_folder)[1]
    assert "test 1.2.3" in shown
    assert "its threshold from" not in shown
    assert json.loads(run("bundle", "inspect", "--json", bundle_folder)[1])["name"] == "test"


def test_an_artifact_with_an_operating_point_of_its_own_is_shown_with_it(
    run, tmp_path: Path
) -> None:
    artifact = make_bundle(tmp_path / "one").manifest.artifacts[0]
    point = OperatingPoint(
        criterion="fewest flips",
        dataset="theirs",
        images=9,
        melanomas=3,
        sensitivity=2 / 3,
        specificity=0.5,
    )
    own = artifact.model_copy(update={"operating_point": point})
    make_bundle(tmp_path / "two", artifacts=(own,))
    shown = " ".join(run("bundle", "inspect", tmp_path / "two")[1].split())
    assert "its threshold from │ fewest flips on theirs (9 images, 3 melanomas): " in shown
    assert "sensitivity 0.667, specificity 0.500" in shown


def test_what_looks_like_markup_is_shown_as_it_is(run, bundle_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd[/v2]"
    shutil.copytree(bundle_folder, odd)
    manifest = odd / "bundle.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"description": "ours [/v2] :smile:"}))
    status, output, _ = run("bundle", "inspect", odd)
    assert (status, "ours [/v2] :smile:" in output) == (0, True)
    status, output, _ = run("bundle", "diff", odd, bundle_folder)
    title = "".join(line.strip() for line in output.splitlines())  # folded to the table's width
    assert (status, "odd[/v2]" in title) == (1, True)


def test_a_bundle_is_recalibrated_into_another_one_and_compared(
    run, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = [f"{(number % 40) / 10},{int(number % 40 > 25 + number % 7)}" for number in range(400)]
    table = tmp_path / "outcomes.csv"
    table.write_text("melanoma_logit,melanoma\n" + "\n".join(rows))
    new = tmp_path / "new"
    status, output, _ = run("bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", new)
    assert status == 0
    assert f"{new}: test 1.2.4, fitted to 400 outcomes" in output
    assert "Of model.onnx:" in output
    status, output, _ = run("bundle", "diff", bundle_folder, new)
    assert status == 1
    assert "artifacts[model.onnx].calibration.slope" in output
    assert run("bundle", "diff", new, new)[:2] == (0, "The bundles are the same.\n")
    assert run("bundle", "verify", new)[0] == 0
    fitted = ("bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", tmp_path / "x")
    status, _, error = run(*fitted, "--sensitivity", "nan")
    assert (status, "--sensitivity is a share from 0.5 to 1" in error) == (2, True)
    link = tmp_path / "link"
    link.symlink_to(new)
    arguments = ("bundle", "recalibrate", bundle_folder, "--prevalence", "0.02", "-o")
    status, _, error = run(*arguments, link)
    assert (status, "holds a bundle already: choose another folder" in error) == (2, True)
    assert run(*arguments, link, "--version", "8.0.0", "--replace")[0] == 0
    assert link.is_symlink()
    assert "test 8.0.0" in run("bundle", "inspect", new)[1]
    (new / "bundle.json.sig").write_text("of a signature")
    status, output, _ = run(*arguments, new, "--replace")
    assert (status, "It is not signed, as the one before was" in output) == (0, True)
    assert "test 8.0.1" in run("bundle", "inspect", new)[1]  # not the version of the one before
    other = tmp_path / "other"
    for wrong, sentence in (
        ((bundle_folder,), "--out is the bundle itself"),
        ((bundle_folder.parent, "--replace"), "--out is the bundle itself, or holds it"),
        ((other, "--version", "x"), "--version is of the form 1.2.3"),
        ((other, "--version", "١.٢.٣"), "--version is of the form 1.2.3"),
        ((other, "--sensitivity", "0.99"), "--sensitivity takes --outcomes"),
        ((other, "--prevalence", "2"), "--prevalence is a share between 0 and 1"),
        ((other, "--outcomes", table), "Give either --outcomes or --prevalence"),
    ):
        status, _, error = run(*arguments, *wrong)
        assert (status, sentence in error) == (2, True)


def test_outcomes_may_have_a_name_that_is_no_text(run, bundle_folder: Path, tmp_path: Path) -> None:
    table = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv"))
    rows = "".join(f"{n},{n % 3 // 2}\n" for n in range(60))
    table.write_text("melanoma_logit,melanoma\n" + rows)
    out = tmp_path / "new"
    assert run("bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", out)[0] == 0
    assert load_bundle(out).manifest.operating_point.dataset == "\ufffd.csv (recalibration)"


def test_bundles_that_differ_in_the_order_of_artifacts_differ(run, tmp_path: Path) -> None:
    (first,) = make_bundle(tmp_path / "one").manifest.artifacts
    second = first.model_copy(update={"file": "other.onnx", "precision": "int8"})
    for folder, artifacts in (("one", (first, second)), ("two", (second, first))):
        make_bundle(tmp_path / folder, artifacts=artifacts)
    status, output, _ = run("bundle", "diff", tmp_path / "one", tmp_path / "two")
    assert status == 1
    assert "other.onnx" in output


def test_probabilities_are_taken_of_the_artifact_that_is_named(
    run, bundle_folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "outcomes.csv"
    table.write_text("melanoma_probability,melanoma\n" + "0.9,1\n0.2,0\n0.4,1\n0.5,0\n" * 20)
    told = "bundle", "recalibrate", bundle_folder, "--outcomes", table, "-o", tmp_path / "new"
    status, _, error = run(*told, "--artifact", "model.int8.onnx")
    assert (status, "--artifact model.int8.onnx is none of model.onnx." in error) == (2, True)
    status, output, _ = run(*told, "--artifact", "model.onnx")
    assert (status, "fitted to 80 outcomes" in output) == (0, True)
