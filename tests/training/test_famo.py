"""FAMO: weights that let all losses fall alike."""

import pytest
import torch

from training.famo import DECAY, RATE, Famo


def test_factors_are_shares_of_the_losses_logarithms() -> None:
    """The gradient of sum(z log L) over z / L's sum, as in the authors' equation."""
    losses = {"one": torch.tensor(2.0), "two": torch.tensor(0.5)}
    found = Famo(["one", "two"]).factors(losses)
    assert float(found["one"]) == pytest.approx(0.2)
    assert float(found["two"]) == pytest.approx(0.8)


def test_a_task_that_gains_less_weighs_more() -> None:
    famo = Famo(["slow", "fast", "absent"])
    for _ in range(10):
        famo.factors({"slow": torch.tensor(1.0), "fast": torch.tensor(1.0)})
        famo.follow({"slow": torch.tensor(0.99), "fast": torch.tensor(0.5)})
    slow, fast, absent = famo.logits.tolist()
    assert slow > absent > fast
    assert slow <= 10 * RATE + 1e-6


def test_a_step_follows_the_authors_gradient() -> None:
    """Of sum(z log L) by the logits: z times what each task gained more than the mean.

    Adam's first step is the rate, whichever way the gradient points; what it keeps of it is not.
    """
    famo = Famo(["one", "two", "absent"])
    famo.logits.copy_(torch.tensor([0.0, 1.0, 0.5]))
    famo.factors({"one": torch.tensor(2.0), "two": torch.tensor(0.3)})
    famo.follow({"one": torch.tensor(1.0), "two": torch.tensor(0.2)})
    shares = torch.tensor([0.0, 1.0, 0.5]).softmax(0)
    gained = torch.tensor([2.0, 0.3]).log() - torch.tensor([1.0, 0.2]).log()
    mean = (shares[:2] * gained).sum() / shares[:2].sum()
    gradient = torch.tensor([*(shares[:2] * (gained - mean)), 0.0])
    decayed = gradient + DECAY * torch.tensor([0.0, 1.0, 0.5])
    assert famo.mean.tolist() == pytest.approx((0.1 * decayed).tolist(), abs=1e-6)
    expected = torch.tensor([0.0, 1.0, 0.5]) - RATE * decayed.sign()
    assert famo.logits.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_without_a_label_in_a_batch_nothing_moves() -> None:
    famo = Famo(["one"])
    assert famo.factors({}) == {}
    famo.follow({})
    assert float(famo.steps) == 0


def test_tasks_under_one_rate_fall_at_the_same_rate() -> None:
    """Two quadratic losses of very different curvature."""
    famo = Famo(["steep", "flat"])
    place = torch.tensor([1.0, 1.0], requires_grad=True)

    def losses() -> dict[str, torch.Tensor]:
        return {"steep": 100 * place[0] ** 2 + 1e-3, "flat": 0.01 * place[1] ** 2 + 1e-3}

    for _ in range(300):
        found = losses()
        factors = famo.factors(found)
        total = sum(factors[task] * loss for task, loss in found.items())
        (gradient,) = torch.autograd.grad(total, place)
        with torch.no_grad():
            place -= 0.05 * gradient / gradient.norm()
            famo.follow(losses())
    shares = famo.logits.softmax(0)
    assert float(shares[1]) > float(shares[0])


def test_its_weights_are_saved_and_not_optimised_by_others() -> None:
    famo = Famo(["one", "two"])
    famo.factors({"one": torch.tensor(1.0), "two": torch.tensor(1.0)})
    famo.follow({"one": torch.tensor(0.5), "two": torch.tensor(1.0)})
    assert list(famo.parameters()) == []
    other = Famo(["one", "two"])
    other.load_state_dict(famo.state_dict())
    assert torch.equal(other.logits, famo.logits)
    assert float(other.steps) == 1
