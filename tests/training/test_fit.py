"""The loop's parts: what is drawn, what is frozen, what a step is."""

import csv
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.conftest import small
from training.config import Config
from training.data.manifest import DataError
from training.draws import AugmentedImages, draw
from training.export import load_fitted
from training.fit import (
    Step,
    _show,
    check_compiler,
    fit,
    set_mode,
    start,
    train_one_epoch,
    validate,
)
from training.losses import MultiTaskLoss
from training.network import MultiTaskNetwork
from training.run import Run, to_learn_from
from training.state import State, _average, load_tensors, save_tensors
from training.tasks import DIAGNOSES, MELANOMA, TASKS, Targets, encode_targets
from training.team import Team

CPU = torch.device("cpu")


def network() -> MultiTaskNetwork:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return MultiTaskNetwork(backbone, 8, 6, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def targets(melanoma: list[int]) -> Targets:
    missing = torch.full((len(melanoma),), -1)
    return Targets({task.name: missing for task in TASKS} | {"melanoma": torch.tensor(melanoma)})


def test_an_epoch_is_every_image_once() -> None:
    positions = list(range(10, 30))
    drawn = draw(positions, targets([0] * 30), Config(), epoch=0)
    assert sorted(drawn) == [(position, 0) for position in positions]
    assert drawn != draw(positions, targets([0] * 30), Config(), epoch=1)


BALANCED = Config(imbalance="balanced_sampling")


def test_balanced_sampling_draws_both_classes_alike_often() -> None:
    known = targets([1] * 40 + [0] * 360)
    drawn = [
        int(known.classes["melanoma"][position])
        for epoch in range(20)
        for position, _ in draw(list(range(400)), known, BALANCED, epoch)
    ]
    assert len(drawn) == 20 * 400
    assert Counter(drawn)[1] / len(drawn) == pytest.approx(0.5, abs=0.03)


def test_an_image_without_label_is_drawn_as_often_as_the_average() -> None:
    known = targets([1] * 10 + [0] * 90 + [-1] * 100)
    drawn = [
        position
        for epoch in range(40)
        for position, _ in draw(list(range(200)), known, BALANCED, epoch)
    ]
    assert sum(position >= 100 for position in drawn) / len(drawn) == pytest.approx(0.5, abs=0.04)


def test_an_image_that_is_drawn_again_looks_otherwise() -> None:
    drawn = draw(list(range(20)), targets([1] + [0] * 19), BALANCED, epoch=0)
    assert len(set(drawn)) == len(drawn)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    config = Config(size=32)
    first, second, other = AugmentedImages(pixels, [(0, 0), (0, 1), (0, 0)], config, epoch=0)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], other[0])
    assert first[1] == second[1] == 0


def test_a_mixture_names_both_images_and_their_share() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    config = Config(size=32, mixing="mixup", mixing_concentration=1.0)
    images = AugmentedImages(pixels, [(position, 0) for position in range(20)], config, epoch=0)
    items = [images[number] for number in range(20)]
    assert [position for _, position, _, _ in items] == list(range(20))
    assert len({partner for _, _, partner, _ in items}) > 5
    assert all(0 < share < 1 for *_, share in items)
    assert torch.equal(images[3][0], items[3][0])


def test_small_images_first_and_the_largest_last() -> None:
    config = Config(size=64, sizes=(32, 48, 64), epochs=7)
    sizes = [config.training_size(epoch) for epoch in range(7)]
    assert sizes == [32, 32, 32, 48, 48, 64, 64]
    pixels = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    assert AugmentedImages(pixels, [(0, 0)], config, epoch=4)[0][0].shape == (48, 48, 3)


def test_the_first_layer_may_learn_slowest() -> None:
    config = Config(learning_rate=1e-3, first_layer_rate=0.01)
    net = network()
    state = State(net, MultiTaskLoss(config, targets([0, 1])), config, 64, torch.device("cpu"))
    rates = {
        id(parameter): group["initial_lr"]
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(list(net.parameters()))
    for layer, rate in ((net.backbone[0], 1e-5), (net.backbone[1], 1e-3)):
        assert [rates[id(p)] for p in layer.parameters()] == pytest.approx([rate, rate])


def test_a_frozen_backbone_neither_learns_nor_counts() -> None:
    net, config = network(), Config(frozen_epochs=2)
    set_mode(net, config, epoch=1)
    assert not any(p.requires_grad for p in net.backbone.parameters())
    assert not any(m.training for m in net.backbone.modules())
    assert net.trunk.training
    set_mode(net, config, epoch=2)
    assert all(p.requires_grad for p in net.backbone.parameters())
    assert all(m.training for m in net.backbone.modules())


def test_frozen_batch_norm_keeps_its_statistics_and_the_rest_learns() -> None:
    net = network()
    set_mode(net, Config(freeze_batch_norm=True), epoch=0)
    net(torch.randint(0, 256, (4, 3, 16, 16)))
    norm = net.backbone[1]
    assert torch.equal(norm.running_mean, torch.zeros(8))
    assert net.backbone[0].training
    assert norm.weight.requires_grad


def test_the_backbone_may_learn_slower() -> None:
    config = Config(learning_rate=1e-3, backbone_rate=0.1, warmup_epochs=0)
    net = network()
    loss = MultiTaskLoss(config, targets([0, 1]))
    state = State(net, loss, config, 64, torch.device("cpu"))
    rates = {
        id(parameter): group["initial_lr"]
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(list(net.parameters()))
    assert {rates[id(p)] for p in net.backbone.parameters()} == {1e-4}
    assert {rates[id(p)] for p in net.heads.parameters()} == {1e-3}


def test_an_epoch_has_as_many_steps_as_batches_accumulated() -> None:
    config = Config(batch_size=8, accumulate=4)
    loss = MultiTaskLoss(config, targets([0, 1]))
    assert State(network(), loss, config, 8 * 10, torch.device("cpu")).steps == 3
    # Of a last batch that is not whole there is none.
    whole = Config(batch_size=32)
    assert State(network(), loss, whole, 70, torch.device("cpu")).steps == 2


def test_training_ends_after_as_many_epochs_without_a_better_one_as_patience_has() -> None:
    config = Config(patience=2)
    state = State(network(), MultiTaskLoss(config, targets([0, 1])), config, 64, CPU)
    stale = []
    for score in (0.5, 0.6, 0.6, 0.55):
        assert not state.finished
        state.advance(score)
        stale.append(state.stale)
    assert (stale, state.best, state.finished) == ([0, 0, 1, 2], 0.6, True)


def test_weights_decay_and_biases_and_norms_do_not() -> None:
    config = Config(weight_decay=0.1)
    state = State(network(), MultiTaskLoss(config, targets([0, 1])), config, 64, CPU)
    for group in state.optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_learning_rate_of_the_log_is_that_of_the_last_step() -> None:
    config = Config(warmup_epochs=0, epochs=2)
    state = State(network(), MultiTaskLoss(config, targets([0, 1])), config, 3 * 32, CPU)
    heads = next(iter(state.network.heads.parameters()))
    for _ in range(4):
        (used,) = {
            group["lr"]
            for group in state.optimizer.param_groups
            if any(p is heads for p in group["params"])
        }
        state.optimizer.step()
        state.scheduler.step()
        assert state.learning_rate == pytest.approx(used)


def test_what_is_kept_is_the_average_that_was_validated(fitted: Run) -> None:
    records, pixels = fitted.load_data()
    config = fitted.load_config()
    train, validation = to_learn_from(records, config, fitted.manifest)
    known = encode_targets(records)
    loss = MultiTaskLoss(config, known.take(torch.tensor(train)))
    with small():
        found = validate(load_fitted(fitted, records), loss, pixels, known, validation)
    with fitted.log.open() as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["validation_auroc"]))
    for name, value in found.items():
        assert value == pytest.approx(float(best[name]), rel=1e-4)


def test_it_is_stopped_by_the_logit_that_is_served() -> None:
    class Disagreeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))  # whose device is asked for

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            rank = images.float().mean(dim=(1, 2, 3))
            diagnosis = torch.zeros(len(rank), len(DIAGNOSES))
            diagnosis[:, MELANOMA] = 3 * rank
            others = {task.name: torch.zeros(len(rank), task.outputs) for task in TASKS}
            return {**others, "melanoma": -rank[:, None], "diagnosis": diagnosis}

    pixels = np.arange(4, dtype=np.uint8).repeat(12).reshape(4, 2, 2, 3)
    known = targets([0, 0, 1, 1])
    loss = MultiTaskLoss(Config(), known)
    found = validate(Disagreeing(), loss, pixels, known, [0, 1, 2, 3])
    assert found["validation_auroc"] == 1


def test_a_run_starts_from_anothers_best_weights(tmp_path: Path) -> None:
    net, other = network(), Run(tmp_path)
    fitted = {name: value + 1 for name, value in net.state_dict().items()}
    torch.save(fitted, other.best)
    start(net, other)
    assert all(torch.equal(value, fitted[name]) for name, value in net.state_dict().items())
    torch.save({"one": torch.zeros(1)}, other.best)
    with pytest.raises(DataError, match="another backbone or other heads"):
        start(net, other)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_a_compiled_network_learns_the_same() -> None:
    known = targets([0, 1, 1, 0])
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    learned = []
    for compiled in (False, True):
        net, loss = network(), MultiTaskLoss(Config(), known)
        net.dropout.p = 0.0
        state = State(net, loss, Config(warmup_epochs=0), 64, torch.device("cpu"))
        if compiled:
            state.network.compile()
        for _ in range(3):
            total, _ = Step(net, loss)(images, known, None)
            total.backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.average.update_parameters(net)
        learned.append((float(total.detach()), list(state.average.module.state_dict())))
    (loss_plain, names_plain), (loss_compiled, names_compiled) = learned
    assert loss_compiled == pytest.approx(loss_plain, rel=1e-4)
    assert names_compiled == names_plain


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a disk that is full after so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_is_fitted_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run._LEFT_SECONDS", 0.2)
    run = Run(tmp_path)
    with run.alone(), pytest.raises(DataError, match="Another process works on"):
        fit(run)
    with pytest.raises(DataError, match="is not a run folder"):  # and not that somebody has it
        fit(run)


def test_on_a_full_disk_what_was_fitted_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_tensors(path, {"epoch": 1})
    said = r"checkpoint\.pt cannot be written \(File too large\); what was fitted before is kept"
    with files_of_at_most(5000), pytest.raises(DataError, match=said):
        save_tensors(path, {"epoch": 2, "weights": torch.zeros(10_000)})
    assert load_tensors(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_task_whose_labels_are_few_has_its_column_and_its_own_mean(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows = [
        {"epoch": "1", "train_melanoma": "0.5", "validation_auroc": "0.6"},
        {"epoch": "2", "train_melanoma": "0.4", "train_age": "2", "validation_auroc": "0.7"},
    ]
    _show(run, rows)
    with run.log.open() as file:
        first, second = csv.DictReader(file)
    assert (first["train_age"], second["train_age"]) == ("", "2")


def test_a_task_s_loss_is_the_mean_over_the_batches_that_have_its_labels() -> None:
    known = targets([0, 1] * 8)
    sex = torch.full((16,), -1)
    sex[0] = 1  # in one batch of four
    known = Targets(known.classes | {"sex": sex})
    config = Config(size=32, batch_size=4, learning_rate=1e-12, drop_path=0)
    net = network()
    state = State(net, MultiTaskLoss(config, known), config, 16, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    images = AugmentedImages(pixels, draw(list(range(16)), known, config, 0), config, 0)
    losses = train_one_epoch(state, images, known, 0, Team())
    assert losses["train_sex"] > 0.2  # about ln 2; a quarter of it, were it of all batches
    assert "train_age" not in losses


def test_indices_are_not_averaged() -> None:
    """As Swin keeps them; each would slip by one, where the mean of it and itself is rounded."""
    index = torch.arange(169)
    averages = [index.clone()]
    for step in range(100):
        _average(0.998, averages, [index], torch.tensor(step))
    assert averages[0].equal(index)


def test_the_average_forgets_the_first_weights_of_a_short_run() -> None:
    averages, weights = [torch.zeros(3)], [torch.ones(3)]
    for step in range(1, 90):
        _average(0.998, averages, weights, torch.tensor(step))
    assert averages[0].min() > 0.99
    before = averages[0].clone()
    _average(0.998, averages, [torch.zeros(3)], 100_000)
    torch.testing.assert_close(averages[0], 0.998 * before)


def test_a_compiler_that_is_missing_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(DataError, match=r"there is no /nonexistent/c\+\+: install one"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", sys.executable)
    check_compiler(torch.device("cpu"))
