import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.bundle import (
    BundleError,
    Calibration,
    Task,
    check_golden,
    golden_batch,
    golden_image,
    load_bundle,
    melanoma_probability,
    one_melanoma_probability,
    save_bundle,
)
from tests.bundles import expected_outputs, make_bundle


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    loaded = load_bundle(made.folder)
    assert loaded == made
    assert loaded.path(loaded.artifact("onnx")).name == "model.onnx"


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    length = len((made.folder / "model.onnx").read_bytes())
    (made.folder / "model.onnx").write_bytes(bytes(length))
    with pytest.raises(BundleError, match=r"SHA-256 .*fetch or export it again"):
        load_bundle(made.folder)
    (made.folder / "model.onnx").write_bytes(bytes(length + 1))
    with pytest.raises(BundleError, match=r"bytes, expected .*fetch or export it again"):
        load_bundle(made.folder)


def test_an_artifact_that_is_changed_after_it_was_verified_is_not_read(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (artifact,) = bundle.manifest.artifacts
    assert hashlib.sha256(bundle.read(artifact)).hexdigest() == artifact.sha256
    bundle.path(artifact).write_bytes(bytes(artifact.bytes))
    with pytest.raises(BundleError, match=r"is not the file that the manifest describes \(SHA-256"):
        bundle.read(artifact)
    with bundle.path(artifact).open("a") as file:
        file.truncate(2**40)  # which takes no place on the disk, and would not fit in memory
    with pytest.raises(BundleError, match=r"manifest describes \(1,099,511,627,776 bytes"):
        bundle.read(artifact)


def test_what_fits_another_manifest_is_neither_a_manifest_nor_a_stranger_s_file(
    tmp_path: Path,
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    elsewhere = tmp_path / "elsewhere.onnx"
    bundle.path(bundle.artifact("onnx")).rename(elsewhere)
    (bundle.folder / "model.onnx").symlink_to(elsewhere)
    (bundle.folder / "link.md").symlink_to(elsewhere)
    for name in ("bundle.json.sig", "model_card.md", "note.md"):
        (bundle.folder / name).write_text(name)
    (bundle.folder / "folder").mkdir()
    assert set(bundle.files()) == {"model.onnx", "model_card.md", "note.md"}
    assert set(bundle.files("note.md")) == {"model.onnx", "model_card.md"}


def test_what_is_not_used_is_not_written_so_that_an_earlier_version_reads_the_rest(
    tmp_path: Path,
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert bundle.manifest.artifacts[0].operating_point is None
    text = (bundle.folder / "bundle.json").read_text()
    assert "null" not in text
    assert "operating_point" not in json.loads(text)["artifacts"][0]


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path)


def test_a_bundle_without_any_artifact_is_refused(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    (made.folder / "model.onnx").unlink()
    with pytest.raises(BundleError, match="none of the artifacts"):
        load_bundle(made.folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 99}, "format_version"),
        ({"version": "١.٢.٣"}, "version: .*digits 0 to 9"),
        ({"surprise": 1}, "surprise"),
        ({"prevalence": 1.5}, "prevalence"),
        ({"tasks": []}, "tasks"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_in_one_sentence(
    tmp_path: Path, change: dict, sentence: str
) -> None:
    made = make_bundle(tmp_path / "bundle")
    path = made.folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match=sentence) as caught:
        load_bundle(made.folder)
    assert "\n" not in str(caught.value)


def test_an_artifact_may_not_lie_outside_the_bundle(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    path = made.folder / "bundle.json"
    path.write_text(path.read_text().replace("model.onnx", "../model.onnx"))
    with pytest.raises(BundleError, match="file"):
        load_bundle(made.folder)


def test_the_shapes_of_outputs_follow_from_the_tasks(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle").manifest
    assert manifest.output_shapes() == {
        "melanoma_logit": (None,),
        "age_years": (None,),
        "melanoma_map": (None, None, None),
        "ood_score": (None,),
        **{
            task.name: (None, len(task.labels))
            for task in manifest.tasks
            if task.name != "melanoma"
        },
    }


def test_asking_for_another_format_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no torchscript artifact; it has onnx"):
        make_bundle(tmp_path / "bundle").artifact("torchscript")


def test_saving_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    manifest = made.manifest.model_copy(update={"version": "2.0.0"})
    files = {"model.onnx": made.folder / "model.onnx", "note.md": b"text"}
    save_bundle(made.folder, manifest, files)
    assert load_bundle(made.folder).manifest.version == "2.0.0"
    assert sorted(p.name for p in made.folder.iterdir()) == ["bundle.json", "model.onnx", "note.md"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(BundleError, match="is not a bundle"):
        save_bundle(tmp_path, manifest, files)


def test_a_new_bundle_s_folders_are_made_and_others_may_read_it(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    files = {"model.onnx": made.folder / "model.onnx"}
    before = os.umask(0o077)
    try:
        new = save_bundle(tmp_path / "a" / "b" / "bundle", made.manifest, files)
    finally:
        os.umask(before)
    assert new.folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in new.folder.iterdir()} == {0o644}


def test_a_save_that_fails_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_bundle(tmp_path / "bundle")
    files = {"model.onnx": b"not what the manifest says"}
    with pytest.raises(BundleError, match="not the file that the manifest describes"):
        save_bundle(made.folder, made.manifest, files)
    rename = Path.rename

    def fails_on_the_new_one(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_on_the_new_one)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(made.folder, made.manifest, {"model.onnx": made.folder / "model.onnx"})
    monkeypatch.undo()
    assert load_bundle(made.folder) == made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "model.onnx"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2), st.floats(0.01, 10), st.floats(-10, 10))
def test_calibration_keeps_the_order_and_stays_a_probability(
    logits: list[float], slope: float, intercept: float
) -> None:
    ordered = np.sort(np.array(logits))
    found = melanoma_probability(ordered, Calibration(slope=slope, intercept=intercept))
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(np.diff(found) >= 0)


@given(st.floats(-1e6, 1e6), st.floats(0.01, 10), st.floats(-10, 10))
def test_one_image_has_the_probability_that_it_has_among_others(
    logit: float, slope: float, intercept: float
) -> None:
    calibration = Calibration(slope=slope, intercept=intercept)
    (expected,) = melanoma_probability(np.array([logit]), calibration)
    assert one_melanoma_probability(logit, calibration) == pytest.approx(expected, rel=1e-14)


def test_calibration_is_platt_scaling() -> None:
    found = melanoma_probability(np.array([0.0, 2.0]), Calibration(slope=0.5, intercept=-1.0))
    np.testing.assert_allclose(found, [1 / (1 + np.e), 0.5])


def test_ordinal_tasks_need_rising_edges() -> None:
    labels = ("young", "old")
    assert Task(name="age", kind="ordinal", labels=labels, bin_edges=(50,)).bin_edges == (50,)
    for edges in (None, (), (1, 2)):
        with pytest.raises(ValidationError, match="bin_edges"):
            Task(name="age", kind="ordinal", labels=labels, bin_edges=edges)


def test_golden_images_are_the_same_everywhere() -> None:
    image = golden_image(1, 160, 160)
    assert image.shape == (160, 160, 3)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "52317a2c75f81871"
    twelve = b"".join(golden_image(seed, 40, 56).tobytes() for seed in range(12))
    assert hashlib.sha256(twelve).hexdigest()[:16] == "3ee6714b51631b42"


def test_a_network_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    outputs = expected_outputs(golden_batch(made.manifest))
    artifact = made.artifact("onnx")
    check_golden(made.manifest, artifact, outputs)
    outputs["melanoma_logit"] = outputs["melanoma_logit"] + 0.1
    with pytest.raises(BundleError, match=r"melanoma_logit by 0\.1"):
        check_golden(made.manifest, artifact, outputs)
    check_golden(made.manifest, artifact, outputs, rounding=0.1)
    outputs["melanoma_logit"] += 10
    with pytest.raises(BundleError, match=r"melanoma_logit by 10\.1"):
        check_golden(made.manifest, artifact, outputs, rounding=0.1)
    outputs["melanoma_logit"][:] = np.nan
    with pytest.raises(BundleError, match="melanoma_logit by nan"):
        check_golden(made.manifest, artifact, outputs)


def test_a_golden_prediction_without_numbers_is_refused(tmp_path: Path) -> None:
    def empty(manifest: dict) -> None:
        manifest["golden"][0]["outputs"]["melanoma_logit"] = []

    made = load_bundle(changed(tmp_path, empty))
    outputs = expected_outputs(golden_batch(made.manifest))
    with pytest.raises(BundleError, match="melanoma_logit by inf"):
        check_golden(made.manifest, made.artifact("onnx"), outputs)


def changed(tmp_path: Path, change: Callable[[dict], None]) -> Path:
    """A bundle's folder, its manifest changed."""
    made = make_bundle(tmp_path / "bundle")
    path = made.folder / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return made.folder


def test_an_artifact_s_golden_predictions_are_of_the_manifest_s_images(tmp_path: Path) -> None:
    def more(manifest: dict) -> None:
        manifest["artifacts"][0]["golden"] = [
            *manifest["golden"],
            manifest["golden"][0] | {"seed": 7},
        ]

    with pytest.raises(BundleError, match="golden predictions of other images"):
        load_bundle(changed(tmp_path, more))


def test_a_golden_prediction_that_predicts_nothing_is_refused(tmp_path: Path) -> None:
    def nothing(manifest: dict) -> None:
        manifest["golden"][0]["outputs"] = {}

    with pytest.raises(BundleError, match=r"golden\.0\.outputs: must have one output"):
        load_bundle(changed(tmp_path, nothing))


def test_a_tolerance_that_lets_any_prediction_pass_is_refused(tmp_path: Path) -> None:
    def forgive(manifest: dict) -> None:
        manifest["artifacts"][0]["tolerance"] = 1e9

    with pytest.raises(BundleError, match=r"artifacts\.0\.tolerance: must be at most 1\."):
        load_bundle(changed(tmp_path, forgive))


def test_golden_images_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    def many(manifest: dict) -> None:
        first = manifest["golden"][0]
        manifest["golden"] = [first | {"seed": seed} for seed in range(65)]

    with pytest.raises(BundleError, match="more than 64 golden images"):
        load_bundle(changed(tmp_path, many))


def test_a_manifest_without_end_is_not_read(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    path = made.folder / "bundle.json"
    with path.open("a") as file:
        file.truncate(2**40)  # which takes no place on the disk
    with pytest.raises(BundleError, match="has more than 1,000,000 bytes"):
        load_bundle(made.folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="it is no file"):
        load_bundle(made.folder)


def test_a_golden_image_s_seed_is_a_number_that_every_machine_draws_from(tmp_path: Path) -> None:
    def vast(manifest: dict) -> None:
        manifest["golden"][0]["seed"] = 2**63

    with pytest.raises(BundleError, match=r"golden\.0\.seed.*must be less than 2147483648"):
        load_bundle(changed(tmp_path, vast))


def test_what_must_be_told_apart_is_no_binary_task(tmp_path: Path) -> None:
    def binary(manifest: dict) -> None:
        site = next(task for task in manifest["tasks"] if task["name"] == "site")
        site["kind"] = "binary"

    with pytest.raises(BundleError, match="the task site cannot be binary"):
        load_bundle(changed(tmp_path, binary))


def test_a_task_without_a_place_in_an_answer_is_refused(tmp_path: Path) -> None:
    def further(manifest: dict) -> None:
        site = next(task for task in manifest["tasks"] if task["name"] == "site")
        manifest["tasks"].append({**site, "name": "itch"})

    said = "the task itch is none that this version of mmtl answers"
    with pytest.raises(BundleError, match=said):
        load_bundle(changed(tmp_path, further))


def test_a_cpu_takes_no_integers_of_another_format(tmp_path: Path) -> None:
    def torchscript(manifest: dict) -> None:
        first = manifest["artifacts"][0]
        other = {**first, "file": "model.pt", "format": "torchscript", "precision": "int8"}
        manifest["artifacts"].insert(0, other)

    folder = changed(tmp_path, torchscript)
    (folder / "model.pt").write_bytes((folder / "model.onnx").read_bytes())
    assert load_bundle(folder).artifact_for_cpu().file == "model.onnx"


def test_an_artifact_that_was_left_out_is_passed_over(tmp_path: Path) -> None:
    def integers(manifest: dict) -> None:
        first = manifest["artifacts"][0]
        manifest["artifacts"].append({**first, "file": "model.int8.onnx", "precision": "int8"})

    folder = changed(tmp_path, integers)
    (folder / "model.onnx").rename(folder / "model.int8.onnx")
    bundle = load_bundle(folder)
    assert bundle.artifact("onnx").file == bundle.artifact_for_cpu().file == "model.int8.onnx"
    with pytest.raises(BundleError, match=r"model\.onnx is not there"):
        bundle.artifact("onnx", "fp32")
    (folder / "model.int8.onnx").rename(folder / "model.onnx")
    assert load_bundle(folder).artifact_for_cpu().file == "model.onnx"


def test_every_artifact_that_is_there_is_verified(tmp_path: Path) -> None:
    def integers(manifest: dict) -> None:
        first = manifest["artifacts"][0]
        manifest["artifacts"].append({**first, "file": "model.int8.onnx", "precision": "int8"})

    folder = changed(tmp_path, integers)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.int8.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.int8\.onnx is not the file"):
        load_bundle(folder)
