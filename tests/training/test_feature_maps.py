"""Every kind of backbone as a grid of features, with the weights it had as a classifier."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torchvision.ops import StochasticDepth

from training.backbones import find_source, load_classifier
from training.data.manifest import DataError
from training.feature_maps import _grid, build_feature_map, last_and_middle
from training.zoo import choose

# One of every way in which the libraries build them.
KINDS = {
    "alexnet": (256, 6),
    "convnext_tiny": (768, 7),
    "deit_tiny_patch16_224": (192, 14),
    "densenet121": (1024, 7),
    "efficientnet_b0": (1280, 7),
    "googlenet": (1024, 7),
    "inception_v3": (2048, 8),
    "legacy_xception": (2048, 10),
    "maxvit_t": (512, 7),
    "mnasnet0_5": (1280, 7),
    "mobilenet_v2": (1280, 7),
    "mobilenet_v3_small": (576, 7),
    "regnet_x_400mf": (400, 7),
    "regnetx_002": (368, 7),
    "resnet18": (512, 7),
    "shufflenet_v2_x0_5": (1024, 7),
    "squeezenet1_1": (512, 13),
    "swin_t": (768, 7),
    "swin_v2_t": (768, 8),
    "tf_efficientnet_lite0": (1280, 7),
    "vgg11": (512, 7),
    "vit_b_32": (768, 7),
    "xception41": (2048, 10),
}
# Channels and side of the map on the way that is looked at for what is strange.
MIDDLE = {
    "alexnet": (256, 13),
    "convnext_tiny": (384, 14),
    "deit_tiny_patch16_224": (192, 14),
    "densenet121": (512, 14),
    "efficientnet_b0": (112, 14),
    "googlenet": (832, 14),
    "legacy_xception": (728, 19),
    "regnet_x_400mf": (160, 14),
    "regnetx_002": (152, 14),
    "resnet18": (256, 14),
    "squeezenet1_1": (256, 27),
    "swin_t": (384, 14),
    "swin_v2_t": (384, 16),
    "tf_efficientnet_lite0": (112, 14),
    "vit_b_32": (768, 7),
}
# Between the map and the classifier these have nothing but a mean over places.
POOLED = ("densenet121", "googlenet", "inception_v3", "mnasnet0_5", "regnetx_002", "resnet18")
POOLED += ("shufflenet_v2_x0_5", "swin_t", "tf_efficientnet_lite0", "xception41")


@torch.inference_mode()
@pytest.mark.parametrize("name", KINDS)
def test_a_backbone_gives_a_grid_of_features(name: str) -> None:
    (backbone,) = choose([name])
    features, channels, mean, std = build_feature_map(backbone, None, drop_path=0.1)
    size = backbone.input_size
    images = torch.rand(2, 3, size, size)
    found = features.eval()(images)
    assert torch.equal(last_and_middle(features, images)[0], found)
    assert channels == KINDS[name][0]
    assert found.shape == (2, channels, KINDS[name][1], KINDS[name][1])
    assert len(mean) == len(std) == 3


@torch.inference_mode()
@pytest.mark.parametrize("name", MIDDLE)
def test_a_map_on_the_way_is_seen_beside_the_last(name: str) -> None:
    (backbone,) = choose([name])
    features, channels, *_ = build_feature_map(backbone, None)
    images = torch.zeros(2, 3, backbone.input_size, backbone.input_size, device="meta")
    last, middle = last_and_middle(features.eval().to("meta"), images)
    assert last.shape[:2] == (2, channels)
    assert middle.shape == (2, MIDDLE[name][0], MIDDLE[name][1], MIDDLE[name][1])


@torch.inference_mode()
def test_swin_s_map_on_the_way_has_channels_first_at_any_size() -> None:
    features, *_ = build_feature_map(*choose(["swin_t"]), None, size=384)
    images = torch.rand(1, 3, 384, 384)
    _, middle = last_and_middle(features.eval(), images)
    third = features[0][:6](images)  # after its stage of 384 channels
    assert torch.equal(middle, third.permute(0, 3, 1, 2))
    assert middle.shape == (1, 384, 24, 24)


@torch.inference_mode()
@pytest.mark.parametrize("name", POOLED)
def test_the_grids_mean_is_what_its_classifier_saw(name: str) -> None:
    (backbone,) = choose([name])
    source, _ = find_source(backbone, random=True)
    features, _, mean, std = build_feature_map(backbone, source)
    size = backbone.input_size
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    expected, _ = load_classifier(backbone, source)(images)
    shape = (1, 3, 1, 1)
    floats = images.permute(0, 3, 1, 2) / 255
    grid = features.eval()(
        (floats - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    )
    assert torch.allclose(grid.mean(dim=(2, 3)), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "efficientnet_b0"])
def test_stochastic_depth_rises_with_depth(name: str) -> None:
    features, *_ = build_feature_map(*choose([name]), None, drop_path=0.3)
    drops = [m.p for m in features.modules() if isinstance(m, StochasticDepth)]
    assert drops[0] == 0
    assert drops[-1] == pytest.approx(0.3)
    assert drops == sorted(drops)


def test_timm_s_networks_have_stochastic_depth_too_and_are_left_in_training() -> None:
    features, *_ = build_feature_map(*choose(["tf_efficientnet_lite0"]), None, drop_path=0.3)
    drops = [m.drop_prob for m in features.modules() if isinstance(m, DropPath)]
    assert 0.2 < max(drops) <= 0.3
    assert drops == sorted(drops)
    assert all(module.training for module in features.modules())


def test_tokens_that_are_no_square_are_no_map() -> None:
    assert _grid(torch.arange(20.0).reshape(1, 10, 2), 1).shape == (1, 2, 3, 3)
    with pytest.raises(DataError, match="no square grid"):
        _grid(torch.zeros(1, 9, 2), 1)


def test_a_file_of_weights_is_used(tmp_path: Path) -> None:
    (backbone,) = choose(["mnasnet0_5"])
    torch.manual_seed(1)
    state = load_classifier(backbone, find_source(backbone, random=True)[0]).model.state_dict()
    torch.save(state, tmp_path / "mnasnet0_5.pth")
    source, _ = find_source(backbone, tmp_path)
    features, *_ = build_feature_map(backbone, source)
    first = next(iter(state.values()))
    assert torch.equal(next(features.parameters()), first)


def test_another_normalisation_is_used_where_it_is_asked_for() -> None:
    (listed,) = choose(["googlenet"])
    other = replace(listed, mean=(0.1, 0.2, 0.3), std=(0.7, 0.8, 0.9))
    half = (0.5, 0.5, 0.5)
    for backbone, expected in ((listed, (half, half)), (other, (other.mean, other.std))):
        assert build_feature_map(backbone, None, size=96)[2:] == expected
