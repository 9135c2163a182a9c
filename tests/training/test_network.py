import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.bundle import AGE_GRID
from training.network import MultiTaskNetwork, ServedNetwork, age_distribution
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


@torch.inference_mode()
def test_the_heat_map_is_the_logit_taken_apart(served, images: torch.Tensor) -> None:
    outputs = served(images)
    bias = served.network.heads["melanoma"].bias
    torch.testing.assert_close(
        outputs["melanoma_map"].mean(dim=(1, 2)) + bias, outputs["melanoma_logit"]
    )


@torch.inference_mode()
def test_what_is_served_is_what_was_fitted(served, images: torch.Tensor) -> None:
    logits = served.network(images.permute(0, 3, 1, 2))
    outputs = served(images)
    torch.testing.assert_close(outputs["melanoma_logit"], logits["melanoma"][:, 0])
    torch.testing.assert_close(outputs["site"], logits["site"].softmax(1))
    ages = age_distribution(logits["age"])
    torch.testing.assert_close(outputs["age_years"], ages @ torch.tensor(AGE_GRID).float())
    grid = np.array(AGE_GRID)
    torch.testing.assert_close(outputs["age"][:, 1], ages[:, (grid >= 30) & (grid < 45)].sum(1))
    torch.testing.assert_close(outputs["age"][:, 4], ages[:, grid >= 75].sum(1))
    seen = served.network.backbone_features(images.permute(0, 3, 1, 2)).mean(dim=(2, 3))
    torch.testing.assert_close(outputs["ood_score"], served.distance(seen))


@given(st.lists(st.floats(-60, 60), min_size=18, max_size=18))
def test_any_logits_give_an_age_distribution(logits: list[float]) -> None:
    found = age_distribution(torch.tensor([logits], dtype=torch.float64))
    assert found.min() >= 0
    assert float(found.sum()) == pytest.approx(1)
