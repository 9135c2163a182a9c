"""A clinic's outcomes, or its prevalence, give a new bundle; the old one stays."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.bundle import Calibration, Metric, load_bundle, melanoma_probability
from models.calibration import CalibrationError
from models.recalibration import (
    change_prevalence,
    differences,
    read_outcomes,
    recalibrate,
    save_recalibrated,
)


def outcomes(count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    logits = generator.normal(-1, 2, count)
    return logits, generator.random(count) < 1 / (1 + np.exp(-(0.7 * logits - 0.5)))


def test_outcomes_give_calibration_threshold_and_prevalence(bundle_folder: Path) -> None:
    manifest = load_bundle(bundle_folder).manifest
    figures = [
        Metric(name=f"melanoma {name}", dataset="test", value=0.5, low=0.4, high=0.6, images=9)
        for name in ("AUROC", "sensitivity")
    ]
    own = manifest.artifacts[0].model_copy(update={"operating_point": manifest.operating_point})
    manifest = manifest.model_copy(update={"metrics": tuple(figures), "artifacts": (own,)})
    logits, melanoma = outcomes()
    found = recalibrate(manifest, logits, melanoma, "a clinic", sensitivity=0.95)
    assert found.prevalence == pytest.approx(melanoma.mean())
    assert found.operating_point.dataset == "a clinic"
    assert found.operating_point.criterion == "sensitivity of at least 95 %"
    for artifact in found.artifacts:
        assert found.point(artifact) == found.operating_point
        assert artifact.calibration.slope == pytest.approx(0.7, abs=0.1)
        probability = melanoma_probability(logits, artifact.calibration)
        assert probability.mean() == pytest.approx(melanoma.mean())
        called = probability >= artifact.melanoma_threshold
        assert found.operating_point.sensitivity == called[melanoma].mean() >= 0.95
        assert found.operating_point.specificity == (~called[~melanoma]).mean()
    assert [a.sha256 for a in found.artifacts] == [a.sha256 for a in manifest.artifacts]
    assert [metric.name for metric in found.metrics] == ["melanoma AUROC"]


def test_another_prevalence_changes_no_decision(bundle_folder: Path) -> None:
    manifest = load_bundle(bundle_folder).manifest
    found = change_prevalence(manifest, 0.01)
    logits = np.linspace(-8, 8, 1001)
    before, after = (
        melanoma_probability(logits, m.artifacts[0].calibration)
        >= m.artifacts[0].melanoma_threshold
        for m in (manifest, found)
    )
    np.testing.assert_array_equal(before, after)
    assert found.prevalence == 0.01
    assert found.artifacts[0].calibration.intercept < manifest.artifacts[0].calibration.intercept


def test_artifacts_with_their_own_calibration_keep_it(bundle_folder: Path) -> None:
    manifest = load_bundle(bundle_folder).manifest
    own = Calibration(slope=2, intercept=1)
    point = manifest.operating_point.model_copy(update={"sensitivity": 0.7})
    other = manifest.artifacts[0].model_copy(
        update={
            "file": "other.onnx",
            "calibration": own,
            "melanoma_threshold": 0.2,
            "operating_point": point,
        }
    )
    both = manifest.model_copy(update={"artifacts": (*manifest.artifacts, other)})
    found = change_prevalence(both, 0.01).artifacts
    shifts = [
        after.calibration.intercept - before.calibration.intercept
        for before, after in zip(both.artifacts, found, strict=True)
    ]
    assert found[-1].calibration.slope == 2
    assert shifts == pytest.approx([shifts[0]] * len(shifts))
    # Which images are called melanoma stays the same, and so does what that gave.
    assert found[-1].operating_point == point


def test_the_new_bundle_says_so_and_the_old_one_stays(bundle_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle_folder, tmp_path / "old")
    (tmp_path / "old" / "MODEL_CARD.md").write_text("# The card\n")
    (tmp_path / "old" / "metrics.json").write_text("{}")  # of the thresholds before
    bundle = load_bundle(tmp_path / "old")
    changed = change_prevalence(bundle.manifest, 0.2)
    saved = save_recalibrated(bundle, tmp_path / "new", changed, "to 20 %")
    card = (saved.folder / "MODEL_CARD.md").read_text()
    assert card.startswith("> Recalibrated: to 20 %.")
    assert card.endswith("\n\n# The card\n")
    assert not (saved.folder / "metrics.json").exists()
    assert load_bundle(tmp_path / "new").manifest == changed
    assert load_bundle(tmp_path / "old").manifest == bundle.manifest
    found = {name: (a, b) for name, a, b in differences(bundle.manifest, changed)}
    assert found["prevalence"] == (str(bundle.manifest.prevalence), "0.2")
    assert any(name.endswith(".calibration.intercept") for name in found)
    assert not any("sha256" in name for name in found)


def test_what_a_card_leads_to_is_not_handed_on(bundle_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle_folder, tmp_path / "theirs")
    (tmp_path / "secret").write_text("of who recalibrates it")
    (tmp_path / "theirs" / "MODEL_CARD.md").unlink(missing_ok=True)
    (tmp_path / "theirs" / "MODEL_CARD.md").symlink_to(tmp_path / "secret")
    bundle = load_bundle(tmp_path / "theirs")
    changed = change_prevalence(bundle.manifest, 0.2)
    saved = save_recalibrated(bundle, tmp_path / "ours", changed, "to 20 %")
    card = (saved.folder / "MODEL_CARD.md").read_text()
    assert card.startswith("> Recalibrated: to 20 %.")
    assert "of who recalibrates it" not in card


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("logit,melanoma\n1,1\n", "melanoma_probability is missing. .* has logit, melanoma"),
        ("melanoma_logit;melanoma\n1;1\n", "it has melanoma_logit;melanoma"),
        ("melanoma_logit,melanoma\n1,maybe\n", "line 2, column melanoma: 'maybe' is not 1 or 0"),
        (
            "melanoma_logit,melanoma\n1,1\n\nhigh,0\n",
            "line 4, column melanoma_logit: 'high' is not",
        ),
        ("melanoma_logit,melanoma\nnan,0\n", "'nan' is not a number"),
        ("melanoma_logit,melanoma\n0.9,1\n0.1,0\n", "holds probabilities; call it melanoma_prob"),
        ("melanoma_probability,melanoma\n1.2,0\n", "column melanoma_probability: '1.2' is not in"),
        (b"\xff\xfe\x00", "is not a CSV file"),
    ],
)
def test_a_table_that_does_not_fit_is_named(
    tmp_path: Path, bundle_folder: Path, text, sentence: str
) -> None:
    artifact = load_bundle(bundle_folder).artifact("onnx")
    path = tmp_path / "outcomes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CalibrationError, match=sentence):
        read_outcomes(path, artifact)
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        read_outcomes(tmp_path / "missing.csv", artifact)


def test_rows_without_an_outcome_are_left_out_and_few_are_refused(
    tmp_path: Path, bundle_folder: Path
) -> None:
    path = tmp_path / "outcomes.csv"
    artifact = load_bundle(bundle_folder).artifact("onnx")
    path.write_text("melanoma_logit,melanoma\n1.5,1.0\n-1,\n0.5,no\n")
    logits, melanoma = read_outcomes(path, artifact)
    assert (logits.tolist(), melanoma.tolist()) == ([1.5, 0.5], [True, False])
    with pytest.raises(CalibrationError, match="1 images with melanoma are too few"):
        recalibrate(load_bundle(bundle_folder).manifest, logits, melanoma, "few")


def test_the_service_s_answers_are_turned_back_into_logits(
    tmp_path: Path, bundle_folder: Path
) -> None:
    artifact = load_bundle(bundle_folder).artifact("onnx")
    artifact = artifact.model_copy(update={"calibration": Calibration(slope=0.7, intercept=-0.8)})
    given = np.array([-9.0, -0.5, 2.0])
    answered = melanoma_probability(given, artifact.calibration).round(6)
    path = tmp_path / "outcomes.csv"
    rows = "".join(f"{value},{number % 2}\n" for number, value in enumerate(answered))
    path.write_text(f"melanoma_probability,melanoma\n{rows}0,1\n1,0\n")
    logits, _ = read_outcomes(path, artifact)
    assert logits[:3] == pytest.approx(given, abs=0.01)
    assert np.isfinite(logits).all()
