"""Masked losses, rare classes, and the balance of tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from training.config import Config
from training.losses import MultiTaskLoss
from training.network import age_distribution
from training.tasks import MISSING, TASKS, Targets


def targets(**classes: list[int]) -> Targets:
    full = {task.name: [MISSING] * len(next(iter(classes.values()))) for task in TASKS}
    return Targets({name: torch.tensor(v) for name, v in {**full, **classes}.items()})


def zero_logits(count: int) -> dict[str, torch.Tensor]:
    return {task.name: torch.zeros(count, task.outputs) for task in TASKS}


# One in four is a melanoma.
LEARNED = targets(melanoma=[1, 0, 0, 0], diagnosis=[0, 1, 1, 1])


def loss_of(**settings: object) -> MultiTaskLoss:
    return MultiTaskLoss(Config.model_validate(settings), LEARNED)


def test_a_missing_label_does_not_count() -> None:
    logits = zero_logits(3)
    logits["site"][2] = 100 * torch.randn(6)
    _, parts = loss_of()(logits, targets(site=[1, 4, MISSING]))
    assert set(parts) == {"site"}
    assert parts["site"] == pytest.approx(np.log(6))


def test_no_label_at_all_is_no_loss() -> None:
    total, parts = loss_of()(zero_logits(2), targets(melanoma=[MISSING, MISSING]))
    assert (float(total), parts) == (0.0, {})


def test_no_label_at_all_moves_no_weights() -> None:
    loss = loss_of(task_balancing="famo")
    unknown = targets(melanoma=[MISSING])
    total, parts = loss(zero_logits(1), unknown)
    loss.follow(zero_logits(1), unknown)
    assert (float(total), parts) == (0.0, {})
    assert float(loss.famo.steps) == 0


def test_famo_weighs_the_losses() -> None:
    shown = targets(melanoma=[1], sex=[0])
    total, parts = loss_of(task_balancing="famo")(zero_logits(1), shown)
    # Shares of one, each over its loss, on top of the fixed weights.
    assert float(total) == pytest.approx(0.5 * parts["melanoma"] + 0.1 * 0.5 * parts["sex"])


def test_the_total_is_weighted() -> None:
    total, parts = loss_of()(zero_logits(1), targets(melanoma=[1], sex=[0]))
    assert float(total) == pytest.approx(parts["melanoma"] + 0.1 * parts["sex"])
    assert parts["melanoma"] == pytest.approx(np.log(2))


def test_the_age_loss_is_the_distribution_s_log_likelihood() -> None:
    torch.manual_seed(0)
    logits = zero_logits(19)
    logits["age"] = torch.randn(19, 18)
    ages = torch.arange(19)
    _, parts = loss_of()(logits, targets(age=ages.tolist()))
    expected = -age_distribution(logits["age"])[ages, ages].log().mean()
    assert parts["age"] == pytest.approx(float(expected), rel=1e-5)


def melanoma_loss(loss: MultiTaskLoss, logit: float) -> float:
    logits = zero_logits(1) | {"melanoma": torch.tensor([[logit]])}
    return loss(logits, targets(melanoma=[1]))[1]["melanoma"]


def test_the_binary_loss_is_the_logit_s_own() -> None:
    for logit in (-3.0, 0.0, 2.5):
        expected = functional.softplus(torch.tensor(-logit))
        assert melanoma_loss(loss_of(), logit) == pytest.approx(float(expected), rel=1e-5)


def test_logit_adjustment_adds_the_prior() -> None:
    # A logit of log 3 makes up for a prevalence of one in four.
    adjusted = melanoma_loss(loss_of(imbalance="logit_adjustment"), float(np.log(3)))
    assert adjusted == pytest.approx(np.log(2), rel=1e-5)


def test_a_focal_loss_by_hand() -> None:
    # p = 0.9: (1 - 0.9)^2 x -log 0.9.
    found = melanoma_loss(loss_of(imbalance="focal"), float(np.log(9)))
    assert found == pytest.approx(0.01 * -np.log(0.9), rel=1e-4)


@pytest.mark.parametrize("imbalance", ["logit_adjustment", "focal"])
def test_validation_is_in_plain_terms(imbalance: str) -> None:
    loss = loss_of(imbalance=imbalance).eval()
    assert melanoma_loss(loss, 0.0) == pytest.approx(np.log(2))


def test_a_class_that_was_never_seen_has_a_finite_prior() -> None:
    loss = MultiTaskLoss(Config(imbalance="logit_adjustment"), targets(melanoma=[0, 0]))
    total, _ = loss(zero_logits(1), targets(melanoma=[1], diagnosis=[3]))
    assert torch.isfinite(total)


def test_learned_weights_fall_where_the_loss_is_large() -> None:
    """At its best, each task's variance is twice its loss (Kendall et al. 2018)."""
    loss = loss_of(task_balancing="uncertainty")
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(400):
        total, parts = loss(zero_logits(1), targets(site=[1], sex=[0]))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for task in ("site", "sex"):
        variance = float(loss.balance[task].detach().exp())
        assert variance == pytest.approx(2 * parts[task], rel=0.02)
    assert float(loss.balance["age"].detach()) == 0


def test_fixed_weights_have_no_parameters() -> None:
    assert list(loss_of().parameters()) == []


def test_images_count_by_their_weight() -> None:
    logits = zero_logits(2) | {"melanoma": torch.tensor([[2.0], [-1.0]])}
    one, other = (
        loss_of()({n: v[i : i + 1] for n, v in logits.items()}, targets(melanoma=[i]))[1][
            "melanoma"
        ]
        for i in (0, 1)
    )
    weighed = replace(targets(melanoma=[0, 1]), weights=torch.tensor([0.3, 0.1]))
    found = loss_of()(logits, weighed)[1]["melanoma"]
    assert found == pytest.approx((0.3 * one + 0.1 * other) / 0.4, rel=1e-5)
