"""Weights in half precision: the same network before and after, in a file of half the size."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from training.half import fold_batch_norm, rounded, store_in_half, widen


class Named(nn.Module):
    """A network that names its output, as ours do."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.body(images)}


class Forked(nn.Module):
    """A convolution whose output is normalised, and added as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        found = self.convolution(images)
        return found + self.norm(found)


def build(name: str) -> Named:
    """A network of timm as if it had been trained: no statistic is what it is at first."""
    torch.manual_seed(0)
    network = Named(timm.create_model(name, num_classes=0)).eval()
    return with_statistics(network)


def with_statistics(network: Named) -> Named:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values, std=0.1)
    return network


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Those that still do something."""
    found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return [m for m in found if bool((m.running_mean != 0).any())]


@pytest.fixture
def images() -> Tensor:
    return torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("tf_efficientnet_lite0", 0),
        ("resnet18", 0),
        # A dense layer normalises what several layers gave it together.
        ("densenet121", 62),
        ("vit_tiny_patch16_224", 0),
    ],
)
@torch.no_grad()
def test_batch_norm_goes_into_the_convolution_before_it(
    name: str, left: int, images: Tensor
) -> None:
    if name.startswith("vit"):
        images = nn.functional.interpolate(images, (224, 224))
    network = build(name)
    expected = network(images)["features"]
    fold_batch_norm(network, images)
    assert len(norms(network)) == left
    torch.testing.assert_close(network(images)["features"], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_convolution_s_own_bias_is_scaled_too_and_nothing_is_left_behind(images: Tensor) -> None:
    network = with_statistics(Named(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval())
    nn.init.normal_(network.body[0].bias)
    expected = network(images)["features"]
    fold_batch_norm(network, images)
    assert not norms(network)
    torch.testing.assert_close(network(images)["features"], expected, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@torch.no_grad()
def test_what_is_read_elsewhere_too_is_not_folded(images: Tensor) -> None:
    network = with_statistics(Named(Forked()).eval())
    copy = rounded(network, images)
    assert len(norms(copy)) == 1
    found, expected = copy(images)["features"], network(images)["features"]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_weights_are_those_of_half_precision_and_the_network_given_is_not_changed(
    images: Tensor,
) -> None:
    network = build("tf_efficientnet_lite0")
    before = deepcopy(network.state_dict())
    copy = rounded(network, images)
    assert all(torch.equal(w.half().float(), w) for w in copy.parameters() if w.ndim > 1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    found, expected = copy(images)["features"], network(images)["features"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_a_weight_too_large_for_half_precision_stays(images: Tensor) -> None:
    network = Named(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))).eval()
    with torch.no_grad():
        network.body[0].weight[0, 0, 0, 0] = 1e5 + 1 / 3
    copy = rounded(network, images)
    assert torch.equal(copy.body[0].weight, network.body[0].weight)
    assert not torch.equal(copy.body[1].weight, network.body[1].weight)


def export(network: nn.Module, images: Tensor, path: Path) -> onnx.ModelProto:
    torch.onnx.export(network, (images,), path, dynamo=True, external_data=False, verbose=False)
    return onnx.load(path)


def run(model: onnx.ModelProto, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def test_the_file_is_half_as_large_and_answers_the_same_to_the_bit(
    images: Tensor, tmp_path: Path
) -> None:
    model = export(rounded(build("tf_efficientnet_lite0"), images), images, tmp_path / "a.onnx")
    whole, expected = model.ByteSize(), run(model, images)
    store_in_half(model)
    onnx.checker.check_model(model)
    assert model.ByteSize() < 0.55 * whole
    np.testing.assert_array_equal(run(model, images), expected)
    widen(model)
    assert model.ByteSize() == whole
    np.testing.assert_array_equal(run(model, images), expected)


def test_what_was_not_rounded_is_stored_as_it_is(images: Tensor, tmp_path: Path) -> None:
    model = export(build("tf_efficientnet_lite0"), images, tmp_path / "a.onnx")
    whole = model.ByteSize()
    store_in_half(model)
    assert model.ByteSize() == whole
