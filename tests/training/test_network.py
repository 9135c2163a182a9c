import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.bundle import AGE_GRID
from training.network import (
    MELANOMA,
    MultiTaskNetwork,
    ServedEnsemble,
    ServedNetwork,
    age_distribution,
    melanoma_log_odds,
)
from training.ood import fit_feature_distance

EDGES = (30.0, 45.0, 60.0, 75.0)


def small_network() -> MultiTaskNetwork:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU())
    return MultiTaskNetwork(backbone, 8, 6, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).eval()


@pytest.fixture
def served() -> ServedNetwork:
    distance = fit_feature_distance(np.random.default_rng(0).normal(size=(50, 8)), axes=3)
    return ServedNetwork(small_network(), EDGES, distance).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 64, 48, 3), dtype=torch.uint8)


@torch.inference_mode()
def test_the_outputs_are_those_of_the_contract(served, images: torch.Tensor) -> None:
    outputs = served(images)
    assert tuple(outputs) == ServedNetwork.OUTPUTS
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {
        "melanoma_logit": (3,),
        "age": (3, 5),
        "age_years": (3,),
        "site": (3, 6),
        "sex": (3, 2),
        "diagnosis": (3, 7),
        "melanoma_map": (3, 8, 6),
        "ood_score": (3,),
    }
    for name in ("age", "site", "sex", "diagnosis"):
        torch.testing.assert_close(outputs[name].sum(dim=1), torch.ones(3))


def test_the_backbone_sees_what_it_was_pretrained_on() -> None:
    """Pixels from 0 to 1, less the mean, in standard deviations, each channel by its own."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    network = MultiTaskNetwork(nn.Identity(), 3, 6, mean, std).eval()
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    last, _ = network.maps(pixels)
    expected = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert last.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def test_an_ensemble_answers_the_mean_of_its_members(served, images: torch.Tensor) -> None:
    torch.manual_seed(1)
    heads = nn.ModuleDict(
        {n: nn.Linear(6, h.out_features) for n, h in served.network.heads.items()}
    )
    network = small_network()
    network.heads = heads
    other = ServedNetwork(network, EDGES, served.distance).eval()
    one, two = served(images), other(images)
    found = ServedEnsemble([served, other])(images)
    assert tuple(found) == ServedNetwork.OUTPUTS
    for name, values in found.items():
        torch.testing.assert_close(values, (one[name] + two[name]) / 2)
    assert not torch.equal(one["site"], two["site"])


@pytest.mark.parametrize("views", [4, 8])
@torch.inference_mode()
def test_an_image_and_its_turned_copy_are_answered_alike(served, views: int) -> None:
    together = ServedNetwork(served.network, EDGES, served.distance, views).eval()
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    outputs = together(image)
    turned = image.flip([1]) if views == 4 else image.transpose(1, 2).flip([1])
    again = together(turned)
    for name in ServedNetwork.OUTPUTS:
        if name != "melanoma_map":
            torch.testing.assert_close(again[name], outputs[name])
    heat = outputs["melanoma_map"]
    expected = heat.flip([1]) if views == 4 else heat.transpose(1, 2).flip([1])
    torch.testing.assert_close(again["melanoma_map"], expected)
    logit = heat.mean(dim=(1, 2)) + together.melanoma_bias
    torch.testing.assert_close(logit, outputs["melanoma_logit"])
    assert not torch.allclose(outputs["melanoma_logit"], served(image)["melanoma_logit"])


@torch.inference_mode()
def test_the_heat_map_is_the_logit_taken_apart(served, images: torch.Tensor) -> None:
    outputs = served(images)
    torch.testing.assert_close(
        outputs["melanoma_map"].mean(dim=(1, 2)) + served.melanoma_bias, outputs["melanoma_logit"]
    )


@torch.inference_mode()
def test_the_heat_map_is_what_a_small_change_of_a_place_does(served, images: torch.Tensor) -> None:
    """To first order: where the map is high, a bit more of what is there raises the logit most."""
    served.double()
    last, _ = served.network.maps(images.permute(0, 3, 1, 2))
    features = served.network.trunk(last)
    heads = served.network.heads

    def logit(changed: torch.Tensor) -> torch.Tensor:
        pooled = changed.mean(dim=(2, 3))
        return melanoma_log_odds(heads["melanoma"](pooled), heads["diagnosis"](pooled))

    diagnosis = heads["diagnosis"](features.mean(dim=(2, 3)))
    places = served._map(features, diagnosis, logit(features))[0]
    step, found = 1e-4, []
    for row, column in ((0, 0), (3, 2), (7, 5)):
        changed = features.clone()
        changed[0, :, row, column] *= 1 + step
        found.append(float(logit(changed)[0] - logit(features)[0]) / step * places.numel())
    # The evenly spread rest is the same everywhere, so differences between places must agree.
    assert found[1] - found[0] == pytest.approx(float(places[3, 2] - places[0, 0]), rel=1e-2)
    assert found[2] - found[0] == pytest.approx(float(places[7, 5] - places[0, 0]), rel=1e-2)


def test_the_melanoma_logit_is_the_mean_of_both_heads() -> None:
    # Of seven diagnoses with equal logits but melanoma's: its odds are e / 6.
    diagnosis = torch.zeros(1, 7)
    diagnosis[0, MELANOMA] = 1.0
    found = melanoma_log_odds(torch.tensor([[3.0]]), diagnosis)
    assert float(found) == pytest.approx((3 + 1 - np.log(6)) / 2)


@torch.inference_mode()
def test_what_is_served_is_what_was_fitted(served, images: torch.Tensor) -> None:
    logits = served.network(images.permute(0, 3, 1, 2))
    outputs = served(images)
    together = melanoma_log_odds(logits["melanoma"], logits["diagnosis"])
    torch.testing.assert_close(outputs["melanoma_logit"], together)
    torch.testing.assert_close(outputs["site"], logits["site"].softmax(1))
    ages = age_distribution(logits["age"])
    torch.testing.assert_close(outputs["age_years"], ages @ torch.tensor(AGE_GRID).float())
    grid = np.array(AGE_GRID)
    torch.testing.assert_close(outputs["age"][:, 1], ages[:, (grid >= 30) & (grid < 45)].sum(1))
    torch.testing.assert_close(outputs["age"][:, 4], ages[:, grid >= 75].sum(1))
    _, middle = served.network.maps(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(outputs["ood_score"], served.distance(middle.mean(dim=(2, 3))))


@given(st.lists(st.floats(-60, 60), min_size=18, max_size=18))
def test_any_logits_give_an_age_distribution(logits: list[float]) -> None:
    found = age_distribution(torch.tensor([logits], dtype=torch.float64))
    assert found.min() >= 0
    assert float(found.sum()) == pytest.approx(1)


def test_heads_that_nothing_teaches_say_nothing(images: torch.Tensor) -> None:
    network = small_network()
    network.leave_out({"age", "sex", "diagnosis"})
    distance = fit_feature_distance(np.random.default_rng(0).normal(size=(50, 8)), axes=3)
    with torch.inference_mode():
        outputs = ServedNetwork(network, EDGES, distance).eval()(images)
        alone = network(images.permute(0, 3, 1, 2))["melanoma"][:, 0]
    assert torch.allclose(outputs["sex"], torch.tensor(1 / 2))
    assert torch.allclose(outputs["diagnosis"], torch.tensor(1 / 7))
    assert torch.allclose(outputs["age_years"], torch.tensor(AGE_GRID).float().mean(), atol=1e-3)
    assert outputs["site"].std() > 0
    # What the diagnosis would add to the melanoma logit is the same for all images.
    rest = 2 * outputs["melanoma_logit"] - alone
    assert rest.std() < 1e-5
