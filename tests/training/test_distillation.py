"""A student learns what teachers answer, beside the labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import Bundle, BundleError, Calibration, load_bundle, save_bundle
from models.recalibration import LOGIT
from tests.bundles import SIDE, expected_outputs, make_bundle
from training.config import Config
from training.data.manifest import DataError, Record
from training.distillation import TAUGHT, _ask, open_teachers, soft_targets
from training.losses import MultiTaskLoss
from training.run import Run
from training.runners import onnx_runner
from training.state import identity_of
from training.tasks import MISSING, TASKS, Targets

IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
RECORDS = [Record(dataset="drawn", image=f"{i}", path="") for i in range(len(IMAGES))]


@pytest.fixture
def teacher(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "teacher")


def test_the_soft_targets_are_the_teachers_mean_answers(
    teacher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.distillation.TAUGHT", {"site": ()})
    monkeypatch.setattr("training.distillation.BATCH_SIZE", 2)
    run = Run(tmp_path)
    asked = [1, 3, 4]
    soft = soft_targets(run, [teacher, teacher], RECORDS, IMAGES, asked)
    melanoma = 1 / (1 + np.exp(-expected_outputs(IMAGES)[LOGIT]))
    assert soft["melanoma"][asked, 1].numpy() == pytest.approx(melanoma[asked], abs=1e-5)
    assert soft["melanoma"][asked].sum(1).tolist() == pytest.approx([1, 1, 1])
    assert soft["site"][3].tolist() == pytest.approx([0.25, 0.75])
    assert not soft["melanoma"][[0, 2]].any()
    # Asked once: what was said is kept.
    (kept,) = run.teachers.iterdir()
    monkeypatch.setattr("training.distillation._ask", None)
    again = soft_targets(run, [teacher], RECORDS, IMAGES, asked)
    assert torch.equal(again["melanoma"], soft["melanoma"])
    assert kept.suffix == ".npz"


def test_a_teacher_s_melanoma_is_calibrated_as_its_answers_are(
    teacher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.distillation.TAUGHT", {"site": ()})
    (artifact,) = teacher.manifest.artifacts
    scaled = artifact.model_copy(update={"calibration": Calibration(slope=0.5, intercept=-2)})
    manifest = teacher.manifest.model_copy(update={"artifacts": (scaled,)})
    fitted = save_bundle(
        tmp_path / "fitted", manifest, {"model.onnx": teacher.folder / "model.onnx"}
    )
    run = Run(tmp_path)
    asked = [0, 1, 2, 3, 4]
    before = soft_targets(run, [teacher], RECORDS, IMAGES, asked)
    found = soft_targets(run, [fitted], RECORDS, IMAGES, asked)  # of the same artifact
    expected = 1 / (1 + np.exp(2 - 0.5 * expected_outputs(IMAGES)[LOGIT]))
    assert found["melanoma"][:, 1].numpy() == pytest.approx(expected, abs=1e-5)
    assert not torch.equal(found["melanoma"], before["melanoma"])
    config = Config()
    assert identity_of(config, RECORDS, [fitted]) != identity_of(config, RECORDS, [teacher])


def test_a_teacher_is_not_heard_of_what_it_was_taught_nothing_of(
    teacher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing, something = np.full((2, 2), 0.5, np.float32), np.float32([[0.9, 0.1], [0.5, 0.5]])
    said = [{"site": nothing, "sex": nothing}, {"site": something, "sex": nothing}]
    monkeypatch.setattr("training.distillation._ask", lambda *_: said.pop())
    monkeypatch.setattr("training.distillation._read", lambda _: None)
    soft = soft_targets(Run(tmp_path), [teacher, teacher], RECORDS, IMAGES, [1, 3])
    assert list(soft) == ["site"]
    assert soft["site"][[1, 3]].numpy() == pytest.approx(something)


def test_a_teacher_sees_each_image_in_its_four_mirrorings(
    teacher: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def runner(path: Path):
        answer = onnx_runner(path)

        def run(images: np.ndarray):
            seen.append(images.copy())
            return answer(images)

        return run

    monkeypatch.setattr("training.distillation.onnx_runner", runner)
    monkeypatch.setattr("training.distillation.TAUGHT", {"site": ()})
    image = np.random.default_rng(0).integers(0, 256, (1, *IMAGES.shape[1:]), np.uint8)
    _ask(teacher, image, [0])
    expected = [image, image[:, ::-1], image[:, :, ::-1], image[:, ::-1, ::-1]]
    assert len(seen) == 4
    for one in expected:
        assert sum(bool((one == other).all()) for other in seen) == 1


def test_what_was_said_of_other_pictures_is_not_taken(
    teacher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.distillation.TAUGHT", {"site": ()})
    run = Run(tmp_path)
    first = soft_targets(run, [teacher], RECORDS, IMAGES, [1, 3])
    turned = soft_targets(run, [teacher], RECORDS[::-1], IMAGES[::-1], [1, 3])
    assert torch.equal(turned["melanoma"], first["melanoma"].flip(0))
    again = soft_targets(run, [teacher], RECORDS, IMAGES, [3, 1])
    assert torch.equal(again["melanoma"], first["melanoma"])
    for file in run.teachers.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    again = soft_targets(run, [teacher], RECORDS, IMAGES, [1, 3])
    assert torch.equal(again["melanoma"], first["melanoma"])


def test_a_teacher_of_other_images_or_labels_is_refused(teacher: Bundle, tmp_path: Path) -> None:
    folder = str(teacher.folder)
    with pytest.raises(DataError, match=r"looks at 32 x 32 pixels; the run's images have 160"):
        open_teachers([folder], 160)
    with pytest.raises(DataError, match="has no head for diagnosis: take one that has"):
        open_teachers([folder], SIDE)
    *others, site = teacher.manifest.tasks
    diagnosis = site.model_copy(update={"name": "diagnosis"})
    manifest = teacher.manifest.model_copy(update={"tasks": (*others, site, diagnosis)})
    save_bundle(tmp_path / "two", manifest, {"model.onnx": teacher.folder / "model.onnx"})
    with pytest.raises(DataError, match=r"other labels for diagnosis than actinic .*: take one"):
        open_teachers([str(tmp_path / "two")], SIDE)
    with pytest.raises(BundleError):
        open_teachers([str(tmp_path / "nowhere")], SIDE)
    assert open_teachers([], 160) == []


def test_a_teacher_with_the_run_s_labels_is_taken(teacher: Bundle, tmp_path: Path) -> None:
    melanoma, age, site = teacher.manifest.tasks
    tasks = [
        site.model_copy(update={"name": name, "labels": tuple(map(str, labels))})
        for name, labels in TAUGHT.items()
    ]
    manifest = teacher.manifest.model_copy(update={"tasks": (melanoma, age, *tasks)})
    files = {"model.onnx": teacher.folder / "model.onnx"}
    taken = save_bundle(tmp_path / "labels", manifest, files)
    assert open_teachers([str(taken.folder)], SIDE) == [load_bundle(taken.folder)]


def targets(melanoma: int, taught: float) -> Targets:
    """One image, its label and what the teachers say."""
    classes = {task.name: torch.tensor([MISSING]) for task in TASKS}
    classes["melanoma"] = torch.tensor([melanoma])
    return Targets(classes, {"melanoma": torch.tensor([[1 - taught, taught]])})


def best_logit(share: float, shown: Targets) -> float:
    """Where the loss is lowest."""
    loss = MultiTaskLoss(Config(distillation=share), shown)
    logits = torch.linspace(-6, 6, 2401)
    losses = []
    for logit in logits:
        outputs = {task.name: torch.zeros(1, task.outputs) for task in TASKS}
        outputs["melanoma"] = logit.reshape(1, 1)
        losses.append(float(loss(outputs, shown)[0]))
    return float(logits[int(np.argmin(losses))])


@pytest.mark.parametrize(("share", "expected"), [(1.0, 0.2), (0.5, 0.6), (0.25, 0.8)])
def test_the_loss_is_lowest_between_label_and_teachers(share: float, expected: float) -> None:
    found = best_logit(share, targets(melanoma=1, taught=0.2))
    assert 1 / (1 + np.exp(-found)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("melanoma", [MISSING, 0])
def test_logit_adjustment_is_of_what_teachers_answer_too(melanoma: int) -> None:
    """Else label and teacher would pull one logit two ways (Menon et al. 2021)."""
    shown = targets(melanoma=melanoma, taught=0.2)
    learned = replace(shown, classes=shown.classes | {"melanoma": torch.tensor([0] * 9 + [1])})
    loss = MultiTaskLoss(Config(imbalance="logit_adjustment", distillation=1.0), learned)
    outputs = {task.name: torch.zeros(1, task.outputs) for task in TASKS}
    outputs["melanoma"] = torch.tensor([[np.log(0.2 / 0.8) - np.log(0.1 / 0.9)]]).float()
    outputs["melanoma"].requires_grad_()
    loss(outputs, shown)[0].backward()
    assert float(outputs["melanoma"].grad) == pytest.approx(0, abs=1e-6)


def test_an_image_without_a_label_is_learned_from_its_teachers() -> None:
    found = best_logit(0.5, targets(melanoma=MISSING, taught=0.3))
    assert 1 / (1 + np.exp(-found)) == pytest.approx(0.3, abs=0.01)


def test_validation_asks_the_labels_alone() -> None:
    shown = targets(melanoma=1, taught=0.2)
    loss = MultiTaskLoss(Config(), shown).eval()
    outputs = {task.name: torch.zeros(1, task.outputs) for task in TASKS}
    total, parts = loss(outputs, shown)
    assert float(total) == pytest.approx(np.log(2)) == pytest.approx(parts["melanoma"])
