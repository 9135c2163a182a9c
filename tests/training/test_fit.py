"""The loop's parts: what is drawn, what is frozen, what a step is."""

from collections import Counter

import pytest
import torch
from torch import nn

from training.config import Config
from training.fit import sampler, set_mode
from training.losses import MultiTaskLoss
from training.network import MultiTaskNetwork
from training.state import State
from training.tasks import TASKS, Targets


def network() -> MultiTaskNetwork:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return MultiTaskNetwork(backbone, 8, 6, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def targets(melanoma: list[int]) -> Targets:
    missing = torch.full((len(melanoma),), -1)
    return Targets({task.name: missing for task in TASKS} | {"melanoma": torch.tensor(melanoma)})


def test_an_epoch_is_every_image_once() -> None:
    order = sampler(list(range(9)), targets([0] * 9), Config(), torch.Generator())
    assert sorted(order) == list(range(9))


def test_balanced_sampling_draws_both_classes_alike_often() -> None:
    known = targets([1] * 40 + [0] * 360)
    config = Config(imbalance="balanced_sampling")
    drawn = [
        int(known.classes["melanoma"][position])
        for seed in range(20)
        for position in sampler(
            list(range(400)), known, config, torch.Generator().manual_seed(seed)
        )
    ]
    assert len(drawn) == 20 * 400
    assert Counter(drawn)[1] / len(drawn) == pytest.approx(0.5, abs=0.03)


def test_an_image_without_label_is_drawn_as_often_as_the_average() -> None:
    known = targets([1] * 10 + [0] * 90 + [-1] * 100)
    config = Config(imbalance="balanced_sampling")
    drawn = [
        position
        for seed in range(40)
        for position in sampler(
            list(range(200)), known, config, torch.Generator().manual_seed(seed)
        )
    ]
    assert sum(position >= 100 for position in drawn) / len(drawn) == pytest.approx(0.5, abs=0.04)


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
